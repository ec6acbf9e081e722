"""Flash attention for CPUs, in C++ (`flash_cpu.cc`; cpu.py builds it).

XLA writes all logits of a chunk to memory and reads them back; here they stay in the first cache. Where the library
is not available, the chunked kernel runs. `benchmarks/attention.py` compares them.

Axes: b batch, h heads, n queries, m keys, d head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels import chunked, cpu

# With fewer products the call takes longer than the work.
MIN_PRODUCTS = 1 << 20


def supports(queries: tuple[int, ...], keys: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernel runs queries [b, n, h, d] on keys [b, m, h, d] here, and is worth it. It takes float32."""
    (b, n, h, d), m = queries, keys[1]
    return d <= 256 and b * n * h * d * m >= MIN_PRODUCTS and dtype == jnp.float32 and cpu.is_used()


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """`plain.attention`; the gradient is the chunked kernel's."""
    if key_bits is None:
        query_bits = key_bits = jnp.zeros((q.shape[0], 0), jnp.uint32)
    return _flash(q, k, v, query_bits, key_bits)


@jax.custom_vjp
def _flash(q, k, v, query_bits, key_bits) -> Float[Array, "b n h d"]:
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return cpu.call("instdiff_flash_attention", out, q, k, v, query_bits, key_bits)


def _flash_forward(*given):
    return _flash(*given), given


def _flash_backward(given, gradient):
    q, k, v, query_bits, key_bits = given
    bits = (query_bits, key_bits) if key_bits.size else (None, None)
    _, pull = jax.vjp(lambda q, k, v: chunked.attention(q, k, v, *bits), q, k, v)
    return *pull(gradient), None, None


_flash.defvjp(_flash_forward, _flash_backward)
