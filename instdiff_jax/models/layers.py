"""Small layers that several networks share.

Axes: b batch, h height, w width, c channels, g groups.
"""

import functools
import inspect
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from instdiff_jax.config import GROUPS
from instdiff_jax.models.kernels import product_bf16, product_cpu

# What recomputation of blocks keeps: it costs much time and little memory.
KEPT = "kept"
kept = functools.partial(checkpoint_name, name=KEPT)

# On CPUs, small 3x3 convolutions are faster as matrix products. Two cores of a Zen 3: 11.5 ms instead of 23.9 for
# 16 x 16² x 64 channels forward and backward; 74 ms instead of 140 for 2 x 8² x 1280 forward.
# Up to this many pixels in the batch: one product over all nine gathered neighbours.
_GATHERED = 512
# Up to this many pixels and this many channels: nine products, one per neighbour.
_SHIFTED, _NARROW = 8192, 128

# On CPUs a feed-forward on many tokens is faster on so many at a time: its activations, eight times as wide as x,
# stay in the cache. Two cores of a Xeon: 129 ms instead of 231 for 8192 x 320, 128 instead of 159 for 2048 x 640.
_TOKENS, _LARGE = 512, 1 << 20


def platform() -> str:
    """The platform that the traced program will run on: that of the current mesh, else this process's default.

    They differ if a program is compiled ahead of time for another machine.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


def _convolve(
    x: Float[Array, "b h w in"], kernel: Float[Array, "k k _ out"], strides, padding, *args, **kwargs
) -> Float[Array, "b h2 w2 out"]:
    """`jax.lax.conv_general_dilated`; on CPUs by our own kernel or as matrix products where that is faster."""
    (b, h, w, c), (step, *others) = x.shape, strides
    rows, same = x.size // c, kernel.shape[:3] == (3, 3, c) and others == [step]
    same &= padding in ("SAME", [(1, 1), (1, 1)]) if step == 1 else padding == [(1, 1), (1, 1)]
    if not (same and platform() == "cpu") or h % step or w % step:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, *args, **kwargs)
    if product_cpu.supports(rows // step**2, kernel, x.dtype):
        return product_cpu.convolution(x, kernel, step)
    narrow = max(kernel.shape[2:]) <= _NARROW
    if product_cpu.is_faster():
        small = rows <= _GATHERED and not narrow  # there XLA's own narrow ones take 0.6 to 0.7 of the products' time
    else:
        small = rows <= _GATHERED or (rows <= _SHIFTED and narrow)
    if not small or step != 1:
        return jax.lax.conv_general_dilated(x, kernel, strides, padding, *args, **kwargs)
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    near = [padded[:, i : i + h, j : j + w].reshape(rows, c) for i in range(3) for j in range(3)]
    if rows <= _GATHERED:
        y = jnp.concatenate(near, axis=1) @ kernel.reshape(9 * c, -1)
    else:
        y = sum(part @ weights for part, weights in zip(near, kernel.reshape(9, c, -1), strict=True))
    return y.reshape(b, h, w, -1)


def _multiply(x: Float[Array, "*n in"], kernel: Float[Array, "in out"], *args, **kwargs) -> Float[Array, "*n out"]:
    """`jax.lax.dot_general`; on CPUs by our own kernel where that is faster."""
    if platform() == "cpu" and product_cpu.supports(x.size // x.shape[-1], kernel, x.dtype):
        return product_cpu.product(x, kernel)
    return jax.lax.dot_general(x, kernel, *args, **kwargs)


# Flax's layers without what it wraps methods in: to whoever records calls, each layer is one.
_flax_dense, _flax_conv = inspect.unwrap(nn.Dense.__call__), inspect.unwrap(nn.Conv.__call__)


class Dense(nn.Dense):
    """`nn.Dense`, faster on CPUs."""

    dot_general: Callable[..., Array] = _multiply

    @nn.compact
    def __call__(self, x: Float[Array, "*n in"]) -> Float[Array, "*n {self.features}"]:
        shape = (x.shape[-1], self.features)
        if not _takes_bf16(x, shape, self.dtype):
            return _flax_dense(self, x)
        return product_bf16.product(x, *_parameters(self, shape))


class Conv(nn.Conv):
    """`nn.Conv`, faster on CPUs."""

    conv_general_dilated: Callable[..., Array] = _convolve

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h2 w2 {self.features}"]:
        shape = (*self.kernel_size, x.shape[-1], self.features)
        step = self.strides if isinstance(self.strides, int) else 1
        padding = ("SAME", ((1, 1), (1, 1))) if step == 1 else (((1, 1), (1, 1)),)
        same = self.kernel_size == (3, 3) and self.strides in (step, None) and self.padding in padding
        same &= x.ndim == 4 and not (x.shape[1] % step or x.shape[2] % step)
        same &= self.feature_group_count == self.kernel_dilation == self.input_dilation == 1
        if not (same and _takes_bf16(x, shape, self.dtype)):
            return _flax_conv(self, x)
        return product_bf16.convolution(x, *_parameters(self, shape), step)


def _takes_bf16(x: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    return platform() == "cpu" and product_bf16.supports(x.size // x.shape[-1], shape, dtype)


def _parameters(layer: Dense | Conv, shape: tuple[int, ...]) -> tuple[Array, Array]:
    """Weights and bias as flax's own layers have them."""
    weights = layer.param("kernel", layer.kernel_init, shape, layer.param_dtype)
    if not layer.use_bias:
        return weights, jnp.zeros(shape[-1])
    return weights, layer.param("bias", layer.bias_init, shape[-1:], layer.param_dtype)


def _centre(x: Float[Array, "*b"], mean_of: Callable[[Array], Array]) -> tuple[Array, Array]:
    """x minus its mean, and its variance; `mean_of` keeps the axes."""
    mean = mean_of(x)
    centred = x - mean
    if platform() != "tpu":
        return centred, mean_of(jnp.square(centred))
    # One pass: both sums join the product or convolution that makes x. Rounding costs a relative error of about
    # (mean² / variance) · 2⁻²⁴, far below that of x in bfloat16.
    return centred, jnp.maximum(mean_of(jnp.square(x)) - jnp.square(mean), 0)


class GroupNorm(nn.Module):
    """Group normalisation over 32 groups; statistics in float32 whatever `dtype` is."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b *space c"]) -> Float[Array, "b *space c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        # Reduce over space first, then over a group's channels: channels stay the minor axis of all large arrays.
        flat = x.astype(jnp.float32).reshape(x.shape[0], -1, channels)
        centred, variance = _centre(flat, lambda x: _group_mean(x.mean(axis=1))[:, None])
        factor = jax.lax.rsqrt(variance + self.eps) * scale.astype(jnp.float32)
        return (centred * factor + bias.astype(jnp.float32)).reshape(x.shape).astype(self.dtype)


def _group_mean(x: Float[Array, "b c"]) -> Float[Array, "b c"]:
    """Replaces each channel's value by its group's mean."""
    groups = x.reshape(x.shape[0], GROUPS, -1)
    return jnp.broadcast_to(groups.mean(axis=2, keepdims=True), groups.shape).reshape(x.shape)


class LayerNorm(nn.Module):
    """Layer normalisation over channels; statistics in float32 whatever `dtype` is."""

    eps: float = 1e-5
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "*b c"]) -> Float[Array, "*b c"]:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        centred, variance = _centre(x.astype(jnp.float32), lambda x: x.mean(-1, keepdims=True))
        y = centred * jax.lax.rsqrt(variance + self.eps)
        return (y * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(self.dtype)


class GEGLU(nn.Module):
    """Feed-forward W·(value · GELU(gate)), four times as wide inside; the exact (erf) GELU."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        layers = {
            "in": Dense(8 * self.channels, name="in", dtype=self.dtype),
            "out": Dense(self.channels, name="out", dtype=self.dtype),
        }
        if self.is_initializing() or not feeds_in_parts(x.shape):
            return _feed(x, **layers)
        # Flax's bound layers may not be called inside of jax's loops.
        params = self.variables["params"]
        alone = {
            name: functools.partial(layer.clone(parent=None, name=None).apply, {"params": params[name]})
            for name, layer in layers.items()
        }
        parts = x.reshape(-1, _TOKENS, x.shape[-1])
        return jax.lax.map(lambda part: _feed(part, **alone), parts).reshape(*x.shape[:-1], self.channels)


def _feed(x: Float[Array, "*b c"], **layers: Callable[[Array], Array]) -> Float[Array, "*b c"]:
    value, gate = jnp.split(layers["in"](x), 2, axis=-1)
    return layers["out"](value * gelu(gate))


def feeds_in_parts(shape: tuple[int, ...]) -> bool:
    """Whether GEGLU takes x of this shape [b, n, c] in parts of some tokens: see `_TOKENS`."""
    b, n, c = shape
    return platform() == "cpu" and b * n * c >= _LARGE and b * n % _TOKENS == 0


def gelu(x: Float[Array, "*b"]) -> Float[Array, "*b"]:
    """The exact GELU as in PyTorch, with erf; jax's erfc is twice the work. In float32, where erf(x) is close to −1."""
    wide = x.astype(jnp.float32)
    return (0.5 * wide * (1 + jax.lax.erf(wide * np.float32(np.sqrt(0.5))))).astype(x.dtype)


def timestep_embedding(timesteps: Int[Array, " b"] | Float[Array, " b"], dim: int) -> Float[Array, "b {dim}"]:
    """[cos ‖ sin] of t·exp(−ln(10000)·i/(dim/2)), float32 (DDPM, as in the official code)."""
    half = dim // 2
    # Exponents in float32, as in PyTorch. Exponentials are rounded on the host, so that they are equal on every
    # platform: an error of one unit in the last place becomes a thousand units in an angle.
    exponents = np.float32(-np.log(10000.0)) * np.arange(half, dtype=np.float32) / np.float32(half)
    frequencies = np.exp(exponents.astype(np.float64)).astype(np.float32)
    angles = timesteps.astype(jnp.float32)[:, None] * frequencies[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


def upsample_nearest(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    """Doubles both sides by repeating pixels."""
    b, h, w, c = x.shape
    x = jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c))
    return x.reshape(b, 2 * h, 2 * w, c)
