"""What several tests share: the parity data, deterministic weights and the error measure."""

import functools
import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from weights import make_array  # lives beside the parity data

ROOT = Path(__file__).resolve().parent.parent.parent
PARITY = ROOT / "tests" / "parity"
SUPPORT = ROOT / "tests" / "support"
# For processes of their own that use the tests' helpers.
PYTHONPATH = os.pathsep.join(map(str, (ROOT, SUPPORT, PARITY)))


def relative_error(a, b) -> float:
    """max|a − b| / max|b|: the measure of every parity number in this project."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(a - b).max() / np.abs(b).max())


def worst(errors: Iterable[float]) -> float:
    """The largest error; NaN if any is, where `max` may drop it."""
    return float(np.max(list(errors)))


def parity(name: str) -> dict[str, np.ndarray]:
    """The arrays of tests/parity/NAME.npz."""
    with np.load(PARITY / f"{name}.npz", allow_pickle=False) as data:
        return dict(data)


def state_dict(spec: str, seed: int = 0) -> dict[str, np.ndarray]:
    """The deterministic PyTorch state dict whose shapes tests/parity/spec_SPEC.json lists."""
    shapes = json.loads((PARITY / f"spec_{spec}.json").read_text())
    return {key: make_array(key, shape, seed) for key, shape in shapes.items()}


def model_config(size: str = "full"):
    """The ModelConfig of a size in the parity data: full, small or alt."""
    from instdiff_jax.config import ModelConfig

    model = ModelConfig().to_dict()
    if size != "full":
        model["unet"].update(model_channels=64, num_heads=4)
        model["unifusion"].update(mid_dim=256)
        model["autoencoder"].update(ch=32, num_res_blocks=1)
        model["text_encoder"].update(
            vocab_size=1024, intermediate_size=512, num_layers=2, tokenizer=str(PARITY / "tokenizer")
        )
    if size == "alt":
        model["unet"].update(model_channels=96, channel_mult=(1, 2, 2), num_res_blocks=1, num_heads=6)
        model["unifusion"].update(mid_dim=128)
    return ModelConfig.from_dict(model)


@functools.cache
def model_params(size: str, root: str = "unet", seed: int = 0) -> dict:
    """The deterministic parameters of "unet" or "unifusion" of a size, as our tree."""
    from instdiff_jax.checkpoint.tables import rename_table
    from instdiff_jax.tree import unflatten

    table = rename_table("model", model_config(size)).items()
    leaves = {
        entry.path[1:]: entry.to_ours(make_array(key, entry.torch_shape, seed))
        for key, entry in table
        if entry.path[0] == root
    }
    return unflatten(leaves)


DROPPED = {"box": ("scribble", "mask"), "mask": ("scribble",), "point": ("box", "scribble", "mask"), "scribble": ()}


def grounding_arrays(data: dict, dropped=()) -> dict[str, np.ndarray]:
    """The official code's grounding inputs as ours: its rule for null features, written out again here."""
    valid = data["masks"].astype(np.float32)
    maps = data["segs"].astype(np.uint32)

    def given(name):
        return (data[name].sum(-1) + valid > 0).astype(np.float32)

    present = {
        "box": valid,
        "point": valid,
        "scribble": given("scribbles"),
        "mask": given("polygons"),
        "map": (maps.sum((1, 2, 3)) > 0).astype(np.float32),
    }
    for name in dropped:
        present[name] = 0 * present[name]
        if name == "mask":
            present["map"] = 0 * present["map"]
    return dict(
        boxes=data["boxes"],
        points=data["points"],
        scribbles=data["scribbles"],
        mask_points=data["polygons"],
        phrase_embeddings=data["text_embeddings"],
        valid=valid,
        maps=(maps << np.arange(30, dtype=np.uint32)[None, :, None, None]).sum(1).astype(np.uint32),
        **{f"has_{name}": value for name, value in present.items()},
    )


def null_grounding_arrays(grounding: dict) -> dict[str, np.ndarray]:
    """The official null grounding: zeros everywhere."""
    return {key: np.zeros_like(value) for key, value in grounding.items()}


def channels_last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 1, -1)


def channels_first(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), -1, 1)
