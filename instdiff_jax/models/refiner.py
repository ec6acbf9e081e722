"""Stable Diffusion XL's refiner: its UNet and its text encoder, from the same blocks as Stable Diffusion 1.5's.

Podell et al. 2023, sections 2.2 and 2.5. The UNet has several transformer layers per block, and is also told the
picture's size, its crop and an aesthetic score (as Fourier features, beside the pooled text). The text encoder is
OpenCLIP's ViT-bigG: the UNet reads its last but one layer.

Axes: b batch, h height, w width, c channels, z latent channels, m text tokens, e their width, t width of the time
embedding, k numbers about the picture.
"""

import dataclasses
from typing import TypedDict

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdiff_jax.config import AutoencoderConfig, ScheduleConfig, TextEncoderConfig
from instdiff_jax.models.attention import Attention, KeyValue
from instdiff_jax.models.blocks import ResBlock
from instdiff_jax.models.clip_text import Layer
from instdiff_jax.models.layers import GEGLU, Conv, Dense, GroupNorm, LayerNorm, timestep_embedding, upsample_nearest

NUMBERS = 5  # height and width, the crop's top and left, the aesthetic score
NUMBER_WIDTH = 256  # Fourier features of each


@dataclasses.dataclass(frozen=True)
class RefinerConfig:
    """Sizes of the refiner; the defaults are those of the released one. `attention_levels` count from the latents."""

    model_channels: int = 384
    channel_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    attention_levels: tuple[int, ...] = (1, 2)
    depth: int = 4
    head_dim: int = 64
    text_encoder: TextEncoderConfig = TextEncoderConfig(
        hidden_size=1280, intermediate_size=5120, num_layers=32, num_heads=20
    )
    autoencoder: AutoencoderConfig = AutoencoderConfig(scale_factor=0.13025)
    schedule: ScheduleConfig = ScheduleConfig()

    @property
    def canvas_stride(self) -> int:
        """Both sides of an image must be multiples of this many pixels."""
        return 2 ** (len(self.autoencoder.ch_mult) - 1 + len(self.channel_mult) - 1)


class RefinerConditions(TypedDict):
    """What the UNet needs of text and picture: keys and values of each layer, an addition to the time embedding."""

    text: tuple[KeyValue, ...]
    label: Float[Array, "b t"]


class RefinerUNet(nn.Module):
    """Predicts the noise in latents from `condition`'s result, with `__call__`."""

    config: RefinerConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        config = self.config
        width, last = 4 * config.model_channels, len(config.channel_mult) - 1
        self.time_in, self.time_out, self.label_in, self.label_out = (Dense(width, dtype=self.dtype) for _ in range(4))
        self.conv_in = Conv(config.model_channels, (3, 3), dtype=self.dtype)
        blocks = config.num_res_blocks
        self.down = [self._blocks("down", level, blocks) for level in range(last + 1)]
        self.downsample = [
            Conv(self._channels(i), (3, 3), strides=2, padding=((1, 1), (1, 1)), dtype=self.dtype) for i in range(last)
        ]
        self.mid_res_0, self.mid_res_1 = (ResBlock(self._channels(last), self.dtype) for _ in range(2))
        self.mid_attn = self._transformer(last)
        self.up = [self._blocks("up", level, blocks + 1) for level in range(last + 1)]
        self.upsample = [Conv(self._channels(i + 1), (3, 3), dtype=self.dtype) for i in range(last)]
        self.norm_out = GroupNorm(dtype=self.dtype)
        self.conv_out = Conv(config.autoencoder.z_channels, (3, 3), dtype=self.dtype)

    def _channels(self, level: int) -> int:
        return self.config.channel_mult[level] * self.config.model_channels

    def _blocks(self, side: str, level: int, count: int) -> list[tuple[ResBlock, "_Transformer | None"]]:
        attends = level in self.config.attention_levels
        return [
            (
                ResBlock(self._channels(level), self.dtype, name=f"{side}_{level}_res_{i}"),
                self._transformer(level, f"{side}_{level}_attn_{i}") if attends else None,
            )
            for i in range(count)
        ]

    def _transformer(self, level: int, name: str | None = None) -> "_Transformer":
        channels = self._channels(level)
        return _Transformer(channels, channels // self.config.head_dim, self.config.depth, self.dtype, name=name)

    def condition(
        self, context: Float[Array, "b m e"], pooled: Float[Array, "b e"], numbers: Float[Array, "b k"]
    ) -> RefinerConditions:
        """What does not depend on the step.

        Args:
            context: states of the text encoder's last but one layer.
            pooled: its projected state.
            numbers: about the picture, see `NUMBERS`.
        """
        down, up = (
            [transformer for level in levels for _, transformer in level if transformer is not None]
            for levels in (self.down, self.up[::-1])
        )
        context = context.astype(self.dtype)
        text = tuple(pair for block in (*down, self.mid_attn, *up) for pair in block.condition(context))
        features = timestep_embedding(numbers.reshape(-1), NUMBER_WIDTH).reshape(len(numbers), -1)
        vector = jnp.concatenate([pooled.astype(jnp.float32), features], axis=-1).astype(self.dtype)
        return RefinerConditions(text=text, label=self.label_out(nn.silu(self.label_in(vector))))

    def __call__(
        self,
        latents: Float[Array, "b h w z"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        conditions: RefinerConditions,
        alpha: None = None,
    ) -> Float[Array, "b h w z"]:
        """Predicts ε, in float32. `alpha` is there because the denoising loop passes it: there are no fusers."""
        time = timestep_embedding(timesteps, self.config.model_channels).astype(self.dtype)
        time = nn.silu(self.time_out(nn.silu(self.time_in(time))) + conditions["label"])
        text = iter(conditions["text"])
        x = self.conv_in(latents.astype(self.dtype))
        skips = [x]
        for level, blocks in enumerate(self.down):
            for res, transformer in blocks:
                x = res(x, time)
                x = x if transformer is None else transformer(x, text)
                skips.append(x)
            if level < len(self.downsample):
                x = self.downsample[level](x)
                skips.append(x)
        x = self.mid_res_1(self.mid_attn(self.mid_res_0(x, time), text), time)
        for level, blocks in reversed(list(enumerate(self.up))):
            for res, transformer in blocks:
                x = res(jnp.concatenate([x, skips.pop()], axis=-1), time)
                x = x if transformer is None else transformer(x, text)
            if level > 0:
                x = self.upsample[level - 1](upsample_nearest(x))
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)


class _Transformer(nn.Module):
    """Several transformer layers over the visual tokens: self-attention, cross-attention, feed-forward."""

    channels: int
    num_heads: int
    depth: int
    dtype: jnp.dtype

    def setup(self):
        self.norm = GroupNorm(eps=1e-6, dtype=self.dtype)
        self.proj_in, self.proj_out = (Dense(self.channels, dtype=self.dtype) for _ in range(2))
        self.layers = [_TransformerLayer(self.channels, self.num_heads, self.dtype) for _ in range(self.depth)]

    def condition(self, context: Float[Array, "b m e"]) -> list[KeyValue]:
        """Keys and values of the text, for each layer."""
        return [layer.cross_attn.key_value(context) for layer in self.layers]

    def __call__(self, x: Float[Array, "b h w c"], text) -> Float[Array, "b h w c"]:
        y = self.proj_in(self.norm(x)).reshape(x.shape[0], -1, self.channels)
        for layer in self.layers:
            y = layer(y, next(text))
        return x + self.proj_out(y.reshape(x.shape))


class _TransformerLayer(nn.Module):
    channels: int
    num_heads: int
    dtype: jnp.dtype

    def setup(self):
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dtype=self.dtype) for _ in range(3))
        self.self_attn, self.cross_attn = (Attention(self.channels, self.num_heads, self.dtype) for _ in range(2))
        self.ff = GEGLU(self.channels, self.dtype)

    def __call__(self, y: Float[Array, "b n c"], text: KeyValue) -> Float[Array, "b n c"]:
        z = self.norm1(y)
        y = y + self.self_attn(z, self.self_attn.key_value(z))
        y = y + self.cross_attn(self.norm2(y), text)
        return y + self.ff(self.norm3(y))


class RefinerText(nn.Module):
    """OpenCLIP's text encoder: the states of the last but one layer, and the projected state at the end token."""

    config: TextEncoderConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, ids: Int[Array, "b m"]) -> tuple[Float[Array, "b m e"], Float[Array, "b e"]]:
        """Encodes rows of token ids; the end token has the highest id, and what follows it is not looked at."""
        config = self.config
        x = nn.Embed(config.vocab_size, config.hidden_size, name="token_embedding", dtype=self.dtype)(ids)
        positions = nn.Embed(config.max_length, config.hidden_size, name="position_embedding", dtype=self.dtype)
        x = x + positions(jnp.arange(ids.shape[1])[None])
        before = x
        for i in range(config.num_layers):
            before, x = (
                x,
                Layer(config.num_heads, config.intermediate_size, exact=True, name=f"layer_{i}", dtype=self.dtype)(x),
            )
        end = jnp.argmax(ids, axis=1)[:, None, None]
        pooled = jnp.take_along_axis(LayerNorm(name="final_norm", dtype=self.dtype)(x), end, axis=1)[:, 0]
        return before, Dense(config.hidden_size, use_bias=False, name="projection", dtype=self.dtype)(pooled)
