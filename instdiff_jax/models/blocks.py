"""The two kinds of blocks that the UNet is made of.

Axes: b batch, h height, w width, c channels, n = h·w visual tokens, t width of the time embedding, e other widths.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.attention import Attention, KeyValue
from instdiff_jax.models.fuser import Fuser
from instdiff_jax.models.layers import GEGLU, Conv, Dense, GroupNorm, LayerNorm, kept
from instdiff_jax.models.regions import Regions


class ResBlock(nn.Module):
    """Two convolutions with the timestep added in between, and a shortcut."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w e"], time: Float[Array, "b t"]) -> Float[Array, "b h w c"]:
        y = nn.silu(GroupNorm(name="norm1", dtype=self.dtype)(x))
        y = Conv(self.channels, (3, 3), name="conv1", dtype=self.dtype)(y)
        y = kept(y)
        y = y + Dense(self.channels, name="time_proj", dtype=self.dtype)(time)[:, None, None, :]
        y = nn.silu(GroupNorm(name="norm2", dtype=self.dtype)(y))
        y = Conv(self.channels, (3, 3), name="conv2", dtype=self.dtype)(y)
        if x.shape[-1] != self.channels:
            x = Dense(self.channels, name="skip", dtype=self.dtype)(x)
        return x + y


class Transformer(nn.Module):
    """One transformer block over the visual tokens: self-attention, fuser, cross-attention, feed-forward.

    Attributes:
        masked: whether its fuser obeys regions.
    """

    channels: int
    num_heads: int
    masked: bool
    dtype: jnp.dtype

    def setup(self):
        self.norm = GroupNorm(eps=1e-6, dtype=self.dtype)
        self.proj_in = Dense(self.channels, dtype=self.dtype)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dtype=self.dtype) for _ in range(3))
        self.self_attn = Attention(self.channels, self.num_heads, self.dtype)
        self.fuser = Fuser(self.channels, self.num_heads, self.dtype)
        self.cross_attn = Attention(self.channels, self.num_heads, self.dtype)
        self.ff = GEGLU(self.channels, self.dtype)
        self.proj_out = Dense(self.channels, dtype=self.dtype)

    def condition(
        self, context: Float[Array, "b m e"], tokens: Float[Array, "b k e"] | None
    ) -> tuple[KeyValue, KeyValue | None]:
        """Keys and values of the text, and of the grounding tokens if there are any."""
        return self.cross_attn.key_value(context), None if tokens is None else self.fuser.condition(tokens)

    def __call__(
        self,
        x: Float[Array, "b h w c"],
        text: KeyValue,
        grounding: KeyValue | None,
        alpha: Float[Array, ""] | float | None,
        regions: Regions | None,
    ) -> Float[Array, "b h w c"]:
        y = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, self.channels)
        z = self.norm1(y)
        y = y + self.self_attn(z, self.self_attn.key_value(z))
        if alpha is not None:
            y = self.fuser(y, grounding, alpha, regions if self.masked else None)
        y = y + self.cross_attn(self.norm2(y), text)
        y = y + self.ff(self.norm3(y))
        return x + self.proj_out(y.reshape(x.shape))
