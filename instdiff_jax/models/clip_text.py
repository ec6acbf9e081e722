"""The CLIP text encoder: gives the UNet's context and the phrase embeddings.

Radford et al. 2021, section 2.4, as in CLIP ViT-L/14: pre-norm transformer, causal attention, quick-GELU.

Axes: b batch, n tokens, c width, h heads, d width of one head; q and k number tokens as queries and as keys.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdiff_jax.config import TextEncoderConfig
from instdiff_jax.models.layers import Dense, LayerNorm, gelu


class CLIPTextEncoder(nn.Module):
    """Maps token ids to the last layer's states and one pooled state per row."""

    config: TextEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b n"]) -> tuple[Float[Array, "b n c"], Float[Array, "b c"]]:
        """Encodes rows of token ids.

        Padding needs no mask: it follows the first end token, and attention is causal.

        Args:
            ids: rows of at most `max_length` ids, each with an end token, which has the highest id of its tokenizer.

        Returns:
            The states after the final LayerNorm, and the state at each row's first end token, neither projected nor
            normalised.

        Raises:
            ValueError: for rows longer than `max_length`.
        """
        config = self.config
        length = ids.shape[1]
        if length > config.max_length:
            raise ValueError(f"ids: expected at most {config.max_length} tokens a row, got {length}")

        def embed(count: int, std: float, name: str) -> nn.Embed:
            init = nn.initializers.normal(std)
            return nn.Embed(count, config.hidden_size, embedding_init=init, name=name, dtype=self.dtype)

        x = embed(config.vocab_size, 0.02, "token_embedding")(ids)
        x = x + embed(config.max_length, 0.01, "position_embedding")(jnp.arange(length)[None])
        for i in range(config.num_layers):
            x = Layer(config.num_heads, config.intermediate_size, name=f"layer_{i}", dtype=self.dtype)(x)
        x = LayerNorm(name="final_norm", dtype=self.dtype)(x)
        # The end token has the highest id of its tokenizer, which may have fewer ids than the embedding.
        first_end = jnp.argmax(ids, axis=1)
        pooled = jnp.take_along_axis(x, first_end[:, None, None], axis=1)[:, 0]
        return x, pooled


class Layer(nn.Module):
    """One transformer layer: x += attention(norm(x)), then x += mlp(norm(x)).

    `exact` takes the exact GELU, as OpenCLIP.
    """

    num_heads: int
    intermediate_size: int
    dtype: jnp.dtype
    exact: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        y = LayerNorm(name="norm1", dtype=self.dtype)(x)
        x = x + _CausalAttention(self.num_heads, name="attn", dtype=self.dtype)(y)
        y = LayerNorm(name="norm2", dtype=self.dtype)(x)
        return x + _Mlp(self.intermediate_size, self.exact, name="mlp", dtype=self.dtype)(y)


class _CausalAttention(nn.Module):
    """Self-attention to the token itself and those before it; softmax in float32."""

    num_heads: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        batch, length, width = x.shape

        def dense(name: str) -> nn.Dense:
            return Dense(width, name=name, dtype=self.dtype)

        q, k, v = (dense(name)(x).reshape(batch, length, self.num_heads, -1) for name in "qkv")
        logits = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
        causal = jnp.tril(jnp.ones((length, length), bool))[None, None]
        weights = jax.nn.softmax(jnp.where(causal, logits, -jnp.inf), axis=-1).astype(self.dtype)
        return dense("out")(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(batch, length, width))


class _Mlp(nn.Module):
    """Linear, quick-GELU or the exact one, linear."""

    intermediate_size: int
    exact: bool
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b n c"]) -> Float[Array, "b n c"]:
        hidden = Dense(self.intermediate_size, name="in", dtype=self.dtype)(x)
        # OpenAI trained CLIP with this approximation of GELU.
        hidden = gelu(hidden) if self.exact else hidden * nn.sigmoid(1.702 * hidden)
        return Dense(x.shape[-1], name="out", dtype=self.dtype)(hidden)
