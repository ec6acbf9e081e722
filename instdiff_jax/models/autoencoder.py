"""The KL autoencoder: maps images to the latents in which diffusion runs, and back.

Rombach et al. 2022, section 3.1 and appendix G, with the layers of Stable Diffusion 1.5. With four levels in `ch_mult`
a latent pixel stands for 8×8 pixels.

Axes: b batch, H W image, h w latents, z latent channels, c channels; level 0 is the full image.
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.config import AutoencoderConfig
from instdiff_jax.models.attention import attention
from instdiff_jax.models.layers import Conv, Dense, GroupNorm, upsample_nearest

# For every GroupNorm here; the UNet's res blocks use 1e-5.
EPS = 1e-6


class Autoencoder(nn.Module):
    """Images to the posterior of their latents, and latents to images.

    Initialise with `method="reconstruct"`, which uses every parameter. Images are independent, so a batch may be passed
    in slices to save memory.
    """

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        self.encoder = _Encoder(self.config, dtype=self.dtype)
        self.decoder = _Decoder(self.config, dtype=self.dtype)
        self.quant_conv = Dense(2 * self.config.z_channels, dtype=self.dtype)
        self.post_quant_conv = Dense(self.config.z_channels, dtype=self.dtype)

    def encode(self, image: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and log-variance of the latents' posterior, neither scaled nor clamped.

        Args:
            image: in [−1, 1]; both sides must be multiples of 2^(levels − 1) pixels.
        """
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image.astype(self.dtype))), 2, axis=-1)
        return mean, log_variance

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Images, roughly in [−1, 1] and not clamped, from scaled latents."""
        unscaled = latents.astype(jnp.float32) / self.config.scale_factor
        return self.decoder(self.post_quant_conv(unscaled.astype(self.dtype)))

    def reconstruct(self, image: Float[Array, "b H W 3"]) -> Float[Array, "b H W 3"]:
        """Encodes, takes the mean, decodes."""
        mean, _ = self.encode(image)
        return self.decode(mean.astype(jnp.float32) * self.config.scale_factor)


def sample_posterior(
    mean: Float[Array, "b h w z"],
    log_variance: Float[Array, "b h w z"],
    noise: Float[Array, "b h w z"],
    scale_factor: float,
) -> Float[Array, "b h w z"]:
    """Scaled float32 latents drawn from an encoding: (mean + σ·noise)·scale_factor.

    The log-variance is clamped to [−30, 20], as in the official code. Zero noise gives the scaled mean.
    """
    log_variance = jnp.clip(log_variance.astype(jnp.float32), -30.0, 20.0)
    sample = mean.astype(jnp.float32) + jnp.exp(0.5 * log_variance) * noise.astype(jnp.float32)
    return sample * scale_factor


class _Encoder(nn.Module):
    """Images to unprojected moments: every level's blocks with downsampling in between, then the middle."""

    config: AutoencoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w moments"]:
        config = self.config
        conv = functools.partial(Conv, kernel_size=(3, 3), dtype=self.dtype)
        x = conv(config.ch, name="conv_in")(x)
        for level, mult in enumerate(config.ch_mult):
            for i in range(config.num_res_blocks):
                x = _ResBlock(config.ch * mult, name=f"down_{level}_block_{i}", dtype=self.dtype)(x)
            if level < len(config.ch_mult) - 1:
                # The official code pads only right and bottom; "SAME" does so only for even sides.
                padding = ((0, 1), (0, 1))
                x = conv(x.shape[-1], strides=2, padding=padding, name=f"down_{level}_downsample")(x)
        x = _ResBlock(x.shape[-1], name="mid_block_1", dtype=self.dtype)(x)
        x = _Attention(name="mid_attn", dtype=self.dtype)(x)
        x = _ResBlock(x.shape[-1], name="mid_block_2", dtype=self.dtype)(x)
        x = nn.silu(GroupNorm(EPS, name="norm_out", dtype=self.dtype)(x))
        return conv(2 * config.z_channels, name="conv_out")(x)


class _Decoder(nn.Module):
    """Latents to images: the middle, then every level's blocks from the deepest up, with upsampling in between."""

    config: AutoencoderConfig
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        config = self.config
        conv = functools.partial(Conv, kernel_size=(3, 3), dtype=self.dtype)
        x = conv(config.ch * config.ch_mult[-1], name="conv_in")(x)
        x = _ResBlock(x.shape[-1], name="mid_block_1", dtype=self.dtype)(x)
        x = _Attention(name="mid_attn", dtype=self.dtype)(x)
        x = _ResBlock(x.shape[-1], name="mid_block_2", dtype=self.dtype)(x)
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            for i in range(config.num_res_blocks + 1):
                x = _ResBlock(config.ch * mult, name=f"up_{level}_block_{i}", dtype=self.dtype)(x)
            if level > 0:
                x = conv(x.shape[-1], name=f"up_{level}_upsample")(upsample_nearest(x))
        x = nn.silu(GroupNorm(EPS, name="norm_out", dtype=self.dtype)(x))
        return conv(3, name="conv_out")(x)


class _ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear map of x where the number of channels changes."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w out"]:
        hidden = nn.silu(GroupNorm(EPS, name="norm1", dtype=self.dtype)(x))
        hidden = Conv(self.channels, (3, 3), name="conv1", dtype=self.dtype)(hidden)
        hidden = nn.silu(GroupNorm(EPS, name="norm2", dtype=self.dtype)(hidden))
        hidden = Conv(self.channels, (3, 3), name="conv2", dtype=self.dtype)(hidden)
        if x.shape[-1] != self.channels:
            x = Dense(self.channels, name="skip", dtype=self.dtype)(x)
        return x + hidden


class _Attention(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels."""

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        batch, _, _, channels = x.shape
        normed = GroupNorm(EPS, name="norm", dtype=self.dtype)(x).reshape(batch, -1, channels)
        q, k, v = (Dense(channels, name=name, dtype=self.dtype)(normed)[:, :, None] for name in "qkv")
        return x + Dense(channels, name="out", dtype=self.dtype)(attention(q, k, v).reshape(x.shape))
