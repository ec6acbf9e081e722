"""Small layers that several networks share.

Axes: b batch, h height, w width, c channels, g groups.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

GROUPS = 32


class GroupNorm(nn.Module):
    """Group normalisation over 32 groups; statistics in float32 whatever `dtype` is."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (channels,), self.param_dtype)
        # Reduced over space first, then over a group's few channels: channels stay the minor axis of every large array.
        flat = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        centred = flat - _group_mean(flat.mean(axis=1))[:, None]
        variance = _group_mean(jnp.square(centred).mean(axis=1))
        factor = jax.lax.rsqrt(variance + self.eps) * scale.astype(jnp.float32)
        return (centred * factor[:, None] + bias.astype(jnp.float32)).reshape(x.shape).astype(self.dtype)


def _group_mean(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Each channel's value becomes its group's mean."""
    groups = x.reshape(x.shape[0], GROUPS, -1)
    return jnp.broadcast_to(groups.mean(axis=2, keepdims=True), groups.shape).reshape(x.shape)


class LayerNorm(nn.Module):
    """Layer normalisation over channels; statistics in float32 whatever `dtype` is."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],), self.param_dtype)
        x = x.astype(jnp.float32)
        centred = x - x.mean(-1, keepdims=True)
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


def timestep_embedding(timesteps: Int[Array, " b"] | Float[Array, " b"], dim: int) -> Float[Array, "b {dim}"]:
    """[cos ‖ sin] of t·exp(−ln(10000)·i/(dim/2)), float32 (DDPM, as in the official code)."""
    half = dim // 2
    # Exponents in float32, as PyTorch has them; their exponentials correctly rounded on the host, so that
    # every platform has the same ones (a unit in the last place here is a thousand in an angle).
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Doubles both sides by repeating pixels."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
