"""Layouts and a checkpoint in, pictures out: the one place that composes text, grounding, networks and sampler.

Axes: b batch, u unique conditions, h and w latent height and width, H and W pixels.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int, UInt8

from instdiff_jax import grounding as groundings
from instdiff_jax.compilation import enable_compilation_cache
from instdiff_jax.config import ModelConfig, SamplingConfig, with_preset
from instdiff_jax.diffusion.multi_instance import ImageRows, Inpaint, sample_rows
from instdiff_jax.diffusion.schedule import q_sample
from instdiff_jax.diffusion.solvers import SolverTable, solver_table
from instdiff_jax.errors import InputError
from instdiff_jax.grounding import Format
from instdiff_jax.layout import Layout
from instdiff_jax.loading import load_model
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.starts import Start, any_in_cell, check_seed, check_start, initial_noise
from instdiff_jax.text import Tokenizer

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Entries that the text encoder and UniFusion see at a time: one small program for any number of them.
_CHUNK = 4
# Rows denoised at a time, a device: what memory allows at 512×512 with the full model, and how many times as many a
# small model or canvas may have: one large program then does for many layouts what several small ones would.
_MAX_ROWS = {"cpu": 8, "gpu": 64, "tpu": 8}
_FULL_SIZE, _MOST_ROWS = 64 * 64 * 320, 16
_DECODE_CHUNK = {"cpu": 1, "gpu": 8, "tpu": 2}


@dataclasses.dataclass(frozen=True)
class Result:
    """One picture: pixels, the latents it was decoded from, and what it was made of."""

    image: UInt8[np.ndarray, "H W 3"]
    latents: Float[np.ndarray, "h w z"]
    seed: int
    layout: Layout


@dataclasses.dataclass(frozen=True)
class NoisePredictor:
    """The UNet as the sampler wants it; equal for equal networks, so that programs are shared."""

    unet: UNet

    def __call__(self, params, latents, timesteps, conditions, alpha):
        return self.unet.apply({"params": params}, latents, timesteps, conditions, alpha)


class Pipeline:
    """Samples pictures that obey layouts.

        pipeline = Pipeline.from_checkpoint("checkpoints/sd15")
        for result in pipeline([Layout.from_json("layout.json")], seeds=[0, 1]):
            PIL.Image.fromarray(result.image).save(f"{result.seed}.png")

    Attributes:
        config: the model's sizes.
        sampling: the checkpoint's sampling settings; a call may override them.
    """

    def __init__(
        self,
        config: ModelConfig,
        sampling: SamplingConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        max_rows: int | None = None,
    ):
        """Use `from_checkpoint`, unless the parameters are at hand.

        Args:
            params: trees of unet, unifusion, autoencoder and text_encoder.
            dtype: what the networks compute in; norms, softmax and solver are in float32 in any case.
            mesh: with axes data and fsdp; rows are split over both. None: one device.
            max_rows: rows denoised at a time a device; more run one after another. None: what the platform's memory
                allows for this model and canvas.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        platform = jax.default_backend()
        devices = 1 if mesh is None else mesh.size
        self.config, self.sampling, self.dtype, self._tokenizer = config, sampling, dtype, tokenizer
        self._devices, self._given_rows, self._default_rows = devices, max_rows, _MAX_ROWS.get(platform, 8)
        self._decode_chunk = _DECODE_CHUNK.get(platform, 1)
        self._sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        if mesh is not None:
            params = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
        self._params = params
        settings = dict(dtype=DTYPES[dtype])
        self._predict_noise = NoisePredictor(UNet(config.unet, **settings))
        self._unifusion = UniFusion(config.unifusion, config.unet.context_dim, **settings)
        self._text_encoder = CLIPTextEncoder(config.text_encoder, **settings)
        # As the official code: decoded in float32 whatever the sampling was in.
        self._autoencoder = Autoencoder(config.autoencoder, dtype=jnp.float32)

    @classmethod
    def from_checkpoint(
        cls,
        directory: str | Path,
        dtype: str = "float32",
        mesh: Mesh | None = None,
        max_rows: int | None = None,
    ) -> Self:
        """Loads a checkpoint folder, or a training run's workdir; needs no network.

        Raises:
            InputError: for a folder that is no checkpoint, is damaged, or has no adapters to sample with.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        enable_compilation_cache()
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return cls(*load_model(directory, DTYPES[dtype], sharding), dtype, mesh, max_rows)

    def __call__(self, layouts: Sequence[Layout], seeds: Sequence[int] = (0,), **options: Any) -> list[Result]:
        """All results of `stream`, layout by layout, and seed by seed within a layout."""
        return list(self.stream(layouts, seeds, **options))

    def stream(
        self,
        layouts: Sequence[Layout],
        seeds: Sequence[int] = (0,),
        *,
        layout_seeds: Sequence[int] | None = None,
        format: Format = "auto",
        drop: Collection[str] = (),
        width: int | None = None,
        height: int | None = None,
        noise: Float[np.ndarray, "n h w z"] | None = None,
        init_image: UInt8[np.ndarray, "H W 3"] | None = None,
        inpaint_mask: Bool[np.ndarray, "H W"] | None = None,
        strength: float | None = None,
        preset: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        **overrides: Any,
    ) -> Iterator[Result]:
        """Samples every layout with every seed; results come batch by batch, in order.

        Args:
            layouts: what to draw.
            seeds: one picture of each layout for each; a picture depends on its own seed alone.
            layout_seeds: one picture of each layout, with the layout's own seed, instead of `seeds`.
            format: which of an instance's places count, see `grounding.make_grounding`.
            drop: formats that do not count in any case, for ablations.
            width, height: of the pictures in pixels; a layout's own canvas where not given.
            noise: the initial noise for each seed, instead of the seed's own.
            init_image: start from this picture, or keep parts of it; every layout gets the same.
            inpaint_mask: paint only where this is True, and keep `init_image` elsewhere.
            strength: share of the steps that run, on `init_image` noised to the first of them; 1 starts from
                noise alone. By default 1 with an `inpaint_mask` and 0.75 without.
            preset: a set of settings of `config.PRESETS`, which `overrides` go before.
            progress: called with UNet evaluations done and in all.
            overrides: settings of `SamplingConfig`.

        Raises:
            InputError: for a setting out of range, or a canvas that the networks do not allow.
        """
        settings = self.settings(preset, **overrides)
        start = check_start(init_image, inpaint_mask, strength)
        if strength is None:
            strength = 0.75 if start is not None and start.repaint is None else 1.0
        if layout_seeds is not None and len(layout_seeds) != len(layouts):
            raise InputError(f"layout_seeds: expected one for each of {len(layouts)} layouts, got {len(layout_seeds)}")
        job = _Job(
            layouts=list(layouts),
            seeds=[check_seed(seed) for seed in (seeds if layout_seeds is None else layout_seeds)],
            seed_per_layout=layout_seeds is not None,
            canvases=[self._canvas(layout, width, height) for layout in layouts],
            settings=settings,
            table=solver_table(settings.sampler, settings.steps, self.config.schedule, settings.alpha, strength),
            format=format,
            drop=tuple(drop),
            noise=noise,
            start=start,
            from_noise=strength == 1,
        )
        self._check_arrays(job)
        batches = list(self._batches(job))
        for number, batch in enumerate(batches):
            report = None if progress is None else functools.partial(_report, progress, number, len(batches))
            yield from self._sample(job, batch, report)

    def settings(self, preset: str | None = None, **overrides: Any) -> SamplingConfig:
        """The sampling settings of a call with this preset and these overrides; InputError for one out of its range."""
        return SamplingConfig.from_dict(self.sampling.to_dict() | with_preset(preset, overrides), "sampling")

    def without_scaleu(self) -> Self:
        """This pipeline with ScaleU's b and s zero, so that it changes nothing: for ablations. Programs are shared."""
        unet = self._params["unet"]
        off = {name: jax.tree.map(jnp.zeros_like, part) for name, part in unet.items() if name.startswith("scaleu_")}
        other = copy.copy(self)
        other._params = self._params | {"unet": unet | off}
        return other

    def decode(self, latents: Float[Array, "b h w z"]) -> UInt8[np.ndarray, "b H W 3"]:
        """Latents to pixels: clamped to [−1, 1], × 0.5 + 0.5, × 255, truncated (as released)."""
        images = []
        for part in _chunks(jnp.asarray(latents), self._decode_chunk):
            images.append(np.asarray(_decode(self._autoencoder, self._params["autoencoder"], part)))
        return np.concatenate(images)[: len(latents)]

    def _max_rows(self, canvas: tuple[int, int]) -> int:
        """Rows of one program on a canvas of this width and height in pixels, over all devices."""
        if self._given_rows is not None:
            return self._given_rows * self._devices
        size = canvas[0] * canvas[1] // self.config.latent_stride**2 * self.config.unet.model_channels
        times = min(max(_FULL_SIZE / size, 1 / self._default_rows), _MOST_ROWS)
        return int(self._default_rows * times) * self._devices

    def _batches(self, job: "_Job") -> Iterator[list[tuple[int, int]]]:
        """Runs of (layout, seed index) of one canvas, in order, that fit the rows of one program."""
        batch, rows = [], 0
        for i, layout in enumerate(job.layouts):
            for k in [i] if job.seed_per_layout else range(len(job.seeds)):
                size = 1 + len(layout.instances) * (job.mis_steps > 0)
                canvas = job.canvases[i]
                if batch and (rows + size > self._max_rows(canvas) or canvas != job.canvases[batch[-1][0]]):
                    yield batch
                    batch, rows = [], 0
                batch.append((i, k))
                rows += size
        if batch:
            yield batch

    def _sample(
        self, job: "_Job", batch: list[tuple[int, int]], progress: Callable[[int, int], None] | None
    ) -> Iterator[Result]:
        numbers = sorted({i for i, _ in batch})
        width, height = job.canvases[numbers[0]]
        stride = self.config.latent_stride
        shape = (height // stride, width // stride, self.config.autoencoder.z_channels)
        with jax.default_matmul_precision("highest" if self.dtype == "float32" else "default"):
            conditions, rows = self._conditions(job, numbers, shape[:2])
            used = {k for _, k in batch}
            given = {k: initial_noise(job.seeds[k], shape) for k in used} if job.noise is None else job.noise
            first = noise = jnp.asarray(np.stack([given[k] for _, k in batch]), jnp.float32)
            inpaint = None
            if job.start is not None:
                known = jnp.broadcast_to(self._encode(job.start.image), noise.shape)
                if not job.from_noise:
                    times = jnp.full(len(batch), job.table.first_timestep)
                    first = q_sample(known, noise, times, self.config.schedule)
                if job.start.repaint is not None:
                    keep = 1.0 - any_in_cell(job.start.repaint, stride).astype(np.float32)[None, :, :, None]
                    inpaint = Inpaint(known, jnp.broadcast_to(keep, (*noise.shape[:3], 1)), noise)
            latents = sample_rows(
                self._predict_noise,
                self._params["unet"],
                first,
                conditions,
                [rows[numbers.index(i)] for i, _ in batch],
                job.table,
                mis_steps=job.mis_steps,
                guidance_scale=job.settings.guidance_scale,
                guidance_interval=job.settings.guidance_interval,
                mis_guidance=job.settings.mis_guidance,
                merge=job.settings.merge,
                inpaint=inpaint,
                max_rows=self._max_rows((width, height)),
                sharding=self._sharding,
                progress=progress,
            )
            images = self.decode(latents)
        for (i, k), image, latent in zip(batch, images, np.asarray(latents), strict=True):
            if job.start is not None and job.start.repaint is not None:
                image = np.where(job.start.repaint[..., None], image, job.start.image)
            yield Result(image, latent, job.seeds[k], job.layouts[i])

    def _conditions(self, job: "_Job", numbers: list[int], grid: tuple[int, int]) -> tuple[dict, list[ImageRows]]:
        """The unique conditions of some layouts, and each layout's rows: its own, its instances', the negative one."""
        entries, texts, rows = [], [], []
        negative = sum(1 + len(job.layouts[i].instances) * (job.mis_steps > 0) for i in numbers)
        phrases = sorted({instance.caption for i in numbers for instance in job.layouts[i].instances})
        _, phrase_embeddings = self._encode_text(self._tokenizer.encode_phrases(phrases))
        embedding_of = dict(zip(phrases, phrase_embeddings, strict=True))
        for i in numbers:
            layout = job.layouts[i]
            whole = groundings.make_grounding(layout, self.config, job.format, job.drop)
            for slot, instance in enumerate(layout.instances):
                whole["phrase_embeddings"][slot] = embedding_of[instance.caption]
            alone = groundings.instance_groundings(whole) if job.mis_steps else []
            first = len(entries)
            rows.append(
                ImageRows(
                    layout=first,
                    negative=negative,
                    instances=tuple(range(first + 1, first + 1 + len(alone))),
                    boxes=[tuple(single["boxes"][0]) for single in alone],
                )
            )
            entries += [whole, *alone]
            texts += [layout.caption, *(instance.caption for instance in layout.instances[: len(alone)])]
        null = groundings.null_grounding(self.config.unifusion.map_size, self.config.unet.context_dim)
        entries.append(null)
        texts.append(job.settings.negative_prompt)

        unique = sorted(set(texts))
        hidden, _ = self._encode_text(self._tokenizer.encode_prompts(unique))
        context = jnp.stack([hidden[unique.index(text)] for text in texts])
        parts = []
        for first in range(0, len(entries), _CHUNK):
            # The last chunk is filled with null groundings: one program for any number of entries.
            filled = [*entries[first : first + _CHUNK], *[null] * (first + _CHUNK - len(entries))]
            batch = groundings.stack(filled)
            part = _pad(context[first : first + _CHUNK], _CHUNK)
            use_maps = bool(batch["has_map"].any())
            if not use_maps:
                batch.pop("maps")
            modules = self._unifusion, self._predict_noise.unet
            parts.append(_condition(modules, self._params["unifusion"], self._params["unet"], batch, part, use_maps))
        conditions = jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[: len(entries)], *parts)
        if job.settings.masked_attention != "none":
            words = [groundings.region_words(entry, *grid, job.settings.masked_attention) for entry in entries]
            visual, tokens = (jnp.asarray(np.stack(column)) for column in zip(*words, strict=True))
            conditions["regions"] = {"visual": visual, "tokens": tokens}
        return conditions, rows

    def _encode_text(self, ids: Int[np.ndarray, "n 77"]) -> tuple[Array, Float[np.ndarray, "n e"]]:
        """Last hidden states and pooled states of texts."""
        parts = [
            _encode_text(self._text_encoder, self._params["text_encoder"], part)
            for part in _chunks(jnp.asarray(ids), _CHUNK)
        ]
        hidden, pooled = (jnp.concatenate(column)[: len(ids)] for column in zip(*parts, strict=True))
        return hidden, np.asarray(pooled, np.float32)

    def _encode(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[Array, "1 h w z"]:
        pixels = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
        return _encode(self._autoencoder, self._params["autoencoder"], pixels)

    def _canvas(self, layout: Layout, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height of a layout's picture in pixels."""
        multiple = self.config.canvas_stride
        size = []
        for name, side in (("width", width or layout.width), ("height", height or layout.height)):
            if side % multiple or side <= 0:
                nearest = max(multiple, round(side / multiple) * multiple)
                raise InputError(
                    f"{layout.name}: {name}: expected a multiple of {multiple} pixels, got {side}; nearest: {nearest}"
                )
            size.append(side)
        return tuple(size)

    def _check_arrays(self, job: "_Job") -> None:
        """Raises where given noise or pictures do not fit the canvases."""
        for width, height in job.canvases:
            if job.noise is not None:
                stride = self.config.latent_stride
                expected = (len(job.seeds), height // stride, width // stride, self.config.autoencoder.z_channels)
                if np.shape(job.noise) != expected or not np.isfinite(job.noise).all():
                    found = "numbers that are not finite" if np.shape(job.noise) == expected else np.shape(job.noise)
                    raise InputError(f"noise: expected float32 of shape {expected}, got {found}")
            if job.start is not None and job.start.image.shape[:2] != (height, width):
                found = "×".join(map(str, job.start.image.shape[1::-1]))
                raise InputError(f"init_image: expected {width}×{height} pixels as the canvas, got {found}")


@dataclasses.dataclass(frozen=True)
class _Job:
    """One call of `stream`, checked."""

    layouts: list[Layout]
    seeds: list[int]
    seed_per_layout: bool  # layout i with seed i alone, instead of every layout with every seed
    canvases: list[tuple[int, int]]
    settings: SamplingConfig
    table: SolverTable
    format: Format
    drop: tuple[str, ...]
    noise: np.ndarray | None
    start: Start | None
    from_noise: bool

    @property
    def mis_steps(self) -> int:
        """M, counted on the steps that really run (as released)."""
        return int(self.table.steps * self.settings.mis)


def _report(progress: Callable[[int, int], None], batch: int, batches: int, done: int, total: int) -> None:
    """Progress over batches; one not yet begun counts like this one."""
    progress(batch * total + done, batches * total)


def _pad(x: Array, count: int) -> Array:
    return jnp.concatenate([x, jnp.repeat(x[-1:], count - len(x), axis=0)]) if len(x) < count else x


def _chunks(x: Array, size: int) -> Iterator[Array]:
    """Equal parts of a batch, the last one filled up with its last entry."""
    for first in range(0, len(x), size):
        yield _pad(x[first : first + size], size)


@functools.partial(jax.jit, static_argnums=0)
def _encode_text(encoder: CLIPTextEncoder, params: Any, ids: Int[Array, "b 77"]) -> tuple[Array, Array]:
    return encoder.apply({"params": params}, ids)


@functools.partial(jax.jit, static_argnums=(0, 5))
def _condition(modules: tuple[UniFusion, UNet], unifusion, unet, grounding, context, use_maps: bool) -> Any:
    tokens = modules[0].apply({"params": unifusion}, grounding, use_maps)
    return modules[1].apply({"params": unet}, context, tokens, method="condition")


@functools.partial(jax.jit, static_argnums=0)
def _decode(autoencoder: Autoencoder, params: Any, latents: Float[Array, "b h w z"]) -> UInt8[Array, "b H W 3"]:
    image = autoencoder.apply({"params": params}, latents, method="decode")
    return ((jnp.clip(image, -1, 1) * 0.5 + 0.5) * 255).astype(jnp.uint8)


@functools.partial(jax.jit, static_argnums=0)
def _encode(autoencoder: Autoencoder, params: Any, image: Float[Array, "b H W 3"]) -> Float[Array, "b h w z"]:
    mean, _ = autoencoder.apply({"params": params}, image, method="encode")
    return mean.astype(jnp.float32) * autoencoder.config.scale_factor
