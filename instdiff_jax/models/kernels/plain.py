"""Attention as in the textbook: the whole array of logits at once. The other kernels are tested against it.

Axes: b batch, h heads, n queries, m keys, d head width.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, UInt32

from instdiff_jax.models.regions import visible


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q·kᵀ/√d)·v, the softmax in float32.

    With region bits, query i sees only the keys that `regions.visible` allows.
    """
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    mask = None if key_bits is None else visible(query_bits, key_bits)
    return jnp.swapaxes(attend(q, k, v, mask), 1, 2)


def attend(
    q: Float[Array, "b h n d"],
    k: Float[Array, "b h m d"],
    v: Float[Array, "b h m d"],
    mask: Bool[Array, "b 1 n m"] | None,
) -> Float[Array, "b h n d"]:
    """The same with heads before tokens and a mask instead of bits."""
    # The scale goes into q: one pass over n·d instead of n·m.
    q = q * jnp.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("bhnd,bhmd->bhnm", q, k, preferred_element_type=jnp.float32)
    if mask is not None:
        logits = jnp.where(mask, logits, jnp.finfo(jnp.float32).min)
    # Normalising after the product with v divides n·d numbers instead of n·m.
    weights = jnp.exp(logits - jax.lax.stop_gradient(logits.max(-1, keepdims=True)))
    total = weights.sum(-1, keepdims=True)
    out = jnp.einsum("bhnm,bhmd->bhnd", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (out / total).astype(v.dtype)
