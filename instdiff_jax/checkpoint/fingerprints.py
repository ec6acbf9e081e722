"""Fingerprints of what a training run starts from."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.buckets import as_path, files_below, is_bucket
from instdiff_jax.checkpoint.folder import part_checksums, read_config, stored_digests
from instdiff_jax.config import ModelConfig

_ENDS = 1 << 16  # bytes


def model_sizes(config: ModelConfig) -> dict[str, Any]:
    """Every setting that decides the networks, as JSON has it; the tokenizer's folder and the canvas do not."""
    sizes = json.loads(json.dumps(config.to_dict()))
    del sizes["text_encoder"]["tokenizer"], sizes["unet"]["sample_size"]
    return sizes


def base_fingerprint(start: str, seed: int, config: ModelConfig, part: str = "") -> str:
    """Fingerprint of the parameters that a run starts from: of their values, not of their place.

    Args:
        start: the checkpoint folder; "" for fresh parameters.
        seed: of fresh parameters.
        config: the model's sizes.
        part: a top-level key of the tree, for the fingerprint of that network alone.
    """
    if not start:
        text = json.dumps([seed, part, model_sizes(config)], sort_keys=True)
        return "fresh-" + hashlib.sha256(text.encode()).hexdigest()[:24]
    directory = as_path(start)
    read_config(directory)
    digest, digests = hashlib.sha256(), stored_digests(directory)
    for name, value in sorted(digests.items()):
        if part in ("", name):
            digest.update(f"{name} {value}\n".encode())
    parts = {name.split("/")[0] for name in files_below(directory / "params")}
    for folder in sorted(parts & {part} if part else parts):
        for name, crc in sorted(part_checksums(directory, folder).items()) if folder not in digests else ():
            # orbax's notes hold the time and place of writing, which differ between two conversions of one file.
            if not Path(name).name.startswith("_") and Path(name).name != "commit_success.txt":
                digest.update(f"{folder}/{name} {crc}\n".encode())
    return digest.hexdigest()[:32]


def older_fingerprint(start: str) -> str:
    """What `base_fingerprint` was before version 0.2, with which runs begun then go on: large files by their ends."""
    if is_bucket(start):  # no run was in one then
        return ""
    digest, digests = hashlib.sha256(), stored_digests(start)
    for name, value in sorted(digests.items()):
        digest.update(f"{name} {value}\n".encode())
    root = Path(start) / "params"
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        inside = path.relative_to(root)
        if inside.parts[0] in digests or path.name.startswith("_") or path.name == "commit_success.txt":
            continue
        content = np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.zeros(0, np.uint8)
        digest.update(f"{inside} {content.size}\n".encode())
        digest.update(content[:_ENDS].tobytes() + content[max(_ENDS, content.size - _ENDS) :].tobytes())
    return digest.hexdigest()[:32]
