"""The four networks of a model, together."""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from instdiff_jax.config import ModelConfig
from instdiff_jax.grounding import null_grounding
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion


class Networks(NamedTuple):
    """The four networks; they hold settings and no parameters. The fields are the top-level keys of parameter trees."""

    unet: UNet
    unifusion: UniFusion
    autoencoder: Autoencoder
    text_encoder: CLIPTextEncoder


def make_networks(config: ModelConfig, dtype: jnp.dtype = jnp.float32, remat: bool = False) -> Networks:
    """The networks of a model; `dtype` is that of their computation, `remat` the UNet's."""
    return Networks(
        unet=UNet(config.unet, dtype, remat=remat),
        unifusion=UniFusion(config.unifusion, config.unet.context_dim, dtype),
        autoencoder=Autoencoder(config.autoencoder, dtype),
        text_encoder=CLIPTextEncoder(config.text_encoder, dtype),
    )


def init_params(networks: Networks, config: ModelConfig, key: jax.Array, grounding: bool = True) -> dict[str, Any]:
    """Fresh float32 parameters of every network; trace it with `jax.eval_shape` for shapes without memory.

    Without `grounding` there is no UniFusion and there are no fusers.
    """
    keys = zip(Networks._fields, jax.random.split(key, len(Networks._fields)), strict=True)
    return {
        part: init_network(networks, part, config, part_key, grounding)
        for part, part_key in keys
        if grounding or part != "unifusion"
    }


def init_network(
    networks: Networks, part: str, config: ModelConfig, key: jax.Array, grounding: bool = True
) -> dict[str, Any]:
    """Fresh float32 parameters of one network; see `init_params`."""
    if part == "unet":
        side = 2 ** (len(config.unet.channel_mult) - 1)
        latents = jnp.zeros((1, side, side, config.unet.in_channels))
        context = jnp.zeros((1, 1, config.unet.context_dim))
        tokens, alpha = (jnp.zeros_like(context), 1.0) if grounding else (None, None)

        def denoise(unet: UNet):
            return unet(latents, jnp.zeros((1,), jnp.int32), unet.condition(context, tokens), alpha)

        variables = nn.init(denoise, networks.unet)(key)
    elif part == "unifusion":
        null = null_grounding(config.unifusion.map_size, config.unet.context_dim, (1,))
        variables = networks.unifusion.init(key, jax.tree.map(jnp.zeros_like, null))
    elif part == "autoencoder":
        side = 2 * config.latent_stride
        variables = networks.autoencoder.init(key, jnp.zeros((1, side, side, 3)), method="reconstruct")
    elif part == "text_encoder":
        variables = networks.text_encoder.init(key, jnp.zeros((1, 1), jnp.int32))
    else:
        raise ValueError(f"part: expected one of {', '.join(Networks._fields)}, got {part!r}")
    return variables["params"]
