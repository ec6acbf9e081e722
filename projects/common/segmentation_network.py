"""The detector's network: a U-Net that predicts category, attributes and centre of every pixel.

Axes: b batch, H W image, h w half of it, c channels.
"""

import functools
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from instdiff_jax.models.layers import Conv, Dense

# Kinds and their names. The first kind is the category, the others are attributes.
Classes = tuple[tuple[str, tuple[str, ...]], ...]


class SegmenterConfig(NamedTuple):
    """What the network tells apart, and its sizes.

    Attributes:
        classes: kinds and their names.
        channels: at full, 1/2, 1/4, ... resolution (three levels or more).
        outlines: a last block at full resolution makes the maps. Without it they are made at half resolution, at a
            fraction of the work, and interpolated.
    """

    classes: Classes
    channels: tuple[int, ...] = (24, 32, 64, 96)
    outlines: bool = True

    @property
    def outputs(self) -> tuple[int, ...]:
        """Channels of the maps: category and background, each attribute, centres, and the offset."""
        categories, *attributes = (len(names) for _, names in self.classes)
        return (1 + categories, *attributes, categories, 2)

    @property
    def stride(self) -> int:
        """Pixels of the image to one of the maps, along each side."""
        return 1 if self.outlines else 2

    @property
    def multiple(self) -> int:
        """Sides of images must be multiples of this many pixels."""
        return 2 ** (len(self.channels) - 1)


class PixelMaps(NamedTuple):
    """Per pixel: logits of categories, attributes and centres, and the offset (y, x) to the centre in image pixels."""

    category: Float[Array, "b H W categories+1"]
    attributes: tuple[Float[Array, "b H W values"], ...]
    centre: Float[Array, "b H W categories"]
    offset: Float[Array, "b H W 2"]


def scale_of(side: int) -> float:
    """How much wider distances are than in images of 64 pixels."""
    return max(1.0, side / 64)


class GroupNorm(nn.Module):
    """`nn.GroupNorm` of 8 groups with its parameters and numbers, in two thirds of its time on a CPU.

    Sums over space come first, so channels stay the minor axis; statistics are float32.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        flat = x.astype(jnp.float32).reshape(len(x), -1, channels)

        def mean(values: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
            groups = values.mean(axis=1).reshape(len(x), 8, -1).mean(axis=2)
            return jnp.repeat(groups, channels // 8, axis=1)[:, None]

        centre = mean(flat)
        factor = jax.lax.rsqrt(jnp.maximum(mean(jnp.square(flat)) - jnp.square(centre), 0) + 1e-6) * scale
        return (flat * factor + (bias - centre * factor)).reshape(x.shape).astype(self.dtype)


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w c"]:
        dtype = self.dtype
        y = Conv(self.channels, (3, 3), dtype=dtype)(nn.silu(GroupNorm(dtype)(x)))
        y = Conv(self.channels, (3, 3), dtype=dtype)(nn.silu(GroupNorm(dtype)(y)))
        return (x if x.shape[-1] == self.channels else Dense(self.channels, dtype=dtype)(x)) + y


class SegmentationNetwork(nn.Module):
    """A U-Net from half resolution down, with one block at full resolution if `config.outlines`.

    Its wide layers compute in `dtype`; maps and features are float32. One pixel of the maps stands for `config.stride`
    of the image along each side; offsets are in pixels of the image.
    """

    config: SegmenterConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b H W 3"]) -> tuple[PixelMaps, Float[Array, "b c"]]:
        """Takes images in [−1, 1]; returns the maps, and the mean of each image's deepest features."""
        (whole, *levels, deepest), dtype = self.config.channels, self.dtype
        # Few channels and strides of 2 stay in float32: XLA is slow with them in bfloat16 on a CPU.
        x = _Block(levels[0], dtype)(nn.Conv(levels[0], (3, 3))(_space_to_depth(image)))
        skips = [x]
        for channels in levels[1:]:
            x = _Block(channels, dtype)(nn.Conv(channels, (3, 3), strides=2, dtype=jnp.float32)(x))
            skips.append(x)
        x = nn.Conv(deepest, (3, 3), strides=2, dtype=jnp.float32)(x)
        # Named in this order, as in the folders that exist: the second one is applied first.
        last, first = _Block(deepest, dtype), _Block(deepest, dtype)
        coarse = x = last(first(x))
        for channels, skip in zip(reversed(levels), reversed(skips), strict=True):
            x = jnp.concatenate([skip, _double(Dense(channels, dtype=dtype)(x))], axis=-1)
            x = _Block(channels, dtype)(x)
        if self.config.outlines:
            # For outlines: 88% of the outermost pixels of real shapes are right with this block, 86% without.
            x = _depth_to_space(Dense(4 * whole, dtype=dtype)(x))
            x = _Block(whole, dtype)(nn.Conv(whole, (3, 3))(image) + x)
        maps = Dense(sum(self.config.outputs), dtype=dtype)(nn.silu(GroupNorm(dtype)(x)))
        parts = jnp.split(maps.astype(jnp.float32), np.cumsum(self.config.outputs)[:-1], axis=-1)
        category, *attributes, centre, offset = parts
        return PixelMaps(category, tuple(attributes), centre, offset), coarse.astype(jnp.float32).mean((1, 2))


def _space_to_depth(x: Float[Array, "b H W c"]) -> Float[Array, "b h w 4*c"]:
    b, height, width, c = x.shape
    x = x.reshape(b, height // 2, 2, width // 2, 2, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // 2, width // 2, 4 * c)


def _depth_to_space(x: Float[Array, "b h w 4*c"]) -> Float[Array, "b H W c"]:
    b, height, width, c = x.shape
    x = x.reshape(b, height, width, 2, 2, c // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * height, 2 * width, c // 4)


def _double(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def enlarge(maps: PixelMaps, size: tuple[int, int]) -> PixelMaps:
    """The maps of a batch, interpolated to this height and width."""
    return jax.tree.map(lambda part: jax.image.resize(part, (len(part), *size, part.shape[-1]), "linear"), maps)


def init_params(config: SegmenterConfig, key: jax.Array) -> dict[str, Any]:
    """Random initial parameters."""
    # Compiled in one piece: one operation at a time takes several times as long.
    init = jax.jit(SegmentationNetwork(config).init)
    return init(key, jnp.zeros((1, config.multiple, config.multiple, 3)))["params"]


def init_shapes(config: SegmenterConfig) -> dict[str, Any]:
    """The shapes of the parameters."""
    return jax.eval_shape(functools.partial(init_params, config), jax.eval_shape(lambda: jax.random.key(0)))
