"""Small layers that several networks share.

Axes: b batch, h height, w width, c channels, g groups.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from instdiff_jax.config import GROUPS

# On CPUs, a 3x3 convolution is a matrix product where that is faster than XLA's own. Two cores of a Zen 3, forward and
# backward, 16 x 16² x 64 channels: 11.5 ms instead of 23.9; forward, 2 x 8² x 1280: 74 ms instead of 140. Over gathered
# neighbours for up to this many pixels of the batch,
_GATHERED = 512
# over one neighbour after the other for up to this many pixels of up to this many channels.
_SHIFTED, _NARROW = 8192, 128


def platform() -> str:
    """Where this will run: on the devices of the mesh it is traced for, else on this process's own.

    A program may be compiled for a machine other than the one that compiles it.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _convolve(
    x: Float[Array, "b h w in"], kernel: Float[Array, "k k in out"], strides, padding, *args, **settings
) -> Float[Array, "b h2 w2 out"]:
    """`jax.lax.conv_general_dilated`, the same sum in another order where `_GATHERED` and `_SHIFTED` say so."""
    rows, (b, h, w, c) = x.size // x.shape[-1], x.shape
    small = rows <= _GATHERED or (rows <= _SHIFTED and max(kernel.shape[2:]) <= _NARROW)
    same = kernel.shape[:3] == (3, 3, c) and tuple(strides) == (1, 1) and padding == "SAME"
    if not (small and same and platform() == "cpu"):
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, *args, **settings)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [padded[:, i : i + h, j : j + w].reshape(rows, c) for i in range(3) for j in range(3)]
    if rows <= _GATHERED:
        y = jnp.concatenate(near, axis=1) @ kernel.reshape(9 * c, -1)
    else:
        y = sum(part @ weights for part, weights in zip(near, kernel.reshape(9, c, -1), strict=True))
    return y.reshape(b, h, w, -1)


# `nn.Conv` with a faster way on CPUs.
Conv = functools.partial(nn.Conv, conv_general_dilated=_convolve)


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
