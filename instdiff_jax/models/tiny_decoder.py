"""TAESD's decoder (github.com/madebyollin/taesd): latents to images with a hundredth of the autoencoder's work.

A plain stack of 3×3 convolutions and ReLUs without norms, so a pixel depends on near latents only. It takes scaled
latents, as the UNet has them.

Axes: b batch, h w latents, z latent channels, H W image, c channels.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.layers import Conv, upsample_nearest

CHANNELS = 64
# Residual blocks of each level, from the latents to the image; between two levels both sides double.
BLOCKS = (3, 3, 3, 1)


class TinyDecoder(nn.Module):
    """Latents to images. Modules are named by their place in the released stack."""

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Images, roughly in [−1, 1] and not clamped, from scaled latents."""
        x = jnp.tanh(latents.astype(jnp.float32) / 3) * 3
        x = nn.relu(Conv(CHANNELS, (3, 3), name="layer_0", dtype=self.dtype)(x.astype(self.dtype)))
        place = 2  # after the first convolution and its ReLU
        for level, blocks in enumerate(BLOCKS):
            for _ in range(blocks):
                x = _Block(name=f"layer_{place}", dtype=self.dtype)(x)
                place += 1
            last = level == len(BLOCKS) - 1
            if not last:
                x, place = upsample_nearest(x), place + 1
            features = 3 if last else CHANNELS
            x = Conv(features, (3, 3), use_bias=last, name=f"layer_{place}", dtype=self.dtype)(x)
            place += 1
        return x.astype(jnp.float32) * 2 - 1


class _Block(nn.Module):
    """relu(x + conv(relu(conv(relu(conv(x))))))."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        y = x
        for place in (0, 2, 4):
            y = Conv(x.shape[-1], (3, 3), name=f"conv_{place}", dtype=self.dtype)(nn.relu(y) if place else y)
        return nn.relu(x + y)
