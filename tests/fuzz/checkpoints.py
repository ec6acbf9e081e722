"""Files of weights: .pth (zip and legacy), .safetensors, whole conversions, checkpoint folders, training runs."""

import functools
import json
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
from convert_cases import TINY_FLAGS, tiny_state
from run_cases import FACTS, small_state
from tiny_checkpoint import make_tiny_checkpoint, tiny_config

from instdiff_jax.checkpoint.folder import read_config, restore_params
from instdiff_jax.checkpoint.parts import tree_digest
from instdiff_jax.checkpoint.run import read_run
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.checkpoint.torch_file import read_file, write_safetensors
from instdiff_jax.errors import InputError
from instdiff_jax.training.checkpoints import Checkpoints
from instdiff_jax.tree import flatten
from tests.fuzz.cases import Kind, command
from tests.fuzz.mutate import any_file, json_file, junk, mutate_bytes
from tests.fuzz.mutate_torch import save_changed


def _tensors() -> dict[str, Any]:
    whole = torch.arange(24, dtype=torch.float32)
    return {
        "state_dict": {
            "a.weight": whole.reshape(4, 6),
            "a.bias": whole[3:7],
            "half": torch.ones(3, 5, dtype=torch.float16),
            "brain": torch.full((7,), 1.5, dtype=torch.bfloat16),
            "turned": torch.arange(6.0).reshape(2, 3).T,
            "param": torch.nn.Parameter(torch.ones(2)),
            "steps": torch.tensor(3),
        },
        "epoch": 3,
        "notes": ["x", (1, 2.5, None, True), {"lr": 1e-4}],
    }


def _check_tensors(value: Any, size: int, depth: int = 0) -> int:
    """Reads every tensor in what a file held; returns their number."""
    assert depth < 1000
    if isinstance(value, np.ndarray):
        assert value.size * value.itemsize <= max(size, 1 << 16), f"{value.shape} of a file of {size} bytes"
        assert not value.flags.writeable or not value.size
        value.astype(np.float32).sum()
        return 1
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return sum(_check_tensors(part, size, depth + 1) for part in list(parts)[:100])


def _write_zip(rng, folder: Path) -> None:
    save_changed(rng, _tensors(), folder / "x.pth")


def _write_legacy(rng, folder: Path) -> None:
    save_changed(rng, _tensors(), folder / "x.pth", legacy=True)


def _read_weights(folder: Path) -> None:
    (path,) = folder.glob("x.*")
    for verify in (True, False):
        try:
            content = read_file(path, verify)
        except InputError:
            if verify:
                continue
            raise
        assert isinstance(content, dict)
        _check_tensors(content, path.stat().st_size)


def _write_safetensors(rng, folder: Path) -> None:
    tensors = {f"layer.{i}": np.arange(i * 5, dtype=np.float32).reshape(i, 5) for i in range(4)}
    tensors["whole"] = np.arange(3)
    path = folder / "x.safetensors"
    write_safetensors(path, tensors)
    if rng is None:
        return
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    choice = rng.random()
    if choice < 0.3:  # as other programs write it
        del header["__metadata__"]
    if choice < 0.75:
        body = json_file(rng, header)
        lies = [len(body)] * 8 + [0, 1, len(body) + 8, 2**40, 2**64 - 1]
        data = struct.pack("<Q", rng.choice(lies)) + body + data[8 + length :]
    path.write_bytes(data if choice < 0.75 else mutate_bytes(rng, data))


@functools.cache
def _released() -> dict[str, dict[str, np.ndarray]]:
    return tiny_state()


def _write_released(rng, folder: Path) -> None:
    content: dict = {part: {k: torch.from_numpy(v) for k, v in group.items()} for part, group in _released().items()}
    content["diffusion"] = {}
    save_changed(rng, content, folder / "x.pth")


def _convert(folder: Path) -> None:
    output = folder / "out"
    command("convert", "--input", folder / "x.pth", "--output", output, *TINY_FLAGS, output=output)
    params = flatten(restore_params(output, dtype=None, as_numpy=True))
    assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in params.values())
    config, _, absent = read_config(output)
    assert {path: leaf.shape for path, leaf in params.items()} == flatten(parameter_shapes(config, absent))


class CheckpointFolder:
    """A checkpoint folder whose config.json, or another file, is changed."""

    def __init__(self, folder: Path):
        self.source = make_tiny_checkpoint(folder / "tiny")
        self.digest = tree_digest(restore_params(self.source, dtype=None, as_numpy=True))
        self.files = sorted(path.relative_to(self.source) for path in self.source.rglob("*") if path.is_file())

    def write_config(self, rng, folder: Path) -> None:
        shutil.copytree(self.source, folder / "model")
        path = folder / "model" / "config.json"
        content = json.loads(path.read_text())
        if rng is not None and rng.random() < 0.6:  # the model's sizes alone
            group = rng.choice(list(content["model"]))
            size = rng.choice(list(content["model"][group]))
            old = content["model"][group][size]
            sizes = [
                0,
                1,
                -1,
                64,
                10**6,
                2**31,
                10**30,
                1.5,
                "64",
                [],
                [1],
                [10**6] * 2,
                [1] * 30,
                True,
                None,
                junk(rng),
            ]
            content["model"][group][size] = rng.choice([*sizes, old * 2, [old]])
            path.write_bytes(json_file(None, content))
        else:
            path.write_bytes(json_file(rng, content))

    def read(self, folder: Path) -> None:
        config, sampling, absent = read_config(folder / "model")
        assert type(sampling.steps) is int and type(config.unet.model_channels) is int
        params = flatten(restore_params(folder / "model", dtype=None, as_numpy=True))
        assert {path: leaf.shape for path, leaf in params.items()} == flatten(parameter_shapes(config, absent))

    def write_file(self, rng, folder: Path) -> None:
        shutil.copytree(self.source, folder / "model")
        if rng is not None:
            path = folder / "model" / rng.choice(self.files)
            choice = rng.random()
            if choice < 0.1:
                path.unlink()
            elif choice < 0.2:
                path.write_bytes((folder / "model" / rng.choice(self.files)).read_bytes())
            else:
                path.write_bytes(any_file(rng, path.read_bytes()))

    def read_same(self, folder: Path) -> None:
        read_config(folder / "model")
        params = restore_params(folder / "model", dtype=None, as_numpy=True)
        assert tree_digest(params) == self.digest, "other parameters than those that were saved"


class Run:
    """A training run of two checkpoints, of which a file is changed."""

    def __init__(self, folder: Path):
        self.source = folder / "run"
        checkpoints = Checkpoints(self.source, FACTS)
        self.states = {step: small_state(step) for step in (1, 2)}
        for step, state in self.states.items():
            checkpoints.save(step, state)
        checkpoints.close()
        self.files = sorted(path.relative_to(self.source) for path in self.source.rglob("*") if path.is_file())
        self.newest = [path for path in self.files if path.parts[1] == "2"]

    def write(self, rng, folder: Path) -> None:
        shutil.copytree(self.source, folder / "run")
        for _ in range(0 if rng is None else rng.choice([1, 1, 2])):
            path = folder / "run" / rng.choice(self.newest)
            data = path.read_bytes()
            is_json = data[:1] == b"{" and rng.random() < 0.7
            path.write_bytes(json_file(rng, json.loads(data)) if is_json else mutate_bytes(rng, data))

    def read(self, folder: Path) -> None:
        leaf = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=leaf), self.states[1])
        checkpoints = Checkpoints(folder / "run", FACTS)
        try:
            state = checkpoints.restore(shapes)
        finally:
            checkpoints.close()
        same = self.states[int(state.step)]
        assert all(map(np.array_equal, jax.tree.leaves(state), jax.tree.leaves(same))), "a state that was not saved"


def _write_run_config(rng, folder: Path) -> None:
    (folder / "run" / "checkpoints").mkdir(parents=True)
    groups = {"model": tiny_config().to_dict(), "sampling": {"steps": 4}, "train": {"start": "", "seed": 0}}
    (folder / "run" / "config.json").write_bytes(json_file(rng, groups))


def _read_run_config(folder: Path) -> None:
    run = read_run(folder / "run")
    assert type(run.train["seed"]) is int and isinstance(run.train.get("start", ""), str)
    assert run.model.unet.num_heads > 0


def kinds(folder: Path) -> list[Kind]:
    model, run = CheckpointFolder(folder), Run(folder)
    return [
        Kind(".pth", _write_zip, _read_weights, weight=8),
        Kind("legacy .pth", _write_legacy, _read_weights, refused=True),
        Kind(".safetensors", _write_safetensors, _read_weights, weight=6),
        Kind("convert", _write_released, _convert, weight=2),
        Kind("checkpoint's config.json", model.write_config, model.read, weight=3),
        Kind("checkpoint's files", model.write_file, model.read_same, weight=2),
        Kind("run's config.json", _write_run_config, _read_run_config, weight=2),
        Kind("run's files", run.write, run.read, weight=2),
    ]
