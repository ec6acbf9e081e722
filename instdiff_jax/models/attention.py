"""Attention layers, and the one place where their kernel is chosen.

Axes: b batch, n queries, m keys, h heads, d head width, c channels, e width of the tokens.
"""

from collections.abc import Callable
from typing import TypedDict

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels import chunked, cudnn, flash_bf16, flash_cpu
from instdiff_jax.models.layers import Dense, platform
from instdiff_jax.models.regions import Regions

# A function of (q, k, v, query_bits, key_bits), as in `kernels/`.
Kernel = Callable[..., Array]


def choose_kernel(
    platform: str, queries: tuple[int, ...], keys: tuple[int, ...], dtype: jnp.dtype, masked: bool
) -> Kernel:
    """The fastest kernel that can run this attention.

    Args:
        platform: "cpu", "gpu" or "tpu".
        queries: shape [b, n, h, d].
        keys: shape [b, m, h, d].
        dtype: of queries, keys and values.
        masked: whether there are region bits.
    """
    if platform == "gpu" and cudnn.supports(queries, dtype):
        return cudnn.attention
    if platform == "tpu":
        from instdiff_jax.models.kernels import flash_tpu  # Pallas, which nothing else needs, takes a while to import

        if flash_tpu.supports(queries, keys, dtype):
            return flash_tpu.attention
    if platform == "cpu" and flash_bf16.supports(queries, keys, dtype):
        return flash_bf16.attention
    if platform == "cpu" and flash_cpu.supports(queries, keys, dtype):
        return flash_cpu.attention
    return chunked.attention


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """softmax(q·kᵀ/√d)·v, the softmax in float32 in every dtype.

    With region bits, query i sees key j where they share a bit or i = j; see `regions.visible`.
    """
    kernel = choose_kernel(platform(), q.shape, k.shape, q.dtype, key_bits is not None)
    return kernel(q, k, v, query_bits, key_bits)


class KeyValue(TypedDict):
    """Keys and values of some tokens for one attention layer."""

    k: Float[Array, "b m h d"]
    v: Float[Array, "b m h d"]


class Attention(nn.Module):
    """Multi-head attention: projections q, k, v without bias, and out.

    Keys and values are an input of `__call__`, so that those of text and grounding are computed once per image.
    """

    channels: int
    num_heads: int
    dtype: jnp.dtype

    def setup(self):
        self.q, self.k, self.v = (Dense(self.channels, use_bias=False, dtype=self.dtype) for _ in range(3))
        self.out = Dense(self.channels, dtype=self.dtype)

    def _split(self, x: Float[Array, "b n c"]) -> Float[Array, "b n h d"]:
        return x.reshape(*x.shape[:-1], self.num_heads, self.channels // self.num_heads)

    def key_value(self, tokens: Float[Array, "b m e"]) -> KeyValue:
        """Keys and values of tokens."""
        return KeyValue(k=self._split(self.k(tokens)), v=self._split(self.v(tokens)))

    def __call__(
        self, x: Float[Array, "b n c"], key_value: KeyValue, regions: Regions | None = None
    ) -> Float[Array, "b n c"]:
        """Attends from x to keys and values; with regions, these are x's own and then the grounding tokens'."""
        query_bits = key_bits = None
        if regions is not None:
            query_bits = regions["visual"]
            key_bits = jnp.concatenate([regions["visual"], regions["tokens"]], axis=1)
        y = attention(self._split(self.q(x)), key_value["k"], key_value["v"], query_bits, key_bits)
        return self.out(y.reshape(x.shape))
