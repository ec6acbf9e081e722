"""The UNet of Stable Diffusion 1.5 with fusers and ScaleU, split into what depends on the step and what does not.

`condition` turns text and grounding tokens into keys and values for every transformer block, once.
`__call__` denoises with them; `deep_features` and `finish` are its two parts, for reuse of the deep one between steps.
Axes: b batch, h height, w width, c channels, n visual tokens.
"""

from typing import NotRequired, TypedDict

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from instdiff_jax.config import UNetConfig
from instdiff_jax.models.attention import GEGLU, Fuser, Kernel, KeyValue, Projections, Regions
from instdiff_jax.models.layers import Conv, GroupNorm, LayerNorm, timestep_embedding, upsample_nearest
from instdiff_jax.models.scaleu import ScaleU
from instdiff_jax.models.unifusion import fourier_features


class Conditions(TypedDict):
    """All that the UNet needs of text and grounding; leaves have a leading batch axis.

    `text` and `grounding` map a transformer block's name to its keys and values. `regions` turns on
    instance-masked attention in the fusers of the highest-resolution level.
    """

    text: dict[str, KeyValue]
    grounding: NotRequired[dict[str, KeyValue]]
    regions: NotRequired[Regions]


class ResBlock(nn.Module):
    """Two convolutions with the timestep added in between, and a shortcut."""

    channels: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w e"], time: Float[Array, "b t"]) -> Float[Array, "b h w c"]:
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        y = nn.silu(GroupNorm(name="norm1", **settings)(x))
        y = Conv(self.channels, (3, 3), name="conv1", **settings)(y)
        y = y + nn.Dense(self.channels, name="time_proj", **settings)(time)[:, None, None, :]
        y = nn.silu(GroupNorm(name="norm2", **settings)(y))
        y = Conv(self.channels, (3, 3), name="conv2", **settings)(y)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, name="skip", **settings)(x)
        return x + y


class Transformer(nn.Module):
    """One transformer block over the visual tokens: self-attention, fuser, cross-attention, feed-forward."""

    channels: int
    num_heads: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype
    kernel: Kernel

    def setup(self):
        settings = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        heads = dict(num_heads=self.num_heads, kernel=self.kernel, **settings)
        self.norm = GroupNorm(eps=1e-6, **settings)
        self.proj_in = nn.Dense(self.channels, **settings)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(**settings) for _ in range(3))
        self.self_attn = Projections(self.channels, **heads)
        self.fuser = Fuser(self.channels, **heads)
        self.cross_attn = Projections(self.channels, **heads)
        self.ff = GEGLU(self.channels, **settings)
        self.proj_out = nn.Dense(self.channels, **settings)

    def condition(
        self, context: Float[Array, "b m e"], tokens: Float[Array, "b k e"] | None
    ) -> tuple[KeyValue, KeyValue | None]:
        """Keys and values of the text, and of the grounding tokens where there are any."""
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
            y = self.fuser(y, grounding, alpha, regions)
        y = y + self.cross_attn(self.norm2(y), text)
        y = y + self.ff(self.norm3(y))
        return x + self.proj_out(y.reshape(x.shape))


class UNet(nn.Module):
    """Predicts the noise in latents; two entries, `condition` and `__call__`.

    Both sides of the latents must be multiples of 2^(levels − 1). Transformer blocks are named as in
    `Conditions`: down_0_attn_0, …, mid_attn, …, up_0_attn_2.

    Args:
        remat: recompute every block's inside in the backward pass instead of keeping it.
    """

    config: UNetConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32
    kernel: Kernel = "auto"
    remat: bool = False

    def setup(self):
        config, settings = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        res_block, transformer = ResBlock, Transformer
        if self.remat:
            res_block = nn.remat(ResBlock)
            transformer = nn.remat(Transformer, methods={"condition": {}, "__call__": {}})
        levels = len(config.channel_mult)
        width = config.model_channels

        def add_res(name: str, channels: int) -> None:
            setattr(self, name, res_block(channels, **settings))

        def add_attention(name: str, channels: int) -> None:
            setattr(self, name, transformer(channels, config.num_heads, kernel=self.kernel, **settings))

        self.time_in = nn.Dense(4 * width, **settings)
        self.time_out = nn.Dense(4 * width, **settings)
        self.conv_in = Conv(width, (3, 3), **settings)
        if config.positions:
            # Zeros: a model that starts from one without is that model.
            self.position_in = nn.Dense(width, use_bias=False, kernel_init=nn.initializers.zeros, **settings)
        for level, mult in enumerate(config.channel_mult):
            for i in range(config.num_res_blocks):
                add_res(f"down_{level}_res_{i}", mult * width)
                if self._attends(level):
                    add_attention(f"down_{level}_attn_{i}", mult * width)
            if level < levels - 1:
                # PyTorch pads 1 on all sides; "SAME" would pad right and bottom only.
                conv = Conv(mult * width, (3, 3), strides=2, padding=((1, 1), (1, 1)), **settings)
                setattr(self, f"down_{level}_downsample", conv)
        add_res("mid_res_0", config.channel_mult[-1] * width)
        add_attention("mid_attn", config.channel_mult[-1] * width)
        add_res("mid_res_1", config.channel_mult[-1] * width)
        for level, mult in reversed(list(enumerate(config.channel_mult))):
            for i in range(config.num_res_blocks + 1):
                setattr(self, f"scaleu_{self._skip_index(level, i)}", ScaleU(**settings))
                add_res(f"up_{level}_res_{i}", mult * width)
                if self._attends(level):
                    add_attention(f"up_{level}_attn_{i}", mult * width)
            if level > 0:
                setattr(self, f"up_{level}_upsample", Conv(mult * width, (3, 3), **settings))
        self.norm_out = GroupNorm(**settings)
        self.conv_out = Conv(config.out_channels, (3, 3), **settings)

    def _attends(self, level: int) -> bool:
        return 2**level in self.config.attention_resolutions

    def _skip_index(self, level: int, i: int) -> int:
        return (len(self.config.channel_mult) - 1 - level) * (self.config.num_res_blocks + 1) + i

    @property
    def block_names(self) -> list[str]:
        """Names of the transformer blocks, in the order of the forward pass."""
        levels = range(len(self.config.channel_mult))
        blocks = self.config.num_res_blocks
        down = [f"down_{level}_attn_{i}" for level in levels if self._attends(level) for i in range(blocks)]
        up = [f"up_{level}_attn_{i}" for level in reversed(levels) if self._attends(level) for i in range(blocks + 1)]
        return [*down, "mid_attn", *up]

    def condition(self, context: Float[Array, "b m e"], tokens: Float[Array, "b k e"] | None = None) -> Conditions:
        """Keys and values of every transformer block.

        Args:
            context: last hidden state of the text encoder, [b, 77, context_dim].
            tokens: UniFusion's grounding tokens, [b, 184, context_dim]; None for text alone.
        """
        context = context.astype(self.dtype)
        tokens = None if tokens is None else tokens.astype(self.dtype)
        both = {name: getattr(self, name).condition(context, tokens) for name in self.block_names}
        conditions = Conditions(text={name: text for name, (text, _) in both.items()})
        if tokens is not None:
            conditions["grounding"] = {name: grounding for name, (_, grounding) in both.items()}
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
            alpha: the fusers' scale; None (static) leaves the fusers out of the program.
        """
        x, time = self._enter(latents, timesteps)
        return self._finish(x, time, conditions, alpha, self._deep(x, time, conditions, alpha))

    def deep_features(
        self,
        latents: Float[Array, "b h w z"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        conditions: Conditions,
        alpha: Float[Array, ""] | float | None = 1.0,
    ) -> Float[Array, "b h w c"]:
        """What enters the last res block and transformer: all of the UNet before them (DeepCache; Ma et al. 2024)."""
        return self._deep(*self._enter(latents, timesteps), conditions, alpha)

    def finish(
        self,
        latents: Float[Array, "b h w z"],
        timesteps: Int[Array, " b"] | Float[Array, " b"],
        conditions: Conditions,
        alpha: Float[Array, ""] | float | None,
        deep: Float[Array, "b h w c"],
    ) -> Float[Array, "b h w z"]:
        """ε in float32 from `deep_features`; those of these very latents give what `__call__` gives."""
        return self._finish(*self._enter(latents, timesteps), conditions, alpha, deep)

    def _attend(self, name: str, x: Float[Array, "b h w c"], conditions: Conditions, alpha) -> Float[Array, "b h w c"]:
        # The paper masks at the highest resolution only; deeper tokens cover several instances.
        regions = conditions.get("regions") if "_0_attn_" in name and "mid" not in name else None
        grounding = None if alpha is None else conditions["grounding"][name]
        return getattr(self, name)(x, conditions["text"][name], grounding, alpha, regions)

    def _enter(self, latents, timesteps) -> tuple[Float[Array, "b h w c"], Float[Array, "b t"]]:
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
        config = self.config
        levels = range(len(config.channel_mult))
        skips = [x]
        for level in levels:
            for i in range(config.num_res_blocks):
                x = getattr(self, f"down_{level}_res_{i}")(x, time)
                if self._attends(level):
                    x = self._attend(f"down_{level}_attn_{i}", x, conditions, alpha)
                skips.append(x)
            if level < levels[-1]:
                x = getattr(self, f"down_{level}_downsample")(x)
                skips.append(x)
        x = self.mid_res_0(x, time)
        x = self._attend("mid_attn", x, conditions, alpha)
        x = self.mid_res_1(x, time)
        for level in reversed(levels):
            # The very last block is `_finish`'s.
            for i in range(config.num_res_blocks + (level > 0)):
                x = self._up_block(level, i, x, skips.pop(), time, conditions, alpha)
            if level > 0:
                x = getattr(self, f"up_{level}_upsample")(upsample_nearest(x))
        return x

    def _up_block(self, level: int, i: int, x, skip, time, conditions: Conditions, alpha) -> Float[Array, "b h w c"]:
        scaleu = getattr(self, f"scaleu_{self._skip_index(level, i)}")
        x = jnp.concatenate(scaleu(x, skip), axis=-1)
        x = getattr(self, f"up_{level}_res_{i}")(x, time)
        return self._attend(f"up_{level}_attn_{i}", x, conditions, alpha) if self._attends(level) else x

    def _finish(self, skip, time, conditions: Conditions, alpha, deep) -> Float[Array, "b h w z"]:
        x = self._up_block(0, self.config.num_res_blocks, deep, skip, time, conditions, alpha)
        return self.conv_out(nn.silu(self.norm_out(x))).astype(jnp.float32)
