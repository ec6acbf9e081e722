"""Our images for the settings of an end-to-end parity file, and the official ones."""

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

import common
from common import channels_last, parity
from instdiff_jax.sampling.pipeline import Pipeline


@functools.cache
def small_checkpoint() -> Path:
    """A checkpoint folder of the small size, converted from a file in the released layout."""
    import torch
    from make_checkpoint import make_checkpoint

    from instdiff_jax.checkpoint.folder import save_folder
    from instdiff_jax.checkpoint.pytorch import load_pytorch
    from instdiff_jax.config import SamplingConfig

    folder = Path(_TEMPORARY.name)
    torch.save(make_checkpoint("small", seed=0), folder / "small.pth")
    config = common.model_config("small")
    params, absent = load_pytorch([folder / "small.pth"], config)
    save_folder(folder / "small", params, config, SamplingConfig(), config.text_encoder.tokenizer, absent)
    (folder / "small.pth").unlink()
    return folder / "small"


_TEMPORARY = tempfile.TemporaryDirectory(prefix="parity")  # vanishes with the process


@functools.cache
def end_to_end(format: str, dtype: str = "float32") -> tuple[np.ndarray, np.ndarray]:
    """Latents [b h w z] and uint8 images from the layout, the noise and the settings in the file."""
    from instdiff_jax import Layout

    data = parity(f"end_to_end_small_{format}")
    results = Pipeline.from_checkpoint(small_checkpoint(), dtype)(
        [Layout.from_dict(json.loads(str(data["layout"])))],
        seeds=[0, 1],
        noise=channels_last(data["noise"]),
        format=format,
        **sampling_settings(data),
    )
    return np.stack([result.latents for result in results]), np.stack([result.array for result in results])


def sampling_settings(data: dict) -> dict[str, Any]:
    """The settings of an end-to-end file."""
    kinds = dict(steps=int, alpha=float, mis=float, guidance_scale=float, negative_prompt=str)
    return {name: kind(data[name]) for name, kind in kinds.items()}


def official_pixels(data: dict) -> np.ndarray:
    """The official pictures as uint8."""
    images = np.clip(channels_last(data["images_float"].astype(np.float32)), -1, 1)
    return ((images * 0.5 + 0.5) * 255).astype(np.uint8)
