"""Reads TAESD's decoder: the released taesd_decoder file, or diffusers' AutoencoderTiny."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint.diffusers import weight_files
from instdiff_jax.checkpoint.rename import check_keys
from instdiff_jax.checkpoint.torch_file import read_file
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.models.tiny_decoder import BLOCKS, TinyDecoder
from instdiff_jax.tree import flatten, unflatten

_DIFFUSERS = "decoder.layers."


def read_taesd(path: Path, config: ModelConfig) -> dict[str, Any]:
    """The parameters of `TinyDecoder`, float32.

    Args:
        path: the released file (keys such as "1.weight"), or diffusers' file or folder ("decoder.layers.0.weight").
        config: of the model whose latents it decodes.

    Raises:
        InputError: for a file that is neither, or a model with latents of another shape.
    """
    stride = 2 ** (len(BLOCKS) - 1)
    if (config.autoencoder.z_channels, config.latent_stride) != (4, stride):
        raise InputError(
            f"{path}: TAESD decodes 4 channels of {stride}×{stride} pixels, and this model's latents have "
            f"{config.autoencoder.z_channels} of {config.latent_stride}×{config.latent_stride}"
        )
    files = weight_files(path, "diffusion_pytorch_model") if path.is_dir() else [path]
    tensors = {key: value for file in files for key, value in read_file(file).items()}
    expected = {_key(names): names for names in flatten(_shapes())}
    if any(key.startswith(_DIFFUSERS) for key in tensors):
        tensors = {key: value for key, value in tensors.items() if not key.startswith("encoder.")}
    else:
        expected = {_released(key): names for key, names in expected.items()}
    shapes = {key: tuple(np.shape(value)) for key, value in tensors.items()}
    flat = flatten(_shapes())
    check_keys(shapes, {key: _torch_shape(flat[names].shape) for key, names in expected.items()}, str(path))
    leaves = {}
    for key, names in expected.items():
        array = np.asarray(tensors[key], np.float32)
        if not np.isfinite(array).all():
            raise InputError(f"{path}: {key}: expected finite numbers")
        leaves[names] = array.transpose(2, 3, 1, 0) if array.ndim == 4 else array
    return unflatten(leaves)


def _shapes() -> dict[str, Any]:
    decoder, latents = TinyDecoder(), jnp.zeros((1, 1, 1, 4))
    return jax.eval_shape(lambda: decoder.init(jax.random.key(0), latents, method="decode"))["params"]


def _key(names: tuple[str, ...]) -> str:
    """diffusers' name of a parameter: layer_2/conv_0/kernel is decoder.layers.2.conv.0.weight."""
    *modules, leaf = names
    places = ".conv.".join(name.rpartition("_")[2] for name in modules)
    return f"{_DIFFUSERS}{places}.{'weight' if leaf == 'kernel' else leaf}"


def _released(key: str) -> str:
    """The released name: there the clamp is the stack's first entry."""
    place, rest = re.fullmatch(rf"{re.escape(_DIFFUSERS)}(\d+)(.*)", key).groups()
    return f"{int(place) + 1}{rest}"


def _torch_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (shape[3], shape[2], *shape[:2]) if len(shape) == 4 else shape
