"""The ConvNeXt trunk that reads instance maps inside UniFusion.

Liu et al. 2022, "A ConvNet for the 2020s", section 2 and figure 4: ConvNeXt without the final norm and head.

Axes: b batch, H W image, h w features, c channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.layers import Dense, LayerNorm, gelu

EPS = 1e-6


class ConvNeXt(nn.Module):
    """Maps images to features. The stem divides each side by 4, each further stage by 2.

    Attributes:
        depths: number of blocks of each stage.
        dims: channels of each stage.
    """

    depths: tuple[int, ...]
    dims: tuple[int, ...]
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W in"]) -> Float[Array, "b h w c"]:
        """Features of the last stage; with four stages, h = H/32 and w = W/32."""
        x = x.astype(self.dtype)
        for i, (depth, dim) in enumerate(zip(self.depths, self.dims, strict=True)):
            side = 4 if i == 0 else 2
            norm = LayerNorm(EPS, name=f"downsample_{i}_norm", dtype=self.dtype)
            conv = nn.Conv(
                dim, (side, side), strides=side, padding="VALID", name=f"downsample_{i}_conv", dtype=self.dtype
            )
            x = norm(conv(x)) if i == 0 else conv(norm(x))
            for j in range(depth):
                x = _Block(name=f"stage_{i}_block_{j}", dtype=self.dtype)(x)
        return x


class _Block(nn.Module):
    """x + gamma · linear(GELU(linear(norm(depthwise conv(x))))), four times as wide inside."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        hidden = nn.Conv(channels, (7, 7), feature_group_count=channels, name="dwconv", dtype=self.dtype)(x)
        hidden = LayerNorm(EPS, name="norm", dtype=self.dtype)(hidden)
        hidden = gelu(Dense(4 * channels, name="pw1", dtype=self.dtype)(hidden))
        hidden = Dense(channels, name="pw2", dtype=self.dtype)(hidden)
        gamma = self.param("gamma", nn.initializers.constant(1e-6), (channels,))
        return x + gamma.astype(self.dtype) * hidden
