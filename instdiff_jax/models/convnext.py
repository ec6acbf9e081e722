"""The ConvNeXt trunk that reads instance maps inside UniFusion.

Liu et al. 2022, "A ConvNet for the 2020s", section 2 and figure 4: ConvNeXt without the final norm and head.

Axes: b batch, H W picture, h w features, c channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.layers import LayerNorm

EPS = 1e-6


class ConvNeXt(nn.Module):
    """Pictures to features, 4 pixels a side smaller after the stem and 2 after every further stage.

    Attributes:
        depths: number of blocks of each stage.
        dims: channels of each stage.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W in"]) -> Float[Array, "b h w c"]:
        """Features of the last stage: four stages leave H/32 × W/32."""
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        x = x.astype(self.dtype)
        for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            side = 4 if i == 0 else 2
            norm = LayerNorm(EPS, name=f"downsample_{i}_norm", **dtypes)
            conv = nn.Conv(dim, (side, side), strides=side, padding="VALID", name=f"downsample_{i}_conv", **dtypes)
            x = norm(conv(x)) if i == 0 else conv(norm(x))
            for j in range(depth):
                x = _Block(name=f"stage_{i}_block_{j}", **dtypes)(x)
        return x


class _Block(nn.Module):
    """x + gamma · linear(GELU(linear(norm(depthwise conv(x))))): a wide linear pair per pixel."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        channels = x.shape[-1]
        hidden = nn.Conv(channels, (7, 7), feature_group_count=channels, name="dwconv", **dtypes)(x)
        hidden = LayerNorm(EPS, name="norm", **dtypes)(hidden)
        hidden = nn.gelu(nn.Dense(4 * channels, name="pw1", **dtypes)(hidden), approximate=False)
        hidden = nn.Dense(channels, name="pw2", **dtypes)(hidden)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,), self.param_dtype)
        return x + gamma.astype(self.dtype) * hidden
