"""Fingerprints of what a training run starts from."""

import hashlib
import json
from pathlib import Path
from typing import Any

from instdiff_jax.checkpoint.folder import read_config, stored_digests
from instdiff_jax.config import ModelConfig

# Of a large file, this many bytes at its start and at its end are hashed.
_SAMPLE = 1 << 16


def model_sizes(config: ModelConfig) -> dict[str, Any]:
    """Every setting that decides the networks, as JSON has it; the tokenizer's folder does not."""
    sizes = json.loads(json.dumps(config.to_dict()))
    del sizes["text_encoder"]["tokenizer"]
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
    directory = Path(start)
    read_config(directory)
    digest = hashlib.sha256()
    root, digests = directory / "params" / part, stored_digests(directory)
    for name, value in sorted(digests.items()):
        if part in ("", name):
            digest.update(f"{name} {value}\n".encode())
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.relative_to(directory / "params").parts[0] in digests:
            continue
        # orbax's notes hold the time and place of writing, which differ between two conversions of one file.
        if path.name.startswith("_") or path.name == "commit_success.txt":
            continue
        size = path.stat().st_size
        digest.update(f"{path.relative_to(root)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > _SAMPLE:
                file.seek(max(_SAMPLE, size - _SAMPLE))
                digest.update(file.read())
    return digest.hexdigest()[:32]
