"""Layouts and a checkpoint in, pictures out: the one place that composes text, grounding, networks and sampler.

Nothing waits for a device before the next batch is on its way to it, so that the host's work and the transfer of
pictures hide behind denoising.

Axes: b batch, n pictures, h and w latent height and width, H and W pixels.
"""

import copy
import dataclasses
import itertools
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt8

from instdiff_jax.config import ModelConfig, SamplingConfig, with_preset
from instdiff_jax.diffusion.multi_instance import ImageRows, Inpaint, Mark, sample_rows
from instdiff_jax.diffusion.schedule import q_sample
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.errors import InputError
from instdiff_jax.grounding import Format
from instdiff_jax.layout import MAX_SIDE, Layout
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.regions import region_bits
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import NUM_TOKENS, UniFusion
from instdiff_jax.parallel.rows import device_of
from instdiff_jax.parallel.runtime import enable_compilation_cache, return_compiler_memory, spare_compiler_memory
from instdiff_jax.sampling import programs
from instdiff_jax.sampling.conditions import list_entries
from instdiff_jax.sampling.loading import load_model
from instdiff_jax.sampling.request import Flight, Job, Picture, one_ahead
from instdiff_jax.sampling.start import any_in_cell, check_canvas, check_seed, check_start, initial_noise

DTYPES = {"float32": jnp.float32, "bfloat16": jnp.bfloat16, "float16": jnp.float16}
# Rows denoised at a time, a device, at 512×512: what memory allows with the full model. On a CPU a single one keeps the
# cores busy: more only take memory, and programs of their own. Small latents may have so many times as many: one large
# program then does for many layouts what several small ones would.
_MAX_ROWS = {"cpu": 1, "gpu": 64, "tpu": 8}
_FULL_LATENTS, _MOST_ROWS = 64 * 64, 16
# Bytes that a row of the full model takes in a 16-bit type at 512×512, and what lies beside rows and parameters: the
# row and 7.22 GB less about 2.7 GB of parameters of docs/performance.md, "Memory", an upper bound. Not seen on a GPU.
_ROW, _BESIDE = 0.36e9, 4.5e9
# Pictures decoded at a time, a device, at 512×512 with the full model; their number follows the size as that of rows.
_DECODED = {"cpu": 1, "gpu": 8, "tpu": 2}
_FULL_PICTURE = 512 * 512 * 128
# Bytes that decoding one of them takes (docs/performance.md, "Memory").
_PICTURE = 0.81e9


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

    def deep(self, params, *inputs):
        """The part that may be reused in the next evaluations."""
        return self.unet.apply({"params": params}, *inputs, method="deep_features")

    def finish(self, params, *inputs):
        """The rest, given that."""
        return self.unet.apply({"params": params}, *inputs, method="finish")


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
            max_rows: rows denoised at a time a device; more run one after another. None: what suits the platform and
                the canvas.
        """
        if dtype not in DTYPES:
            raise InputError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
        platform = jax.default_backend()
        if platform == "cpu":
            return_compiler_memory()
        devices = 1 if mesh is None else mesh.size
        self.config, self.sampling, self.dtype, self._tokenizer = config, sampling, dtype, tokenizer
        self._devices, self._given_rows, self._default_rows = devices, max_rows, _MAX_ROWS.get(platform, 1)
        self._default_decoded = _DECODED.get(platform, 1)
        self._sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        # Bound to its device in any case: see `spread.beside`.
        alone = device_of(params) or jax.local_devices()[0]
        self._params = jax.device_put(params, alone if mesh is None else NamedSharding(mesh, PartitionSpec()))
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
        spare_compiler_memory()
        sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec())
        return cls(*load_model(directory, DTYPES[dtype], sharding), dtype, mesh, max_rows)

    def __call__(self, layouts: Sequence[Layout], seeds: Sequence[int] = (0,), **options: Any) -> list[Result]:
        """All results of `stream`, layout by layout, and seed by seed within a layout."""
        return list(self.stream(layouts, seeds, **options))

    def stream(
        self,
        layouts: Iterable[Layout],
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

        While a batch's results are taken, the next one is already being sampled, and there are never more than two:
        neither layouts nor results pile up. What goes wrong with a layout surfaces after the results before it.

        Args:
            layouts: what to draw. A collection is checked as a whole first, and so gone through twice; an iterator
                is read once, as it is needed.
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
            progress: called with UNet evaluations done and in all; of an iterator's layouts, all that have begun.
            overrides: settings of `SamplingConfig`.

        Raises:
            InputError: for a setting out of range, or a canvas that the networks do not allow.
        """
        settings = self.settings(preset, **overrides)
        start = check_start(init_image, inpaint_mask, strength)
        if strength is None:
            strength = 0.75 if start is not None and start.repaint is None else 1.0
        job = Job(
            seeds=[check_seed(seed) for seed in (seeds if layout_seeds is None else layout_seeds)],
            seed_per_layout=layout_seeds is not None,
            size=(width, height),
            settings=settings,
            table=solver_table(settings.sampler, settings.steps, self.config.schedule, settings.alpha, strength),
            format=format,
            drop=tuple(drop),
            noise=noise,
            start=start,
            from_noise=strength == 1,
        )
        once = iter(layouts) is layouts
        done, total = 0, 0 if once else self._check(job, layouts)
        flights = (self._launch(job, batch, progress is not None) for batch in self._batches(job, layouts))
        for flight in one_ahead(flights):
            total += job.evaluations(flight.batch) * once
            for mark in flight.marks or ():
                mark.ready.block_until_ready()
                done += mark.evaluations
                progress(done, total)
            yield from self._land(job, flight)
            del flight  # before the next but one is launched

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
        return np.concatenate([np.asarray(part) for part in self._decode(jnp.asarray(latents))])[: len(latents)]

    def _decode(self, latents: Float[Array, "b h w z"]) -> list[UInt8[Array, "n H W 3"]]:
        height, width = (side * self.config.latent_stride for side in latents.shape[1:3])
        params, most = self._params["autoencoder"], self._max_decoded((width, height))
        with jax.default_matmul_precision(self._precision):
            return programs.decode(self._autoencoder, params, latents, most, self._sharding)

    def _latent_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        width, height = (side // self.config.latent_stride for side in canvas)
        return height, width, self.config.autoencoder.z_channels

    def _max_rows(self, canvas: tuple[int, int], masked: bool = False) -> int:
        """Rows of one program on a canvas of this width and height in pixels, over all devices."""
        if self._given_rows is not None:
            return self._given_rows * self._devices
        latents = canvas[0] * canvas[1] // self.config.latent_stride**2
        rows = min(_fitting(self._default_rows, _FULL_LATENTS / latents), self._fitting_rows(latents, masked))
        return rows * self._devices

    def _fitting_rows(self, latents: int, masked: bool = False) -> int:
        """Rows of so many latents that a GPU's memory holds beside parameters, at least one; elsewhere any number."""
        size, itemsize = latents / _FULL_LATENTS, jnp.dtype(DTYPES[self.dtype]).itemsize
        width = self.config.unet.model_channels / 320 * itemsize / 2
        # cuDNN takes a mask as a bias of all pairs of tokens, here for the condition and the negative one.
        bias = 2 * 2 * latents * (latents + NUM_TOKENS) * (masked and itemsize == 2)
        return self._in_memory(_BESIDE * size, _ROW * size * width + bias)

    def _in_memory(self, beside: float, each: float) -> int:
        """How many things of `each` bytes a GPU holds beside parameters and `beside` bytes, at least one."""
        stats = jax.local_devices()[0].memory_stats() if jax.default_backend() == "gpu" else None
        if not stats or "bytes_limit" not in stats:
            return sys.maxsize
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(self._params))
        return max(1, int((stats["bytes_limit"] - held - beside) / each))

    def _max_decoded(self, canvas: tuple[int, int]) -> int:
        """Pictures of this width and height that a device decodes at a time."""
        size = canvas[0] * canvas[1] * self.config.autoencoder.ch / _FULL_PICTURE
        return min(_fitting(self._default_decoded, 1 / size), self._in_memory(0, _PICTURE * size))

    def _pictures(self, job: Job, layouts: Iterable[Layout]) -> Iterator[Picture]:
        """What to draw, one after the other, checked."""
        for number, layout in enumerate(layouts):
            canvas = self._canvas(layout, *job.size)
            check_canvas(canvas, self._latent_shape(canvas), len(job.seeds), job.noise, job.start)
            if job.seed_per_layout and number >= len(job.seeds):
                raise InputError(f"layout_seeds: expected one for each layout, got {len(job.seeds)}")
            for k in [number] if job.seed_per_layout else range(len(job.seeds)):
                yield Picture(number, layout, canvas, k)

    def _check(self, job: Job, layouts: Iterable[Layout]) -> int:
        """Goes through all pictures; returns the evaluations that they take."""
        evaluations, count = 0, 0
        for picture in self._pictures(job, layouts):
            evaluations, count = evaluations + job.evaluations([picture]), picture.number + 1
        if job.seed_per_layout and count != len(job.seeds):
            raise InputError(f"layout_seeds: expected one for each of {count} layouts, got {len(job.seeds)}")
        return evaluations

    def _batches(self, job: Job, layouts: Iterable[Layout]) -> Iterator[list[Picture]]:
        """Runs of pictures of one canvas, in order, that fit the rows of one program."""
        batch, rows, failure = [], 0, None
        try:
            for picture in self._pictures(job, layouts):
                size = 1 + len(job.alone(picture.layout))
                most = self._max_rows(picture.canvas, job.masked)
                if batch and (rows + size > most or picture.canvas != batch[0].canvas):
                    yield batch
                    batch, rows = [], 0
                batch.append(picture)
                rows += size
        except Exception as error:  # of a layout: those before it are drawn first
            failure = error
        if batch:
            yield batch
        if failure is not None:
            raise failure

    def _launch(self, job: Job, batch: list[Picture], watched: bool) -> Flight:
        """Puts all work of a batch on its way, and waits for none of it."""
        shape = self._latent_shape(batch[0].canvas)
        marks: list[Mark] | None = [] if watched else None
        with jax.default_matmul_precision(self._precision):
            conditions, rows = self._conditions(job, {picture.number: picture.layout for picture in batch}, shape[:2])
            used = {picture.k for picture in batch}
            given = {k: initial_noise(job.seeds[k], shape) for k in used} if job.noise is None else job.noise
            first = noise = jnp.asarray(np.stack([given[picture.k] for picture in batch]), jnp.float32)
            inpaint = None
            if job.start is not None:
                known = jnp.broadcast_to(self._encode(job.start.image), noise.shape)
                if not job.from_noise:
                    times = jnp.full(len(batch), job.table.first_timestep)
                    first = q_sample(known, noise, times, self.config.schedule)
                if job.start.repaint is not None:
                    paint = any_in_cell(job.start.repaint, self.config.latent_stride).astype(np.float32)
                    keep = jnp.broadcast_to(1.0 - paint[None, :, :, None], (*noise.shape[:3], 1))
                    inpaint = Inpaint(known, keep, noise)
            latents = sample_rows(
                self._predict_noise,
                self._params["unet"],
                first,
                conditions,
                [rows[picture.number] for picture in batch],
                job.table,
                mis_steps=job.mis_steps,
                guidance_scale=job.settings.guidance_scale,
                guidance_interval=job.settings.guidance_interval,
                mis_guidance=job.settings.mis_guidance,
                reuse=job.settings.reuse,
                merge=job.settings.merge,
                inpaint=inpaint,
                max_rows=self._max_rows(batch[0].canvas, job.masked),
                sharding=self._sharding,
                marks=marks,
            )
            images = self._decode(latents)
        for array in (latents, *images):
            array.copy_to_host_async()
        return Flight(batch, latents, images, marks)

    def _land(self, job: Job, flight: Flight) -> Iterator[Result]:
        """Waits for a batch's pictures, and lets go of what the devices hold of it."""
        images, latents = [np.asarray(part) for part in flight.images], np.asarray(flight.latents)
        for picture, image, latent in zip(flight.batch, itertools.chain(*images), latents, strict=False):
            if job.start is not None and job.start.repaint is not None:
                image = np.where(job.start.repaint[..., None], image, job.start.image)
            # Copies: on a CPU these are views, and one result that is kept would keep its whole batch.
            yield Result(image.copy(), latent.copy(), job.seeds[picture.k], picture.layout)

    @property
    def _precision(self) -> str:
        """Of matrix products: TPUs and recent GPUs would shorten float32 operands."""
        return "highest" if self.dtype == "float32" else "default"

    @property
    def _networks(self) -> programs.Networks:
        return programs.Networks(self._predict_noise.unet, self._unifusion)

    def _conditions(
        self, job: Job, layouts: dict[int, Layout], grid: tuple[int, int]
    ) -> tuple[dict, dict[int, ImageRows]]:
        """The unique conditions of some layouts, and each layout's rows."""
        settings, sharding, encoder = job.settings, self._sharding, self._text_encoder
        options = dict(format=job.format, drop=job.drop)
        listed = list_entries(layouts, settings.negative_prompt, self.config, **options, slots_alone=job.alone)
        ids = self._tokenizer.encode_prompts(listed.texts), self._tokenizer.encode_phrases(listed.phrases)
        (hidden, _), (_, pooled) = (
            programs.encode_text(encoder, self._params["text_encoder"], column, sharding) for column in ids
        )
        conditions = programs.make_conditions(self._networks, self._params, listed.entries, hidden, pooled, sharding)
        if settings.masked_attention != "none":
            kind, entries = settings.masked_attention, listed.entries
            bits = [region_bits(entry.grounding, *grid, kind) for entry in entries]
            visual, tokens = (np.stack(column) for column in zip(*bits, strict=True))
            conditions["regions"] = {"visual": visual, "tokens": tokens}
        return conditions, listed.rows

    def _encode(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[Array, "1 h w z"]:
        pixels = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
        return programs.encode(self._autoencoder, self._params["autoencoder"], pixels)

    def _canvas(self, layout: Layout, width: int | None, height: int | None) -> tuple[int, int]:
        """Width and height of a layout's picture in pixels."""
        multiple = self.config.canvas_stride
        size = []
        for name, given in (("width", width), ("height", height)):
            side = getattr(layout, name) if given is None else given
            if side > MAX_SIDE:
                raise InputError(f"{layout.name}: {name}: expected at most {MAX_SIDE} pixels, got {side}")
            if side % multiple or side <= 0:
                nearest = max(multiple, round(side / multiple) * multiple)
                raise InputError(
                    f"{layout.name}: {name}: expected a multiple of {multiple} pixels, got {side}; nearest: {nearest}"
                )
            size.append(side)
        return tuple(size)


def _fitting(default: int, times: float) -> int:
    """How many fit where `times` as much memory a piece is there as in the full model at 512×512; at least one."""
    return max(1, int(default * min(times, _MOST_ROWS)))
