"""Where sampling starts: a seed's noise, or an image to change or to keep in part."""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, UInt8

from instdiff_jax.errors import InputError


class StartImage(NamedTuple):
    """An image to start from, and where to paint it anew (None: everywhere)."""

    image: UInt8[np.ndarray, "H W 3"]
    repaint: Bool[np.ndarray, "H W"] | None


def initial_noise(seed: int, shape: tuple[int, ...]) -> Float[np.ndarray, "h w z"]:
    """The noise of a seed: made on the host, so that it is bit-equal in any batch, mesh and platform."""
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def check_seed(seed: int) -> int:
    """The seed, or InputError."""
    if not isinstance(seed, (int, np.integer)) or isinstance(seed, bool) or seed < 0:
        raise InputError(f"seed: expected a whole number that is not negative, got {seed!r}")
    return int(seed)


def check_start(image: Any, mask: Any, strength: float | None) -> StartImage | None:
    """What `init_image` and `inpaint_mask` ask for; InputError if they are no pixels, or do not go together."""
    if image is None:
        for name, value in (("inpaint_mask", mask), ("strength", strength)):
            if value is not None:
                raise InputError(f"{name}: expected an init_image with it")
        return None
    image = np.asarray(image)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise InputError(f"init_image: expected uint8 of shape [height, width, 3], got {image.dtype} {image.shape}")
    if mask is None:
        return StartImage(image, None)
    mask = np.asarray(mask)
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise InputError(f"inpaint_mask: expected bool of shape {image.shape[:2]}, got {mask.dtype} {mask.shape}")
    return StartImage(image, mask)


def check_inputs(
    canvas: tuple[int, int], latent_shape: tuple[int, int, int], seeds: int, noise: Any, start: StartImage | None
) -> None:
    """InputError if given noise or images do not fit a canvas of this width and height in pixels."""
    if noise is not None:
        expected = (seeds, *latent_shape)
        if np.shape(noise) != expected or not np.isfinite(noise).all():
            found = "numbers that are not finite" if np.shape(noise) == expected else np.shape(noise)
            raise InputError(f"noise: expected float32 of shape {expected}, got {found}")
    if start is not None and start.image.shape[1::-1] != canvas:
        found = "×".join(map(str, start.image.shape[1::-1]))
        raise InputError(f"init_image: expected {canvas[0]}×{canvas[1]} pixels as the canvas, got {found}")


def any_in_cell(mask: Bool[np.ndarray, "H W"], stride: int) -> Bool[np.ndarray, "h w"]:
    """The mask on the latent grid: a cell is painted if any of its pixels is."""
    height, width = mask.shape
    return mask.reshape(height // stride, stride, width // stride, stride).any(axis=(1, 3))
