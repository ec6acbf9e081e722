"""A checkpoint folder of a model so small that pictures take seconds, layouts for it, and a detector as small."""

from pathlib import Path

import numpy as np

import common
from instdiff_jax import Layout
from instdiff_jax.checkpoint.folder import save_folder
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.tree import flatten, unflatten
from projects.common.segmentation_network import SegmenterConfig, init_shapes
from projects.common.segmenter import Segmenter
from projects.shapes.train_segmenter import CLASSES

SIDE = 32  # pixels; latents are half of it
TOKENIZER = common.PARITY / "tokenizer"


def tiny_config() -> ModelConfig:
    """Every part in two levels; map tokens have one feature each."""
    model = ModelConfig().to_dict()
    model["unet"].update(
        model_channels=32,
        channel_mult=(1, 2),
        num_res_blocks=1,
        attention_resolutions=(1,),
        num_heads=2,
        context_dim=64,
        sample_size=SIDE // 2,
    )
    model["unifusion"].update(mid_dim=32, trunk_depths=(1, 1, 1, 1), trunk_dims=(8, 16, 32, 64), map_size=64)
    model["autoencoder"].update(ch=32, ch_mult=(1, 2), num_res_blocks=1)
    model["text_encoder"].update(
        vocab_size=1024, hidden_size=64, intermediate_size=64, num_layers=2, num_heads=2, tokenizer=str(TOKENIZER)
    )
    return ModelConfig.from_dict(model)


def make_tiny_checkpoint(directory: Path) -> Path:
    """Writes the folder, with deterministic weights."""
    config, params = tiny_config(), {}
    for part in PARTS:
        table = rename_table(part, config)
        weights = {key: common.make_array(key, entry.torch_shape) for key, entry in table.items()}
        params |= from_state_dict(part, weights, config)
    save_folder(directory, params, config, SamplingConfig(steps=4, alpha=(0.75, 0.0, 0.25), mis=0.5), TOKENIZER)
    return directory


def make_layout(count: int, name: str = "scene", side: int = SIDE, seed: int = 0, mask: bool = False) -> Layout:
    """A layout with `count` instances, the first with a mask if asked for."""
    rng = np.random.default_rng([seed, count])
    annos = []
    for i in range(count):
        x, y = rng.integers(0, side // 2, 2)
        w, h = rng.integers(side // 4, side // 2, 2)
        colour = rng.choice(["red", "green", "blue"])
        anno = {"caption": f"a {colour} thing {i}", "bbox": [int(v) for v in (x, y, w, h)]}
        if mask and i == 0:
            area = np.zeros((side, side), np.uint8)
            area[y : y + h, x : x + w] = 1
            anno["mask"] = {"size": [side, side], "counts": run_lengths(area)}
        annos.append(anno)
    values = {"caption": f"a scene of {count}", "width": side, "height": side, "annos": annos}
    return Layout.from_dict(values, name=name)


def run_lengths(area: np.ndarray) -> list[int]:
    """Uncompressed RLE: column by column, zeros first."""
    flat = area.T.ravel()
    edges = np.flatnonzero(np.diff(np.r_[0, flat])).tolist()
    return np.diff([0, *edges, flat.size]).tolist()


def make_tiny_segmenter(directory: Path) -> Path:
    """Writes the folder of a segmentation network that was never trained, with deterministic weights."""
    config = SegmenterConfig(CLASSES, (8, 8, 8, 16))
    rng = np.random.default_rng(0)
    shapes = flatten(init_shapes(config))
    leaves = {key: rng.standard_normal(leaf.shape) / max(leaf.size, 1) ** 0.25 for key, leaf in shapes.items()}
    Segmenter(config, unflatten(leaves)).save(directory, {"command": "a test's"})
    return directory
