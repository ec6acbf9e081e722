"""Attention over chunks of queries: the [n, m] array of all logits never exists. Runs everywhere, with a gradient.

Axes: b batch, h heads, n queries, m keys, d head width.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels.plain import attend
from instdiff_jax.models.layers import platform
from instdiff_jax.models.regions import visible

# Logits held at a time. On a CPU few enough for its cache.
MAX_LOGITS = {"cpu": 1 << 22, "gpu": 1 << 28, "tpu": 1 << 27}
# With fewer queries at a time the matrix products are too thin to be fast.
MIN_CHUNK = 64


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
    max_logits: int | None = None,
) -> Float[Array, "b n h d"]:
    """`plain.attention` with at most about `max_logits` logits at a time; by default what suits the platform."""
    if max_logits is None:
        max_logits = MAX_LOGITS.get(platform(), 1 << 27)
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    return jnp.swapaxes(_attention(max_logits, q, k, v, query_bits, key_bits), 1, 2)


def _attention(max_logits: int, q, k, v, query_bits, key_bits) -> Float[Array, "b h n d"]:
    b, h, n, _ = q.shape
    m = k.shape[2]
    if b > 1 and MIN_CHUNK * b * h * m > max_logits:
        # Too many logits even for a few queries: one row of the batch at a time.
        rows = tuple(None if x is None else x[:, None] for x in (q, k, v, query_bits, key_bits))
        return jax.lax.map(lambda row: _attention(max_logits, *row), rows)[:, 0]
    size = max(MIN_CHUNK, max_logits // (b * h * m))
    if size >= n:
        return attend(q, k, v, None if key_bits is None else visible(query_bits, key_bits))
    chunks = -(-n // size)
    size = -(-n // chunks)  # even chunks: fewer padded queries
    padding = chunks * size - n
    q = jnp.pad(q, ((0, 0), (0, 0), (0, padding), (0, 0)))
    if query_bits is not None:
        query_bits = jnp.pad(query_bits, ((0, 0), (0, padding)))
    chunk = functools.partial(_chunk, size, q, k, v, query_bits, key_bits)
    # The backward pass recomputes a chunk's logits instead of keeping them.
    out = jax.lax.map(jax.checkpoint(chunk), jnp.arange(0, chunks * size, size))
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape)[:, :, :n]


def _chunk(size: int, q, k, v, query_bits, key_bits, start) -> Float[Array, "b h {size} d"]:
    """Attention of the `size` queries from `start` on."""
    mask = None
    if key_bits is not None:
        mask = visible(jax.lax.dynamic_slice_in_dim(query_bits, start, size, axis=1), key_bits, start)
    return attend(jax.lax.dynamic_slice_in_dim(q, start, size, axis=2), k, v, mask)
