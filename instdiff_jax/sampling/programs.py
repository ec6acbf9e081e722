"""The networks around the denoising loop as programs: texts, groundings and pictures, split over a mesh.

Each program takes a few entries a device, so that one small program does for any number of them. A sharding of None is
one device and no mesh. Everything returns before it is ready.

Axes: t texts, u unique conditions, b batch, h and w latent height and width, H and W pixels.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, UInt8

from instdiff_jax import grounding as groundings
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.unet import Conditions, UNet
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.parallel.rows import count_devices, on_each_device, settled, spread, take
from instdiff_jax.sampling.conditions import Entry

CHUNK = 4  # texts or groundings a device


class Networks(NamedTuple):
    """What makes conditions; hashable, since it is part of the compiled programs' keys."""

    unet: UNet
    unifusion: UniFusion


def encode_text(
    encoder: CLIPTextEncoder, params: Any, ids: Int[np.ndarray, "t 77"], sharding: NamedSharding | None
) -> tuple[Float[Array, "padded 77 e"], Float[Array, "padded e"]]:
    """Last hidden states and pooled states of texts, padded to whole chunks."""
    parts = [
        _encode_text(encoder, sharding, params, spread(ids[chunk], sharding))
        for chunk in _chunks(len(ids), CHUNK, count_devices(sharding))
    ]
    return _join(parts, sharding)


def make_conditions(
    networks: Networks,
    params: dict[str, Any],
    entries: Sequence[Entry],
    hidden: Float[Array, "t 77 e"],
    pooled: Float[Array, "p e"],
    sharding: NamedSharding | None,
) -> Conditions:
    """Conditions of entries, the last of which is the null one; padded to whole chunks.

    Args:
        networks: what makes them.
        params: trees of unet and unifusion.
        entries: what they are made of.
        hidden: of the texts that entries number.
        pooled: of the phrases that entries number.
        sharding: how they are split over a mesh.
    """
    texts = np.array([entry.text for entry in entries])
    phrases = np.full((len(entries), groundings.MAX_INSTANCES), -1)
    for row, entry in zip(phrases, entries, strict=True):
        row[: len(entry.phrases)] = entry.phrases
    parts = []
    for chunk in _chunks(len(entries), CHUNK, count_devices(sharding)):
        batch = groundings.stack([entries[i].grounding for i in chunk])
        del batch["phrase_embeddings"]
        use_maps = bool(batch["has_map"].any())
        if not use_maps:
            del batch["maps"]
        arrays = spread((batch, phrases[chunk]), sharding)
        context = take(hidden, texts[chunk], sharding)
        embeddings = take(pooled, np.maximum(phrases[chunk], 0), sharding)
        trees = params["unifusion"], params["unet"]
        made = _condition(networks, sharding, use_maps, trees, *arrays, embeddings, context)
        parts.append(settled(made, sharding))
    return _join(parts, sharding)


def decode(
    autoencoder: Autoencoder,
    params: Any,
    latents: Float[Array, "b h w z"],
    most: int,
    sharding: NamedSharding | None,
) -> list[UInt8[Array, "n H W 3"]]:
    """Pixels, in equal parts of at most `most` pictures a device; the last one is filled up. See `Pipeline.decode`."""
    count, devices = len(latents), count_devices(sharding)
    calls = -(-count // (most * devices))
    size = -(-count // (calls * devices)) * devices
    latents, parts = spread(latents, sharding), []
    for first in range(0, count, size):
        part = take(latents, np.minimum(np.arange(first, first + size), count - 1), sharding)
        parts.append(settled(_decode(autoencoder, sharding, params, part), sharding))
    return parts


@functools.partial(jax.jit, static_argnums=0)
def encode(autoencoder: Autoencoder, params: Any, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
    """The mean latents of pictures in [−1, 1], scaled."""
    mean, _ = autoencoder.apply({"params": params}, image, method="encode")
    return mean.astype(jnp.float32) * autoencoder.config.scale_factor


def _chunks(count: int, size: int, devices: int) -> Int[np.ndarray, "chunks n"]:
    """Numbers of entries, `size` a device at a time, so that `_join` puts them in order; the last one fills up."""
    chunks = -(-count // (size * devices))
    numbers = np.arange(chunks * size * devices).reshape(devices, chunks, size)
    return np.minimum(numbers.transpose(1, 0, 2).reshape(chunks, -1), count - 1)


@functools.partial(jax.jit, static_argnames="sharding")
def _join(parts: list[Any], sharding: NamedSharding | None) -> Any:
    """Trees one after the other, on every device its own."""

    def local(*parts: Any) -> Any:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    return on_each_device(local, sharding)(*parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _encode_text(encoder, sharding, params, ids: Int[Array, "t 77"]) -> tuple[Array, Array]:
    def run(params, ids):
        hidden, pooled = encoder.apply({"params": params}, ids)
        return hidden, pooled.astype(jnp.float32)

    return on_each_device(run, sharding, whole=(0,))(params, ids)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _condition(networks, sharding, use_maps, params, grounding, phrases, embeddings, context) -> Conditions:
    def run(params, grounding, phrases, embeddings, context):
        given = jnp.where(phrases[..., None] >= 0, embeddings, 0.0)
        grounding = grounding | {"phrase_embeddings": given}
        tokens = networks.unifusion.apply({"params": params[0]}, grounding, use_maps)
        return networks.unet.apply({"params": params[1]}, context, tokens, method="condition")

    return on_each_device(run, sharding, whole=(0,))(params, grounding, phrases, embeddings, context)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decode(autoencoder, sharding, params, latents: Float[Array, "b h w z"]) -> UInt8[Array, "b H W 3"]:
    def run(params, latents):
        image = autoencoder.apply({"params": params}, latents, method="decode")
        return ((jnp.clip(image, -1, 1) * 0.5 + 0.5) * 255).astype(jnp.uint8)

    return on_each_device(run, sharding, whole=(0,))(params, latents)
