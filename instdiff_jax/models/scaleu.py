"""ScaleU: learned rescaling of features where the UNet's decoder takes in a skip (paper, "ScaleU").

    F_b ← F_b · (tanh(s_b) + 1)                       backbone features, per channel
    F_s ← IFFT( FFT(F_s) ⊙ β ),  β = tanh(s_s) + 1    skip features, at low frequencies (β = 1 elsewhere)

Only four DFT bins are scaled, so the two FFTs become one product with a matrix of rank 7.

Axes: b batch, h height, w width, c channels of the backbone, e channels of the skip, k rows of the basis.
"""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def low_frequency_basis(height: int, width: int) -> Float[np.ndarray, "k {height*width}"]:
    """Cosines and sines of the DFT bins {−1, 0} × {−1, 0}, one row each.

    The part of x in these bins is basisᵀ·basis·x / (h·w). Each distinct bin is taken once: for a side of 1, the
    frequencies −1 and 0 are the same.
    """
    rows = []
    for u in {-1 % height, 0}:
        for v in {-1 % width, 0}:
            phase = 2 * np.pi * (u * np.arange(height)[:, None] / height + v * np.arange(width)[None] / width)
            rows.append(np.cos(phase).ravel())
            if (u, v) != (0, 0):
                rows.append(np.sin(phase).ravel())
    return np.stack(rows).astype(np.float32)


def scale_low_frequencies(
    x: Float[Array, "b h w c"], scale: Float[Array, "1"] | Float[Array, ""]
) -> Float[Array, "b h w c"]:
    """Multiplies the four low-frequency DFT bins of each channel by `scale`.

    Like the official code, it scales the asymmetric bins {−1, 0}² and keeps the real part.
    """
    _, h, w, _ = x.shape
    basis = jnp.asarray(low_frequency_basis(h, w))
    flat = x.reshape(x.shape[0], h * w, x.shape[-1]).astype(jnp.float32)
    coefficients = jnp.einsum("kn,bnc->bkc", basis, flat) * ((scale - 1) / (h * w))
    return x + jnp.einsum("kn,bkc->bnc", basis, coefficients).reshape(x.shape).astype(x.dtype)


class ScaleU(nn.Module):
    """Rescales backbone and skip features; with b = s = 0, as at the start of training, it changes nothing."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, backbone: Float[Array, "b h w c"], skip: Float[Array, "b h w e"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w e"]]:
        b = self.param("b", nn.initializers.zeros, (backbone.shape[-1],))
        s = self.param("s", nn.initializers.zeros, (1,))
        backbone = backbone * (jnp.tanh(b.astype(jnp.float32)) + 1).astype(self.dtype)
        return backbone, scale_low_frequencies(skip, jnp.tanh(s.astype(jnp.float32)) + 1)
