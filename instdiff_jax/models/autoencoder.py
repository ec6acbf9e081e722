"""The KL autoencoder between pictures and the latents in which diffusion runs.

Rombach et al. 2022, section 3.1 and appendix G, as Stable Diffusion 1.5 holds it. One latent pixel stands for 8×8
pixels where `ch_mult` has four levels.

Axes: b batch, H W picture, h w latents, z latent channels, c channels, L level (0 is the full picture).
"""

import functools

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.config import AutoencoderConfig
from instdiff_jax.models.attention import attention
from instdiff_jax.models.layers import Conv, GroupNorm, upsample_nearest

# Every GroupNorm of the autoencoder; the UNet's res blocks have 1e-5.
EPS = 1e-6


class Autoencoder(nn.Module):
    """Pictures to the posterior of their latents, and latents to pictures.

    Initialise with `method="reconstruct"`, which touches every parameter. Each picture goes through on its own, so
    that a caller short of memory may pass a batch slice by slice.
    """

    config: AutoencoderConfig
    dtype: jnp.dtype = jnp.float32
    param_dtype: jnp.dtype = jnp.float32

    def setup(self):
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.encoder = _Encoder(self.config, **dtypes)
        self.decoder = _Decoder(self.config, **dtypes)
        self.quant_conv = nn.Dense(2 * self.config.z_channels, **dtypes)
        self.post_quant_conv = nn.Dense(self.config.z_channels, **dtypes)

    def encode(self, image: Float[Array, "b H W 3"]) -> tuple[Float[Array, "b h w z"], Float[Array, "b h w z"]]:
        """Mean and log-variance of the latents' posterior, raw: neither scaled nor clamped.

        Args:
            image: pictures in [−1, 1], both sides multiples of 2^(levels − 1) pixels.
        """
        mean, log_variance = jnp.split(self.quant_conv(self.encoder(image.astype(self.dtype))), 2, axis=-1)
        return mean, log_variance

    def decode(self, latents: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Pictures, about in [−1, 1] and not clamped, of scaled latents."""
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
    """Pictures to unprojected moments: each level's blocks, a downsampling between levels, the middle."""

    config: AutoencoderConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w moments"]:
        config, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        conv = functools.partial(Conv, kernel_size=(3, 3), **dtypes)
        x = conv(config.ch, name="conv_in")(x)
        for level, mult in enumerate(config.ch_mult):
            for i in range(config.num_res_blocks):
                x = _ResBlock(config.ch * mult, name=f"down_{level}_block_{i}", **dtypes)(x)
            if level < len(config.ch_mult) - 1:
                # The official code pads right and bottom only; "SAME" would do so on even sides alone.
                padding = ((0, 1), (0, 1))
                x = conv(x.shape[-1], strides=2, padding=padding, name=f"down_{level}_downsample")(x)
        x = _ResBlock(x.shape[-1], name="mid_block_1", **dtypes)(x)
        x = _Attention(name="mid_attn", **dtypes)(x)
        x = _ResBlock(x.shape[-1], name="mid_block_2", **dtypes)(x)
        x = nn.silu(GroupNorm(EPS, name="norm_out", **dtypes)(x))
        return conv(2 * config.z_channels, name="conv_out")(x)


class _Decoder(nn.Module):
    """Latents to pictures: the middle, then each level's blocks from the deepest up, an upsampling between levels."""

    config: AutoencoderConfig
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        config, dtypes = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        conv = functools.partial(Conv, kernel_size=(3, 3), **dtypes)
        x = conv(config.ch * config.ch_mult[-1], name="conv_in")(x)
        x = _ResBlock(x.shape[-1], name="mid_block_1", **dtypes)(x)
        x = _Attention(name="mid_attn", **dtypes)(x)
        x = _ResBlock(x.shape[-1], name="mid_block_2", **dtypes)(x)
        for level, mult in reversed(list(enumerate(config.ch_mult))):
            for i in range(config.num_res_blocks + 1):
                x = _ResBlock(config.ch * mult, name=f"up_{level}_block_{i}", **dtypes)(x)
            if level > 0:
                x = conv(x.shape[-1], name=f"up_{level}_upsample")(upsample_nearest(x))
        x = nn.silu(GroupNorm(EPS, name="norm_out", **dtypes)(x))
        return conv(3, name="conv_out")(x)


class _ResBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), with a linear map of x where the channels change."""

    channels: int
    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w out"]:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        hidden = nn.silu(GroupNorm(EPS, name="norm1", **dtypes)(x))
        hidden = Conv(self.channels, (3, 3), name="conv1", **dtypes)(hidden)
        hidden = nn.silu(GroupNorm(EPS, name="norm2", **dtypes)(hidden))
        hidden = Conv(self.channels, (3, 3), name="conv2", **dtypes)(hidden)
        if x.shape[-1] != self.channels:
            x = nn.Dense(self.channels, name="skip", **dtypes)(x)
        return x + hidden


class _Attention(nn.Module):
    """Self-attention over all pixels with one head as wide as the channels."""

    dtype: jnp.dtype
    param_dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        dtypes = dict(dtype=self.dtype, param_dtype=self.param_dtype)
        batch, _, _, channels = x.shape
        normed = GroupNorm(EPS, name="norm", **dtypes)(x).reshape(batch, -1, channels)
        q, k, v = (nn.Dense(channels, name=name, **dtypes)(normed)[:, :, None] for name in "qkv")
        return x + nn.Dense(channels, name="out", **dtypes)(attention(q, k, v).reshape(x.shape))
