"""Attention of bfloat16 on CPUs that multiply it, in C++ (`flash_bf16.cc`; cpu.py builds it), with its gradients.

The softmax is float32. `benchmarks/attention.py` compares it with the other kernels.

Axes: b batch, h heads, n queries, m keys, d head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels import cpu

# Around this many products the kernel is about as fast as XLA's (tens of microseconds on two cores of a Xeon).
MIN_PRODUCTS = 1 << 18


def supports(queries: tuple[int, ...], keys: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernel runs queries [b, n, h, d] on keys [b, m, h, d] here, and is worth it. It takes bfloat16."""
    (b, n, h, d), m = queries, keys[1]
    worth_it = d <= 256 and b * n * h * d * m >= MIN_PRODUCTS
    return dtype == jnp.bfloat16 and worth_it and cpu.is_used() and cpu.has_bf16()


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """`plain.attention`."""
    if key_bits is None:
        query_bits = key_bits = jnp.zeros((q.shape[0], 0), jnp.uint32)
    return _flash(q, k, v, query_bits, key_bits)


@jax.custom_vjp
def _flash(q, k, v, query_bits, key_bits) -> Float[Array, "b n h d"]:
    return _call(q, k, v, query_bits, key_bits)[0]


def _call(q, k, v, query_bits, key_bits) -> tuple[Float[Array, "b n h d"], Float[Array, "b h n 2"]]:
    """The result, and how each query's softmax was scaled: its highest logit and 1 / the sum."""
    b, n, h, _ = q.shape
    shapes = [jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, n, 2), jnp.float32)]
    return cpu.call("instdiff_bf16_attention", shapes, q, k, v, query_bits, key_bits)


def _flash_forward(*given):
    out, scaled = _call(*given)
    return out, (*given, scaled)


def _flash_backward(given, gradient):
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in given[:3]]
    return *cpu.call("instdiff_bf16_attention_gradient", shapes, *given, gradient), None, None


_flash.defvjp(_flash_forward, _flash_backward)
