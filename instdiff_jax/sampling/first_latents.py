"""What a batch of images starts from: noise, or an image."""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from instdiff_jax.diffusion.loop import Inpaint
from instdiff_jax.sampling.request import ImageRequest, Request
from instdiff_jax.sampling.start import any_in_cell, initial_noise


def start_latents(
    request: Request, batch: Sequence[ImageRequest], encode: Callable[[np.ndarray], Array]
) -> tuple[Float[Array, "b h w z"], Inpaint | None]:
    """Where each image of a batch starts, and the region to keep; `encode` turns an image to latents."""
    shape, given = request.latent_shape(batch[0].canvas), request.options.noise
    indices = [image.seed_index for image in batch]
    drawn = {i: initial_noise(request.seeds[i], shape) if given is None else given[i] for i in set(indices)}
    noise = jnp.asarray(np.stack([drawn[i] for i in indices]), jnp.float32)
    if request.start is None:
        return noise, None
    known = jnp.broadcast_to(encode(request.start.image), noise.shape)
    first, inpaint = noise, None
    if not request.from_noise:
        signal, sigma = request.plan.table.first_roots
        first = signal * known + sigma * noise
    if request.start.repaint is not None:
        paint = any_in_cell(request.start.repaint, request.config.latent_stride).astype(np.float32)
        keep = jnp.broadcast_to(1.0 - paint[None, :, :, None], (*noise.shape[:3], 1))
        inpaint = Inpaint(known, keep, noise)
    return first, inpaint
