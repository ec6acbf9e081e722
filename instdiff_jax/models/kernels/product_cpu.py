"""Matrix products and convolutions for CPUs, in C++ (`product_cpu.cc`; cpu.py builds it).

For float32 on Intel's processors with AVX-512, where XLA's own take up to 1.4 times as long as PyTorch's; an AMD EPYC
(Zen 5) has no need of it. Gradients are of XLA's own operations. `benchmarks/projections.py` compares them.
"""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.kernels import cpu

_CONVOLUTION = ("NHWC", "HWIO", "NHWC")


def supports(rows: int, weights: Float[Array, "*k in out"], dtype: jnp.dtype) -> bool:
    """Whether the kernel takes products of so many rows of float32 with these weights here, and is worth it.

    The sizes are those from which it took less time than XLA on one core of a Xeon.
    """
    products = rows * math.prod(weights.shape)
    least = 1 << 23 if weights.ndim == 4 else 1 << 24
    worth_it = rows >= 64 and min(weights.shape[-2:]) >= 128 and products >= least
    return worth_it and dtype == weights.dtype == jnp.float32 and is_faster() and cpu.is_used()


@functools.cache
def is_faster() -> bool:
    """Whether this processor is of the kind that it was written for."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "GenuineIntel" in text and " avx512f " in text


@jax.custom_vjp
def product(x: Float[Array, "*n in"], weights: Float[Array, "in out"]) -> Float[Array, "*n out"]:
    """x @ weights."""
    return _call(x, weights, (*x.shape[:-1], weights.shape[-1]))


def _call(x: Array, weights: Array, shape: tuple[int, ...], step: int = 1) -> Array:
    return cpu.call("instdiff_product", jax.ShapeDtypeStruct(shape, x.dtype), x, weights, step=step)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def convolution(
    x: Float[Array, "b h w in"], weights: Float[Array, "k k in out"], step: int
) -> Float[Array, "b h//{step} w//{step} out"]:
    """The k×k convolution (k odd) at every `step`-th pixel, with k // 2 zeros around; `step` divides h and w."""
    b, h, w, _ = x.shape
    return _call(x, weights, (b, h // step, w // step, weights.shape[-1]), step)


def _xla_convolution(x: Array, weights: Array, step: int) -> Array:
    around = [(weights.shape[0] // 2,) * 2] * 2
    return jax.lax.conv_general_dilated(x, weights, (step, step), around, dimension_numbers=_CONVOLUTION)


product.defvjp(lambda x, w: (product(x, w), (x, w)), lambda given, g: jax.vjp(jnp.matmul, *given)[1](g))
convolution.defvjp(
    lambda x, w, step: (convolution(x, w, step), (x, w)),
    lambda step, given, g: jax.vjp(lambda x, w: _xla_convolution(x, w, step), *given)[1](g),
)
