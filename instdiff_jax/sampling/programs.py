"""The networks around the denoising loop as programs: texts, groundings and images, split over a mesh.

Each program takes a few entries per device, so that one small program does for any number of them. A sharding of None
is one device without a mesh. Everything returns before it is ready.

Axes: t texts, u unique conditions, b batch, h and w latent height and width, H and W pixels.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt8

from instdiff_jax import grounding as groundings
from instdiff_jax.config import ModelConfig
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.eight_bits import MOST, products
from instdiff_jax.models.tiny_decoder import TinyDecoder
from instdiff_jax.models.unet import Conditions, UNet
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.parallel.rows import count_devices, on_each_device, settled, spread, take
from instdiff_jax.sampling.conditions import ConditionInput
from instdiff_jax.sampling.tiles import decode_tiles

CHUNK = 4  # texts or groundings per device


class SamplingNetworks(NamedTuple):
    """The four networks, without parameters; hashable, since they are part of the compiled programs' keys."""

    unet: UNet
    unifusion: UniFusion
    text_encoder: CLIPTextEncoder
    autoencoder: Autoencoder


def make_networks(config: ModelConfig, dtype: Any) -> SamplingNetworks:
    """The networks of a model, computing in `dtype`; the autoencoder always in float32 (as the official code).

    Its products are the device's default but in a float32 pipeline: see `Pipeline.matmul_precision`.
    """
    return SamplingNetworks(
        unet=UNet(config.unet, dtype=dtype),
        unifusion=UniFusion(config.unifusion, config.unet.context_dim, dtype=dtype),
        text_encoder=CLIPTextEncoder(config.text_encoder, dtype=dtype),
        autoencoder=Autoencoder(config.autoencoder, dtype=jnp.float32),
    )


@dataclasses.dataclass(frozen=True)
class NoisePredictor:
    """The UNet as diffusion/loop.py takes it; equal for equal networks, so that programs are shared.

    With `eight_bits`, "int8" or "fp8", its projections are products of 8-bit numbers, see models/eight_bits.py.
    """

    unet: UNet
    eight_bits: str | None = None

    def __call__(self, params, *inputs):
        return self._apply(params, inputs)

    def deep(self, params, *inputs):
        """The part whose result may be reused in the next evaluations."""
        return self._apply(params, inputs, "deep_features")

    def finish(self, params, *inputs):
        """The rest, given that result."""
        return self._apply(params, inputs, "finish")

    def _apply(self, params, inputs, method=None):
        with nn.intercept_methods(products(self.eight_bits)) if self.eight_bits else contextlib.nullcontext():
            return self.unet.apply({"params": params}, *inputs, method=method)


def noise_predictor(unet: UNet, dtype: str) -> NoisePredictor:
    """Of a pipeline whose `dtype` has this name."""
    return NoisePredictor(unet, dtype if dtype in MOST else None)


def encode_text(
    encoder: CLIPTextEncoder, params: Any, ids: Int[np.ndarray, "t length"], sharding: NamedSharding | None
) -> tuple[Float[Array, "padded length e"], Float[Array, "padded e"]]:
    """Last hidden states and pooled states of texts, padded to whole chunks."""
    parts = [
        encode_text_chunk(encoder, sharding, params, spread(ids[chunk], sharding))
        for chunk in _chunks(len(ids), CHUNK, count_devices(sharding))
    ]
    return _join(parts, sharding)


def weigh_texts(
    hidden: Float[Array, "t length e"], weights: Float[np.ndarray, "n length"], sharding: NamedSharding | None
) -> Float[Array, "t length e"]:
    """States of texts times the weights of their tokens; texts beyond the weights are padding. See `_weigh`."""
    padded = np.concatenate([weights, np.ones((len(hidden) - len(weights), weights.shape[1]), np.float32)])
    return settled(_weigh(hidden, spread(padded, sharding), sharding), sharding)


@functools.partial(jax.jit, static_argnames="sharding")
def _weigh(
    hidden: Float[Array, "t length e"], weights: Float[Array, "t length"], sharding: NamedSharding | None
) -> Float[Array, "t length e"]:
    """States of texts times the weights of their tokens, each text scaled back to the mean that it had."""

    def run(hidden, weights):
        wide = hidden.astype(jnp.float32)
        weighed = wide * weights[..., None]
        before, after = (x.mean(axis=(1, 2), keepdims=True) for x in (wide, weighed))
        return (weighed * jnp.where(after == 0, 1, before / after)).astype(hidden.dtype)

    return on_each_device(run, sharding)(hidden, weights)


def make_conditions(
    networks: SamplingNetworks,
    params: dict[str, Any],
    inputs: Sequence[ConditionInput],
    hidden: Float[Array, "t length e"],
    pooled: Float[Array, "p e"],
    sharding: NamedSharding | None,
    rows: Int[np.ndarray, "texts parts"] | None = None,
) -> Conditions:
    """Keys and values of conditions, padded to whole chunks.

    Args:
        networks: of which UNet and UniFusion make them.
        params: trees of unet and unifusion.
        inputs: what each is made of.
        hidden: of the texts that `inputs` index.
        pooled: of the phrases that `inputs` index.
        sharding: how they are split over a mesh.
        rows: the entries of `hidden` that make up each text; None: one each, in order.
    """
    texts = np.array([[entry.text] if rows is None else rows[entry.text] for entry in inputs])
    phrases = np.full((len(inputs), groundings.MAX_INSTANCES), -1)
    for row, entry in zip(phrases, inputs, strict=True):
        row[: len(entry.phrases)] = entry.phrases
    parts = []
    for chunk in _chunks(len(inputs), CHUNK, count_devices(sharding)):
        batch = groundings.stack([inputs[i].grounding for i in chunk])
        del batch["phrase_embeddings"]
        use_maps = bool(batch["has_map"].any())
        if not use_maps:
            del batch["maps"]
        arrays = spread((batch, phrases[chunk]), sharding)
        context = take(hidden, texts[chunk].reshape(-1), sharding)
        embeddings = take(pooled, np.maximum(phrases[chunk], 0), sharding)
        trees = params["unifusion"], params["unet"]
        made = make_conditions_chunk(networks, sharding, use_maps, trees, *arrays, embeddings, context)
        parts.append(settled(made, sharding))
    return _join(parts, sharding)


def decode(
    autoencoder: Autoencoder | TinyDecoder,
    params: Any,
    latents: Float[Array, "b h w z"],
    most: int,
    sharding: NamedSharding | None,
    tile: int | None = None,
) -> list[tuple[UInt8[Array, "n H W 3"], Bool[Array, "n"]]]:
    """Pixels and whether they were finite, in equal parts of at most `most` images per device; the last is padded.

    In tiles of `tile` latents a side, if given. See `Pipeline.decode`.
    """
    count, devices = len(latents), count_devices(sharding)
    calls = -(-count // (most * devices))
    size = -(-count // (calls * devices)) * devices
    latents, parts = spread(latents, sharding), []
    for first in range(0, count, size):
        part = take(latents, np.minimum(np.arange(first, first + size), count - 1), sharding)
        parts.append(settled(decode_chunk(autoencoder, sharding, params, part, tile), sharding))
    return parts


@functools.partial(jax.jit, static_argnums=0)
def encode(autoencoder: Autoencoder, params: Any, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
    """The mean latents of images in [−1, 1], scaled."""
    mean, _ = autoencoder.apply({"params": params}, image, method="encode")
    return mean.astype(jnp.float32) * autoencoder.config.scale_factor


def _chunks(count: int, size: int, devices: int) -> Int[np.ndarray, "chunks n"]:
    """Indices, `size` per device at a time, so that `_join` puts them in order; the last index pads."""
    chunks = -(-count // (size * devices))
    numbers = np.arange(chunks * size * devices).reshape(devices, chunks, size)
    return np.minimum(numbers.transpose(1, 0, 2).reshape(chunks, -1), count - 1)


@functools.partial(jax.jit, static_argnames="sharding")
def _join(parts: list[Any], sharding: NamedSharding | None) -> Any:
    """Concatenates trees, each device its own part."""

    def local(*parts: Any) -> Any:
        return jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)

    return on_each_device(local, sharding)(*parts)


@functools.partial(jax.jit, static_argnums=(0, 1))
def encode_text_chunk(
    encoder: CLIPTextEncoder, sharding: NamedSharding | None, params: Any, ids: Int[Array, "t length"]
) -> tuple[Array, Array]:
    """The program of `encode_text` for one chunk."""

    def run(params, ids):
        hidden, pooled = encoder.apply({"params": params}, ids)
        return hidden, pooled.astype(jnp.float32)

    return on_each_device(run, sharding, whole=(0,))(params, ids)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def make_conditions_chunk(
    networks: SamplingNetworks,
    sharding: NamedSharding | None,
    use_maps: bool,
    params: tuple[Any, Any],
    grounding: dict[str, Array],
    phrases: Int[Array, "u 30"],
    embeddings: Float[Array, "u 30 e"],
    context: Float[Array, "parts length e"],
) -> Conditions:
    """The program of `make_conditions` for one chunk. A phrase of −1 is an empty slot."""

    def run(params, grounding, phrases, embeddings, context):
        context = context.reshape(len(phrases), -1, context.shape[-1])
        given = jnp.where(phrases[..., None] >= 0, embeddings, 0.0)
        grounding = grounding | {"phrase_embeddings": given}
        tokens = networks.unifusion.apply({"params": params[0]}, grounding, use_maps)
        return networks.unet.apply({"params": params[1]}, context, tokens, method="condition")

    return on_each_device(run, sharding, whole=(0,))(params, grounding, phrases, embeddings, context)


@functools.partial(jax.jit, static_argnums=(0, 1, 4))
def decode_chunk(
    autoencoder: Autoencoder | TinyDecoder,
    sharding: NamedSharding | None,
    params: Any,
    latents: Float[Array, "b h w z"],
    tile: int | None = None,
) -> tuple[UInt8[Array, "b H W 3"], Bool[Array, "b"]]:
    """The program of `decode` for one part."""

    def run(params, latents):
        def decode(latents):
            return autoencoder.apply({"params": params}, latents, method="decode")

        image = decode(latents) if tile is None else decode_tiles(decode, latents, tile)
        pixels = ((jnp.clip(image, -1, 1) * 0.5 + 0.5) * 255).astype(jnp.uint8)
        return pixels, jnp.isfinite(image).all(axis=(1, 2, 3))  # as pixels, NaN would be black

    return on_each_device(run, sharding, whole=(0,))(params, latents)
