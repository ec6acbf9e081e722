"""A run's inputs: the datasets, the embeddings and latents computed once from them, and the device batches."""

import dataclasses
import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, UInt8

from instdiff_jax.buckets import as_path
from instdiff_jax.checkpoint.folder import read_config as read_folder
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.latents import LatentCache, cache_latents
from instdiff_jax.data.loader import DevicePrefetch, LoaderSettings, Sources, make_loader
from instdiff_jax.data.phrases import PhraseTable, phrase_table
from instdiff_jax.errors import InputError
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.parallel.mesh import REPLICATED, process_rows, put_batch
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.start import base_fingerprint
from instdiff_jax.training.state import Params, ShardingPlan, make_networks
from instdiff_jax.training.step import batch_keys


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Makes a run's batches. `sources` has the training split."""

    run: RunSettings
    plan: ShardingPlan
    sources: Sources

    def batches(self, start: int) -> DevicePrefetch:
        """Endless training batches on the devices, from step `start` on. Close it at the end."""
        data = self.run.data
        settings = dataclasses.replace(self._settings(), workers=data.workers, prefetch=data.prefetch)
        return DevicePrefetch(make_loader(self.sources, settings, start), self.put, data.prefetch)

    def validation_batches(self) -> list[dict[str, Any]]:
        """The validation split's first batches, on the host: in order, nothing dropped or flipped."""
        dataset = InstanceDataset(self.run.data.dir, self.run.data.validation_split)
        sources = self.sources._replace(dataset=dataset, latents=None)
        examples = self.run.data.examples.without_chance()
        loader = make_loader(sources, dataclasses.replace(self._settings(), examples=examples, shuffle=False))
        return [next(loader) for _ in range(self.run.train.validation_batches)]

    def put(self, batch: Mapping[str, Any]) -> dict[str, Array]:
        """Puts the arrays that the loss reads on the mesh, as global arrays."""
        keys = batch_keys(self.run.train)
        return put_batch({key: value for key, value in batch.items() if key in keys}, self.plan.mesh)

    def _settings(self) -> LoaderSettings:
        train, examples, masked = self.run.train, self.run.data.examples, None
        if train.masked_attention != "none":
            masked = train.masked_attention, examples.image_size // self.run.model.latent_stride
        return LoaderSettings(
            examples=examples,
            batch_size=train.batch_size,
            rows=process_rows(train.batch_size, self.plan.mesh),
            seed=train.seed,
            masked=masked,
        )


def open_inputs(
    run: RunSettings, plan: ShardingPlan, dataset: InstanceDataset, tokenizer: Tokenizer, frozen: Params
) -> Inputs:
    """Opens the run's inputs. Computes missing phrase embeddings, and missing latents if the config asks for them."""
    phrases = open_phrases(run, plan, frozen, tokenizer)
    latents = open_latents(run, plan, frozen, dataset)
    return Inputs(run, plan, Sources(dataset, tokenizer.encode_prompts, phrases, latents))


def check_data(run: RunSettings) -> None:
    """Raises InputError if the examples do not match the networks, or the networks do not match each other."""
    examples, stride, model = run.data.examples, run.model.canvas_stride, run.model
    fits = {
        "unet.in_channels": (model.unet.in_channels, "autoencoder.z_channels", model.autoencoder.z_channels),
        "unet.out_channels": (model.unet.out_channels, "unet.in_channels", model.unet.in_channels),
        "unet.context_dim": (model.unet.context_dim, "text_encoder.hidden_size", model.text_encoder.hidden_size),
    }
    for name, (value, other, expected) in fits.items():
        if value != expected and run.train.task == "diffusion":
            raise InputError(f"config.model.{name}: expected {other}, which is {expected}, got {value}")
    if examples.image_size % stride:
        raise InputError(f"config.data.examples.image_size: expected a multiple of {stride}, got {examples.image_size}")
    if examples.map_size != run.model.unifusion.map_size:
        expected = run.model.unifusion.map_size
        raise InputError(f"config.data.examples.map_size: expected the model's {expected}, got {examples.map_size}")
    if run.data.cache_latents and run.train.task != "diffusion":
        raise InputError(f"config.data.cache_latents: the {run.train.task} task has no use for latents; expected False")


def open_tokenizer(run: RunSettings) -> Tokenizer:
    """The tokenizer of the checkpoint that the run starts from; without a checkpoint, the config's."""
    text = run.model.text_encoder
    name = read_folder(run.train.start)[0].text_encoder.tokenizer if run.train.start else text.tokenizer
    return Tokenizer(find_tokenizer(name, text.vocab_size), text.vocab_size, text.max_length)


class NoPhrases:
    """Replaces a phrase table when no network reads phrases."""

    def __init__(self, width: int):
        self._width = width

    def lookup(self, numbers: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n width"]:
        return np.zeros((*numbers.shape, self._width), np.float32)


def open_phrases(run: RunSettings, plan: ShardingPlan, params: Params, tokenizer: Tokenizer) -> PhraseTable | NoPhrases:
    """The embeddings of the dataset's phrases; computes them if this text encoder has not embedded them yet."""
    if run.train.task != "diffusion" or not run.train.grounding:
        return NoPhrases(run.model.unet.context_dim)
    encoder = make_networks(run.model, run.train).text_encoder.clone(dtype=jnp.float32)
    local = on_one_device(params["text_encoder"], plan)
    embed = functools.partial(_embed, jax.jit(functools.partial(_pooled, encoder)), local, tokenizer)
    fingerprint = base_fingerprint(run.train, run.model, "text_encoder") + _dtype_suffix(run)
    return first_process_first(
        functools.partial(phrase_table, run.data.dir, fingerprint, embed, use_imported=run.data.imported_phrases)
    )


def _pooled(encoder: nn.Module, params: Params, ids: Int[Array, "n length"]) -> Float[Array, "n width"]:
    return encoder.apply({"params": params}, ids)[1]


def _embed(encode: Callable, params: Params, tokenizer: Tokenizer, phrases: list[str]) -> Float[np.ndarray, "n width"]:
    # Every machine's table is the same: by default TPUs and recent GPUs would shorten the operands.
    with jax.default_matmul_precision("highest"):
        return np.asarray(encode(params, tokenizer.encode_phrases(phrases)))


def open_latents(run: RunSettings, plan: ShardingPlan, params: Params, dataset: InstanceDataset) -> LatentCache | None:
    """The latents of all images; computes them if they are missing. None if the config does not ask for them."""
    if not run.data.cache_latents:
        return None
    autoencoder = make_networks(run.model, run.train).autoencoder
    encode = functools.partial(
        jax.jit(functools.partial(_posterior, autoencoder)), on_one_device(params["autoencoder"], plan)
    )
    fingerprint = base_fingerprint(run.train, run.model, "autoencoder")
    size, flips = run.data.examples.image_size, run.data.examples.flip > 0
    name = f"{dataset.split}-{size}-{fingerprint[:16]}{_dtype_suffix(run)}" + "-unflipped" * (not flips)
    path = as_path(run.data.dir) / "latents" / name
    cache = first_process_first(functools.partial(cache_latents, encode, dataset, path, fingerprint, size, flips=flips))
    if jax.process_index() == 0:
        # The noise has standard deviation 1. Much smaller latents drown in it; much larger ones never become noise.
        deviation = run.model.autoencoder.scale_factor * cache.deviation()
        print(f"latents: standard deviation {deviation:.3f}; expected about 1", file=sys.stderr)
    return cache


def _posterior(autoencoder: nn.Module, params: Params, images: UInt8[Array, "b H W 3"]) -> tuple[Array, Array]:
    pixels = images.astype(jnp.float32) / 127.5 - 1
    mean, logvar = autoencoder.apply({"params": params}, pixels, method="encode")
    return mean.astype(jnp.float32), logvar.astype(jnp.float32)


def _dtype_suffix(run: RunSettings) -> str:
    """Marks the run's dtype: frozen parameters are rounded to it, which changes what they encode."""
    return "" if run.train.dtype == "float32" else f"-{run.train.dtype}"


def _identity(tree: Params) -> Params:
    return tree


def on_one_device(tree: Params, plan: ShardingPlan) -> Params:
    """Copies the whole tree to this process's first device. Every process of the job must call it."""
    whole = jax.jit(_identity, out_shardings=jax.NamedSharding(plan.mesh, REPLICATED))(tree)
    return jax.tree.map(lambda leaf: leaf.addressable_data(0), whole)


def first_process_first(make: Callable[[], Any]) -> Any:
    """Calls `make` on process 0, then on the others, which read the files that process 0 wrote."""
    if jax.process_index() == 0:
        result = make()
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("made by the first process")
    return result if jax.process_index() == 0 else make()
