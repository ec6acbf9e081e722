"""The UNet of Stable Diffusion 1.5 with fusers and ScaleU.

What does not depend on the step is computed once: `condition` turns text and grounding tokens into keys and values
for every transformer block. `__call__` denoises with them. `deep_features` and `finish` are its two halves, so that a
sampler can reuse the deep half between steps.

Axes: b batch, h height, w width, c channels, z latent channels, m text tokens, k grounding tokens, e their width,
t width of the time embedding.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple, NotRequired, TypedDict

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdiff_jax.config import UNetConfig
from instdiff_jax.models.attention import KeyValue
from instdiff_jax.models.blocks import ResBlock, Transformer
from instdiff_jax.models.layers import KEPT, Conv, Dense, GroupNorm, timestep_embedding, upsample_nearest
from instdiff_jax.models.regions import Regions
from instdiff_jax.models.scaleu import ScaleU
from instdiff_jax.models.unifusion import fourier_features

# Recomputation is of all but what blocks mark as `kept`.
KEEP = jax.checkpoint_policies.save_only_these_names(KEPT)


class Conditions(TypedDict):
    """All that the UNet needs of text and grounding; leaves have a leading batch axis.

    `text` and `grounding` hold the keys and values of every transformer block, in the order of the forward pass.
    `regions` turns on instance-masked attention in the fusers of the highest resolution.
    """

    text: tuple[KeyValue, ...]
    grounding: NotRequired[tuple[KeyValue, ...]]
    regions: NotRequired[Regions]


class Block(NamedTuple):
    """A res block, with a transformer block where its level has attention and ScaleU where it takes in a skip."""

    res: ResBlock
    transformer: Transformer | None = None
    scaleu: ScaleU | None = None


class Level(NamedTuple):
    """The blocks of one resolution, and the convolution that leads to the next one."""

    blocks: Sequence[Block]
    resample: nn.Module | None


class UNet(nn.Module):
    """Predicts the noise in latents from `condition`'s result, with `__call__`.

    Both sides of the latents must be multiples of 2^(levels − 1).

    Args:
        config: sizes.
        dtype: of the computation; parameters are float32.
        remat: recompute every block's inside in the backward pass, but for what is marked as `layers.kept`.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def setup(self):
        config = self.config
        width, last = config.model_channels, len(config.channel_mult) - 1
        self.time_in = Dense(4 * width, dtype=self.dtype)
        self.time_out = Dense(4 * width, dtype=self.dtype)
        self.conv_in = Conv(width, (3, 3), dtype=self.dtype)
        if config.positions:
            # Zeros: a model trained without positions is not changed by them.
            self.position_in = Dense(width, use_bias=False, kernel_init=nn.initializers.zeros, dtype=self.dtype)
        self.down = [self._down_level(level) for level in range(last + 1)]
        self.mid_res_0 = self._res_block("mid_res_0", last)
        self.mid_attn = self._transformer("mid_attn", last, masked=False)
        self.mid_res_1 = self._res_block("mid_res_1", last)
        self.up = [self._up_level(level) for level in range(last, -1, -1)]
        self.norm_out = GroupNorm(dtype=self.dtype)
        self.conv_out = Conv(config.out_channels, (3, 3), dtype=self.dtype)

    # In lists, modules keep the names they are given: these are the names of the parameters.
    def _down_level(self, level: int) -> Level:
        config = self.config
        blocks = [
            Block(self._res_block(f"down_{level}_res_{i}", level), self._attention(f"down_{level}_attn_{i}", level))
            for i in range(config.num_res_blocks)
        ]
        if level == len(config.channel_mult) - 1:
            return Level(blocks, None)
        # PyTorch pads 1 on all sides; "SAME" would pad right and bottom only.
        name, channels, padding = f"down_{level}_downsample", self._channels(level), ((1, 1), (1, 1))
        return Level(blocks, Conv(channels, (3, 3), strides=2, padding=padding, dtype=self.dtype, name=name))

    def _up_level(self, level: int) -> Level:
        config = self.config
        first = (len(config.channel_mult) - 1 - level) * (config.num_res_blocks + 1)
        blocks = [
            Block(
                self._res_block(f"up_{level}_res_{i}", level),
                self._attention(f"up_{level}_attn_{i}", level),
                ScaleU(self.dtype, name=f"scaleu_{first + i}"),
            )
            for i in range(config.num_res_blocks + 1)
        ]
        if level == 0:
            return Level(blocks, None)
        return Level(blocks, Conv(self._channels(level), (3, 3), dtype=self.dtype, name=f"up_{level}_upsample"))

    def _channels(self, level: int) -> int:
        return self.config.channel_mult[level] * self.config.model_channels

    def _res_block(self, name: str, level: int) -> ResBlock:
        kind = nn.remat(ResBlock, policy=KEEP) if self.remat else ResBlock
        return kind(self._channels(level), self.dtype, name=name)

    def _attention(self, name: str, level: int) -> Transformer | None:
        if 2**level not in self.config.attention_resolutions:
            return None
        # The paper masks at the highest resolution only; tokens of deeper levels cover several instances.
        return self._transformer(name, level, masked=level == 0)

    def _transformer(self, name: str, level: int, masked: bool) -> Transformer:
        methods = {"condition": {}, "__call__": {}}
        kind = nn.remat(Transformer, policy=KEEP, methods=methods) if self.remat else Transformer
        return kind(self._channels(level), self.config.num_heads, masked, self.dtype, name=name)

    def _transformers(self) -> list[Transformer]:
        """All transformer blocks, in the order of the forward pass."""
        down, up = ([block for level in levels for block in level.blocks] for levels in (self.down, self.up))
        found = [*(block.transformer for block in down), self.mid_attn, *(block.transformer for block in up)]
        return [transformer for transformer in found if transformer is not None]

    def condition(self, context: Float[Array, "b m e"], tokens: Float[Array, "b k e"] | None = None) -> Conditions:
        """Keys and values of every transformer block.

        Args:
            context: last hidden state of the text encoder, [b, 77, context_dim].
            tokens: UniFusion's grounding tokens, [b, 184, context_dim]; None for text alone.
        """
        context = context.astype(self.dtype)
        tokens = None if tokens is None else tokens.astype(self.dtype)
        both = [transformer.condition(context, tokens) for transformer in self._transformers()]
        conditions = Conditions(text=tuple(text for text, _ in both))
        if tokens is not None:
            conditions["grounding"] = tuple(grounding for _, grounding in both)
        return conditions

    def __call__(
        self,
        latents: Float[Array, "b h w z"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        conditions: Conditions,
        alpha: Float[Array, ""] | float | None = 1.0,
    ) -> Float[Array, "b h w z"]:
        """Predicts ε, in float32.

        Args:
            latents: noisy latents.
            timesteps: of each row.
            conditions: from `condition`.
            alpha: the fusers' scale; None (static) leaves the fusers out of the program.
        """
        x, time = self.embed(latents, timesteps)
        return self._finish(x, time, conditions, alpha, self._deep(x, time, conditions, alpha))

    def deep_features(
        self,
        latents: Float[Array, "b h w z"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        conditions: Conditions,
        alpha: Float[Array, ""] | float | None = 1.0,
    ) -> Float[Array, "b h w c"]:
        """What enters the last res block and transformer: the UNet up to there (DeepCache; Ma et al. 2024)."""
        return self._deep(*self.embed(latents, timesteps), conditions, alpha)

    def finish(
        self,
        latents: Float[Array, "b h w z"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        conditions: Conditions,
        alpha: Float[Array, ""] | float | None,
        deep: Float[Array, "b h w c"],
    ) -> Float[Array, "b h w z"]:
        """ε in float32 from `deep_features`; with those of the same latents it equals `__call__`."""
        return self._finish(*self.embed(latents, timesteps), conditions, alpha, deep)

    def embed(self, latents, timesteps) -> tuple[Float[Array, "b h w c"], Float[Array, "b t"]]:
        """The first convolution's features of the latents, and the time embedding."""
        time = timestep_embedding(timesteps, self.config.model_channels).astype(self.dtype)
        # SiLU of the embedding is the same in every res block.
        time = nn.silu(self.time_out(nn.silu(self.time_in(time))))
        x = self.conv_in(latents.astype(self.dtype))
        if self.config.positions:
            height, width = x.shape[1:3]
            centres = jnp.meshgrid((jnp.arange(width) + 0.5) / width, (jnp.arange(height) + 0.5) / height)
            x = x + self.position_in(fourier_features(jnp.stack(centres, axis=-1)).astype(self.dtype))
        return x, time

    def _deep(self, x, time, conditions: Conditions, alpha) -> Float[Array, "b h w c"]:
        inputs, skips = iter(_block_inputs(conditions, alpha)), [x]
        for level in self.down:
            for block in level.blocks:
                x = _run(block, x, time, inputs)
                skips.append(x)
            if level.resample is not None:
                x = level.resample(x)
                skips.append(x)
        x = self.mid_res_0(x, time)
        x = self.mid_attn(x, *next(inputs))
        x = self.mid_res_1(x, time)
        for level in self.up:
            # The very last block is `_finish`'s.
            for block in level.blocks if level.resample is not None else level.blocks[:-1]:
                x = _run_up(block, x, skips.pop(), time, inputs)
            if level.resample is not None:
                x = level.resample(upsample_nearest(x))
        return x

    def _finish(self, skip, time, conditions: Conditions, alpha, deep) -> Float[Array, "b h w z"]:
        last = iter(_block_inputs(conditions, alpha)[-1:])
        x = _run_up(self.up[-1].blocks[-1], deep, skip, time, last)
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)


def _block_inputs(conditions: Conditions, alpha) -> list[tuple]:
    """What each transformer block takes beside its features, in the order of the forward pass."""
    text, regions = conditions["text"], conditions.get("regions")
    grounding = [None] * len(text) if alpha is None else conditions["grounding"]
    return [(*pair, alpha, regions) for pair in zip(text, grounding, strict=True)]


def _run(block: Block, x, time, inputs: Iterator[tuple]) -> Float[Array, "b h w c"]:
    x = block.res(x, time)
    return x if block.transformer is None else block.transformer(x, *next(inputs))


def _run_up(block: Block, x, skip, time, inputs: Iterator[tuple]) -> Float[Array, "b h w c"]:
    return _run(block, jnp.concatenate(block.scaleu(x, skip), axis=-1), time, inputs)
