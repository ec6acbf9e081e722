"""Checkpoints of the tiny model as PyTorch files of every kind, and the converter in this process."""

import sys
from unittest import mock

import numpy as np
import pytest
from tiny_checkpoint import tiny_config

from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.shapes import ADAPTERS
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.cli import convert
from instdiff_jax.tree import flatten

torch = pytest.importorskip("torch")
from make_checkpoint import diffusion_buffers  # noqa: E402  (needs torch)

TINY = tiny_config()
TINY_FLAGS = [
    f"--config.model.{group}.{name}={value}" for group, sizes in TINY.to_dict().items() for name, value in sizes.items()
]


def run(*argv) -> None:
    """The command line, in this process."""
    with mock.patch.object(sys, "argv", ["convert", *map(str, argv)]):
        convert.main()


def tiny_state(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    random = np.random.default_rng(seed)
    return {
        part: {
            key: random.standard_normal(entry.torch_shape).astype(np.float32)
            for key, entry in rename_table(part, TINY).items()
        }
        for part in PARTS
    }


def adapters_of(state):
    table = rename_table("model", TINY)
    return {key: value for key, value in state["model"].items() if table[key].group in ADAPTERS}


def sd_file(state, path, wrap=True, extra=()):
    """Stable Diffusion 1.5's own layout, without adapters."""
    adapters = adapters_of(state)
    base = {f"model.diffusion_model.{k}": v for k, v in state["model"].items() if k not in adapters}
    base.update({f"first_stage_model.{k}": v for k, v in state["autoencoder"].items()})
    base.update({f"cond_stage_model.{k}": v for k, v in state["text_encoder"].items()})
    tensors = {key: torch.from_numpy(value) for key, value in base.items()}
    tensors.update(diffusion_buffers())
    tensors["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.diffusion_modeltime_embed0weight"] = torch.zeros(3)
    tensors.update(extra)
    torch.save({"state_dict": tensors, "global_step": 1, "callbacks": {}} if wrap else tensors, path)
    return path


def port_files(state, directory):
    """Adapter files in the layout of the ComfyUI port."""
    fusers = {"input_blocks": {}, "middle_block": {}, "output_blocks": {}}
    scaleu, positionnet = {}, {}
    for key, value in adapters_of(state).items():
        value = torch.from_numpy(value)
        if ".fuser." in key:
            block, name = key.split(".transformer_blocks.0.fuser.")
            group, index = block.split(".")[:2]
            entry = fusers[group].setdefault(index, {"params": {"n_heads": 2, "d_head": 16, "context_dim": 48}})
            entry.setdefault("state", {})[name] = value
        elif key.startswith("scaleu_"):
            name, index = key.rsplit("_", 1)
            scaleu.setdefault(index, {})[name] = value
        else:
            positionnet[key.removeprefix("position_net.")] = value
    files = {"fusers": fusers, "position_net": positionnet, "scaleu": scaleu}
    for name, content in files.items():
        torch.save(content, directory / f"{name}.ckpt")
    return [directory / f"{name}.ckpt" for name in files]


def assert_params(params, state, absent=()):
    expected = {}
    for part in PARTS:
        known = rename_table(part, TINY, absent)
        chosen = {key: value for key, value in state[part].items() if key in known}
        expected.update(from_state_dict(part, chosen, TINY, absent))
    found, expected = flatten(params), flatten(expected)
    assert found.keys() == expected.keys()
    for path, value in expected.items():
        assert np.array_equal(found[path], value), path


def run_and_fail(capsys, *argv) -> str:
    with pytest.raises(SystemExit) as end:
        run(*argv)
    assert end.value.code == 2
    return capsys.readouterr().err
