"""Matrix products and convolutions of bfloat16 on CPUs that multiply it, in C++ (`product_bf16.cc`; cpu.py builds it).

Each adds its bias, and its gradients are of the same kind. Sums are float32. `benchmarks/projections.py` compares them.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.kernels import cpu

# Channels that product_bf16.cc has zeros for.
_MOST = 1 << 15


def supports(rows: int, shape: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernels take products of so many rows of this type with weights of this shape here, and are worth it.

    Around this size they are about as fast as XLA's (tens of microseconds on two cores of a Xeon); above, faster.
    """
    *_, width, out = shape
    worth_it = min(width, out) >= 16 and rows * math.prod(shape) >= 1 << 18
    return dtype == jnp.bfloat16 and worth_it and max(width, out) <= _MOST and cpu.is_used() and cpu.has_bf16()


@jax.custom_vjp
def product(
    x: Float[Array, "*n in"], weights: Float[Array, "in out"], bias: Float[Array, " out"]
) -> Float[Array, "*n out"]:
    """x @ weights + bias in bfloat16, whatever the types given; gradients have those types."""
    return _call(x, weights, bias, (*x.shape[:-1], weights.shape[-1]))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def convolution(
    x: Float[Array, "b h w in"], weights: Float[Array, "k k in out"], bias: Float[Array, " out"], step: int
) -> Float[Array, "b h//{step} w//{step} out"]:
    """As `product`: the k×k convolution (k odd) at every `step`-th pixel, with k // 2 zeros around.

    `step` divides h and w.
    """
    b, h, w, _ = x.shape
    return _call(x, weights, bias, (b, h // step, w // step, weights.shape[-1]), step)


def _call(x: Array, weights: Array, bias: Array | None, shape: tuple[int, ...], step: int = 1) -> Array:
    bias = jnp.zeros(shape[-1:]) if bias is None else bias.astype(jnp.float32)
    given = x.astype(jnp.bfloat16), weights.astype(jnp.bfloat16), bias
    return cpu.call("instdiff_bf16_product", jax.ShapeDtypeStruct(shape, jnp.bfloat16), *given, step=step)


def _product_gradients(given: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    x, weights, _ = given
    return _call(g, weights.T, None, x.shape).astype(x.dtype), *_gradients(given, g, 1)


def _convolution_gradients(step: int, given: tuple[Array, ...], g: Array) -> tuple[Array, ...]:
    x, weights, _ = given
    # Pixels that a stride left out had no part in the result.
    dilation = (0, step - 1, step - 1)
    whole = jax.lax.pad(g, jnp.zeros((), g.dtype), ((0, 0, 0), dilation, dilation, (0, 0, 0)))
    of_x = _call(whole, weights[::-1, ::-1].swapaxes(2, 3), None, x.shape).astype(x.dtype)
    return of_x, *_gradients(given, g, step)


def _gradients(given: tuple[Array, ...], g: Array, step: int) -> tuple[Array, Array]:
    """Those of weights and bias."""
    x, weights, bias = given
    shapes = [jax.ShapeDtypeStruct(one.shape, jnp.float32) for one in (weights, bias)]
    pair = x.astype(jnp.bfloat16), g.astype(jnp.bfloat16)
    of_weights, of_bias = cpu.call("instdiff_bf16_gradient", shapes, *pair, step=step)
    return of_weights.astype(weights.dtype), of_bias.astype(bias.dtype)


product.defvjp(lambda *given: (product(*given), given), _product_gradients)
convolution.defvjp(lambda *given: (convolution(*given), given[:3]), _convolution_gradients)
