"""ScaleU: learned rescaling of the decoder's features (paper section 3.2)."""

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float


def low_frequency_basis(height: int, width: int) -> Float[np.ndarray, "k h*w"]:
    """Orthonormal-up-to-1/(h·w) rows that span the DFT bins {−1, 0} × {−1, 0}.

    The real part of those bins' inverse transform is basisᵀ·basis·x / (h·w). Where a side is 1 the
    frequencies −1 and 0 coincide there, and each distinct bin is taken once.
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
    """Multiplies the four low-frequency DFT bins of each channel by `scale`: no FFT, a map of rank 7.

    The official code scales the asymmetric bins {−1, 0}² and keeps the real part; so does this.
    """
    _, h, w, _ = x.shape
    basis = jnp.asarray(low_frequency_basis(h, w))
    flat = x.reshape(x.shape[0], h * w, x.shape[-1]).astype(jnp.float32)
    coefficients = jnp.einsum("kn,bnc->bkc", basis, flat) * ((scale - 1) / (h * w))
    return x + jnp.einsum("kn,bkc->bnc", basis, coefficients).reshape(x.shape).astype(x.dtype)


class ScaleU(nn.Module):
    """Backbone features × (tanh(b)+1) per channel; the skip's low frequencies × (tanh(s)+1)."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(
        self, backbone: Float[Array, "b h w c"], skip: Float[Array, "b h w e"]
    ) -> tuple[Float[Array, "b h w c"], Float[Array, "b h w e"]]:
        b = self.param("b", nn.initializers.zeros, (backbone.shape[-1],), self.param_dtype)
        s = self.param("s", nn.initializers.zeros, (1,), self.param_dtype)
        backbone = backbone * (jnp.tanh(b.astype(jnp.float32)) + 1).astype(self.dtype)
        return backbone, scale_low_frequencies(skip, jnp.tanh(s.astype(jnp.float32)) + 1)
