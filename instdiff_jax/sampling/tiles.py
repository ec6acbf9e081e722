"""Decodes a large image in tiles that overlap, so that memory does not grow with the canvas.

The autoencoder's norms and attention see one tile at a time, so the result differs a little from that of the whole.

Axes: b batch, h w latents, z latent channels, H W image, t T sides of a tile in latents and in pixels.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from instdiff_jax.errors import InputError

LEAST = 8  # latents of a tile's side
OVERLAP = 4  # two tiles share at least a tile's side divided by this


def check_tile(tile: int | None, stride: int) -> int | None:
    """The latents of a tile's side in pixels; InputError for no whole number of them, or too few."""
    if tile is not None and (type(tile) is not int or tile % stride or tile < LEAST * stride):
        raise InputError(f"tile: expected a multiple of {stride} pixels, at least {LEAST * stride}, got {tile!r}")
    return None if tile is None else tile // stride


def decode_tiles(
    decode: Callable[[Array], Array], latents: Float[Array, "b h w z"], tile: int
) -> Float[Array, "b H W 3"]:
    """Images from tiles of `tile` × `tile` latents; where they overlap, each fades out linearly towards its edge."""
    batch, channels = latents.shape[0], latents.shape[3]
    sides = [min(tile, side) for side in latents.shape[1:3]]
    if sides == list(latents.shape[1:3]):
        return decode(latents)
    starts = [_starts(length, side) for length, side in zip(latents.shape[1:3], sides, strict=True)]
    stride = jax.eval_shape(decode, latents[:, : sides[0], : sides[1]]).shape[1] // sides[0]
    fades = [_fade(side * stride) for side in sides]
    window = jnp.asarray(fades[0][:, None, None] * fades[1][None, :, None])
    total = np.ones((1, 1), np.float32)
    for axis, (length, side) in enumerate(zip(latents.shape[1:3], sides, strict=True)):
        sums = np.zeros(length * stride, np.float32)
        for start in starts[axis]:
            sums[start * stride : (start + side) * stride] += fades[axis]
        total = total * (sums[:, None] if axis == 0 else sums[None])

    def add(image: Array, corner: Int[Array, "2"]) -> tuple[Array, None]:
        part = decode(jax.lax.dynamic_slice(latents, (0, *corner, 0), (batch, *sides, channels))) * window
        first = (0, *(corner * stride), 0)
        there = jax.lax.dynamic_slice(image, first, part.shape)
        return jax.lax.dynamic_update_slice(image, there + part, first), None

    corners = jnp.asarray([(top, left) for top in starts[0] for left in starts[1]], jnp.int32)
    image = jnp.zeros((batch, *(stride * side for side in latents.shape[1:3]), 3), jnp.float32)
    image, _ = jax.lax.scan(add, image, corners)
    return image / jnp.asarray(total)[None, :, :, None]


def _starts(length: int, side: int) -> list[int]:
    """Where tiles of a side begin along a length, evenly spaced."""
    free = side - side // OVERLAP
    count = -(-(length - side) // free) + 1
    return [round(first) for first in np.linspace(0, length - side, count)]


def _fade(size: int) -> Float[np.ndarray, " size"]:
    """1 in a tile's middle, less towards both ends."""
    near = np.minimum(np.arange(size) + 1, size - np.arange(size))
    return np.minimum(near / max(1, size // OVERLAP), 1).astype(np.float32)
