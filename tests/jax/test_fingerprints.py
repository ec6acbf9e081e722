"""Fingerprints of checkpoints: they follow every value, and not the place or the time of writing."""

import json

import numpy as np
import pytest
from tiny_checkpoint import TOKENIZER, tiny_config

from instdiff_jax.checkpoint import folder, parts
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.config import SamplingConfig
from instdiff_jax.sampling import loading
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.start import base_fingerprint
from instdiff_jax.tree import flatten, unflatten

TINY = tiny_config()


def tiny_params() -> dict:
    random = np.random.default_rng(0)
    shapes = flatten(parameter_shapes(TINY))
    return unflatten({path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()})


def flip(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize("small", [True, False])
def test_a_fingerprint_follows_the_values(small, tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALL_PART", parts.SMALL_PART if small else 0)
    marks, params = [], tiny_params()
    for name, change in (("a", 0), ("b", 0), ("c", 1)):
        params["text_encoder"]["final_norm"]["bias"] = params["text_encoder"]["final_norm"]["bias"] + change
        folder.save_folder(tmp_path / name, params, TINY, SamplingConfig(), TOKENIZER)
        settings = TrainSettings(steps=1, batch_size=1, start=str(tmp_path / name))
        marks.append([base_fingerprint(settings, TINY, part) for part in ("", "text_encoder", "unet")])
    assert marks[0] == marks[1]
    assert [a == c for a, c in zip(marks[0], marks[2], strict=True)] == [False, False, True]


def test_a_change_in_the_middle_of_a_large_file_changes_the_fingerprints(tmp_path, monkeypatch):
    """Of a folder without checksums, and of one that is read without comparing them, the whole files count."""
    monkeypatch.setattr(parts, "SMALL_PART", 0)
    directory = tmp_path / "x"
    folder.save_folder(directory, tiny_params(), TINY, SamplingConfig(), TOKENIZER)
    unverified = loading.checkpoint_fingerprint(directory, verify=False)
    files = [path for path in (directory / "params" / "unet").rglob("*") if path.name[0] not in "_."]
    file = max(files, key=lambda path: path.stat().st_size)
    flip(file)
    assert loading.checkpoint_fingerprint(directory, verify=False) != unverified
    content = json.loads((directory / "config.json").read_text())
    del content["crc32"]
    for note in content["params"].values():
        del note["crc32"]
    (directory / "config.json").write_text(json.dumps(content))
    settings = TrainSettings(steps=1, batch_size=1, start=str(directory))
    older = loading.checkpoint_fingerprint(directory), base_fingerprint(settings, TINY)
    flip(file)
    changed = loading.checkpoint_fingerprint(directory), base_fingerprint(settings, TINY)
    assert all(old != new for old, new in zip(older, changed, strict=True))
