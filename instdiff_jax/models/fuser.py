"""The fuser: how grounding tokens enter the UNet (paper, "UniFusion": fusion; GLIGEN's gated self-attention).

    x ← x + α · tanh(a) · SelfAttention(LN([x ; W·g]))[:n]
    x ← x + α · tanh(d) · FeedForward(LN(x))

x are the n visual tokens of a transformer block, g the grounding tokens from UniFusion, a and d learned scalars that
begin at 0. α is on for the first part of the steps only. Only visual tokens are queried, and LN acts on each token
alone. So the grounding tokens' keys and values do not depend on x, and `condition` computes them once per image.

Axes: b batch, n visual tokens, m grounding tokens, c channels, e width of the grounding tokens.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.attention import Attention, KeyValue
from instdiff_jax.models.layers import GEGLU, Dense, LayerNorm
from instdiff_jax.models.regions import Regions


class Fuser(nn.Module):
    """Gated self-attention over visual and grounding tokens, and a gated feed-forward."""

    channels: int
    num_heads: int
    dtype: jnp.dtype

    def setup(self):
        self.proj = Dense(self.channels, dtype=self.dtype)
        self.norm1, self.norm2 = LayerNorm(dtype=self.dtype), LayerNorm(dtype=self.dtype)
        self.attn = Attention(self.channels, self.num_heads, self.dtype)
        self.ff = GEGLU(self.channels, self.dtype)
        # Zero at the start of training: the fuser then changes nothing.
        self.gate_attn = self.param("gate_attn", nn.initializers.zeros, ())
        self.gate_ff = self.param("gate_ff", nn.initializers.zeros, ())

    def condition(self, tokens: Float[Array, "b m e"]) -> KeyValue:
        """Keys and values of the grounding tokens."""
        return self.attn.key_value(self.norm1(self.proj(tokens)))

    def __call__(
        self,
        x: Float[Array, "b n c"],
        grounding: KeyValue,
        alpha: Float[Array, ""] | float,
        regions: Regions | None = None,
    ) -> Float[Array, "b n c"]:
        """Visual tokens that have seen the grounding tokens; `regions` masks the attention."""
        y = self.norm1(x)
        visual = self.attn.key_value(y)
        both = KeyValue(
            k=jnp.concatenate([visual["k"], grounding["k"]], axis=1),
            v=jnp.concatenate([visual["v"], grounding["v"]], axis=1),
        )
        x = x + self._scale(alpha, self.gate_attn) * self.attn(y, both, regions)
        return x + self._scale(alpha, self.gate_ff) * self.ff(self.norm2(x))

    def _scale(self, alpha, gate: Float[Array, ""]) -> Float[Array, ""]:
        return (alpha * jnp.tanh(gate.astype(jnp.float32))).astype(self.dtype)
