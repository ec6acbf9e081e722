"""From layouts and a checkpoint to images: composes text, grounding, networks and sampler.

The next batch is on its way to the devices before the results of the last one are awaited: the host's work and the
transfer of images hide behind denoising.

Axes: b batch, n images, h and w latent height and width, H and W pixels.
"""

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, UInt8

from instdiff_jax.checkpoint.embeddings import Embedding
from instdiff_jax.checkpoint.lora import Lora
from instdiff_jax.checkpoint.taesd import read_taesd
from instdiff_jax.config import ModelConfig, Sampler, SamplingConfig, Sigmas
from instdiff_jax.diffusion.loop import noise_key
from instdiff_jax.diffusion.multi_instance import Placement, ProgressEvent, SamplerInputs, sample_rows
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.errors import InputError
from instdiff_jax.grounding import Format
from instdiff_jax.layout import Layout
from instdiff_jax.models.tiny_decoder import TinyDecoder
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.models.unet import Conditions
from instdiff_jax.parallel.rows import device_of, replicated
from instdiff_jax.sampling import programs
from instdiff_jax.sampling.encode import encode_layouts
from instdiff_jax.sampling.first_latents import start_latents
from instdiff_jax.sampling.loading import DTYPES, Process, choose_dtype, load_model
from instdiff_jax.sampling.memory import MemoryLimits
from instdiff_jax.sampling.presets import with_preset
from instdiff_jax.sampling.request import ImageRequest, Request, SamplingOptions, make_request
from instdiff_jax.sampling.results import PendingBatch, Result, one_ahead
from instdiff_jax.sampling.tiles import check_tile
from instdiff_jax.sampling.upscale import Progress, Upscale, both_passes

_SETTINGS = [field.name for field in dataclasses.fields(SamplingConfig)]
_OPTIONS = [field.name for field in dataclasses.fields(SamplingOptions)]


class Pipeline:
    """Generates images from layouts.

    >>> from instdiff_jax import Instance, Layout, Pipeline
    >>> pipeline = Pipeline.from_checkpoint("checkpoints/shapes")
    >>> square = Instance("a red square", box=(8, 8, 40, 40))
    >>> layout = Layout("a red square on grey", 64, 64, (square,))
    >>> for result in pipeline(layout, seeds=[0, 1], steps=4):
    ...     print(result.seed, result.image.size, result.array.shape, result.latents.shape)
    0 (64, 64) (64, 64, 3) (16, 16, 8)
    1 (64, 64) (64, 64, 3) (16, 16, 8)

    Attributes:
        config, sampling: the model's sizes; the checkpoint's sampling settings, which a call may override.
        dtype: what the networks compute in.
        networks, params: the four networks, and their parameters on the devices.
        limits, sharding: how many rows and images one program takes; how rows are split over a mesh (None: one device).
    """

    def __init__(
        self,
        config: ModelConfig,
        sampling: SamplingConfig,
        params: dict[str, Any],
        tokenizer: Tokenizer,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        max_rows: int | None = None,
    ):
        """For parameters at hand; otherwise use `from_checkpoint`, which documents the other arguments.

        Args:
            params: trees of unet, unifusion, autoencoder and text_encoder.
            tokenizer: the text encoder's.
        """
        self.config, self.sampling, self.dtype, self._tokenizer = config, sampling, choose_dtype(dtype), tokenizer
        self.sharding = None if mesh is None else NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._process, self._tile = Process(), check_tile(None, config.latent_stride)
        self._taesd: tuple[TinyDecoder, Any] | None = None
        one = device_of(params) or jax.local_devices()[0]  # bound to it in any case: see `parallel.rows.beside`
        self._place = one if self.sharding is None else replicated(self.sharding)
        self.params = jax.device_put(params, self._place)
        self.networks = programs.make_networks(config, DTYPES[self.dtype])
        itemsize, devices = jnp.dtype(DTYPES[self.dtype]).itemsize, 1 if mesh is None else mesh.size
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(self.params))
        self.limits = MemoryLimits(config, itemsize=itemsize, parameter_bytes=size, devices=devices, max_rows=max_rows)

    @classmethod
    def from_checkpoint(
        cls,
        path: str | Path,
        dtype: str | None = None,
        mesh: Mesh | None = None,
        max_rows: int | None = None,
        verify: bool = True,
        loras: Sequence[str | Path | tuple[str | Path, float]] = (),
        embeddings: Sequence[str | Path | tuple[str | Path, str]] = (),
    ) -> Self:
        """Loads a checkpoint folder, or a training run's workdir; needs no network.

        Args:
            path: the folder.
            dtype: float32, bfloat16 (default; on CPUs float32), float16, or int8 or fp8 for the UNet's projections.
            mesh: with axes data and fsdp; rows are split over both. None: one device.
            max_rows: rows denoised at a time per device; more run one after another. None: as many as suit it.
            verify: compare the files with their checksums while they are read.
            loras: files of LoRAs, alone or with their scale; merged into the weights.
            embeddings: files of textual inversion embeddings, alone or with their word.

        Raises:
            InputError: if the folder is no checkpoint, is damaged, or has no adapters to sample with.
        """
        dtype, sharding = choose_dtype(dtype), None if mesh is None else NamedSharding(mesh, PartitionSpec())
        addons = [Lora.parse(lora) for lora in loras], [Embedding.parse(entry) for entry in embeddings]
        return cls(*load_model(path, DTYPES[dtype], sharding, verify, *addons), dtype, mesh, max_rows)

    def __call__(
        self,
        layouts: Layout | Iterable[Layout],
        seeds: int | Iterable[int] = 0,
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        sigmas: Sigmas | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, ...] | None = None,
        alpha: float | tuple[float, ...] | None = None,
        mis: float | None = None,
        mis_guidance: bool | None = None,
        merge: Literal["mean", "crop"] | None = None,
        negative_prompt: str | None = None,
        prompt_weights: bool | None = None,
        long_prompts: bool | None = None,
        masked_attention: Literal["none", "correct", "strict", "official"] | None = None,
        reuse: int | None = None,
        preset: str | None = None,
        format: Format = "auto",
        drop: Collection[str] = (),
        width: int | None = None,
        height: int | None = None,
        layout_seeds: Sequence[int] | None = None,
        noise: Float[np.ndarray, "n h w z"] | None = None,
        init_image: UInt8[np.ndarray, "H W 3"] | None = None,
        inpaint_mask: Bool[np.ndarray, "H W"] | None = None,
        strength: float | None = None,
        upscale: float | None = None,
        upscale_strength: float = 0.4,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[Result]:
        """Generates an image of each layout with each seed: layout by layout, and seed by seed within a layout.

        Args:
            layouts: one or several.
            seeds: one or several. An image depends on its own seed only, not on the others of its batch.
            steps, sampler, sigmas, guidance_scale, guidance_interval, alpha, mis, mis_guidance, merge, negative_prompt,
                prompt_weights, long_prompts, masked_attention, reuse: sampling settings, see `SamplingConfig`; None
                keeps the checkpoint's.
            preset: a named set of settings from `presets.PRESETS`. Precedence: keyword > preset > checkpoint.
            format: which locations of an instance count, see `grounding.make_grounding`.
            drop: formats to leave out, for ablations.
            width, height: of the images in pixels, instead of the layout's canvas.
            layout_seeds: one image of each layout, with the layout's own seed, instead of `seeds`.
            noise: the initial noise for each seed, instead of the seed's own.
            init_image: start from this image, or keep parts of it; the same for every layout.
            inpaint_mask: paint only where this is True, and keep `init_image` elsewhere.
            strength: fraction of the steps that run, on `init_image` noised to the first of them; 1 starts from noise
                alone. None: 1 with an `inpaint_mask` and 0.75 without.
            upscale, upscale_strength: make the sides so many times larger: each image is enlarged, and denoised again
                with its layout in this fraction of the steps.
            progress: called with the number of UNet evaluations that are done, and of all.

        Raises:
            InputError: for a setting out of range, or a canvas that the networks do not allow.
        """
        keywords = dict(locals())
        return list(self.stream(**{name: value for name, value in keywords.items() if name != "self"}))

    def stream(
        self,
        layouts: Layout | Iterable[Layout],
        seeds: int | Iterable[int] = 0,
        *,
        steps: int | None = None,
        sampler: Sampler | None = None,
        sigmas: Sigmas | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, ...] | None = None,
        alpha: float | tuple[float, ...] | None = None,
        mis: float | None = None,
        mis_guidance: bool | None = None,
        merge: Literal["mean", "crop"] | None = None,
        negative_prompt: str | None = None,
        prompt_weights: bool | None = None,
        long_prompts: bool | None = None,
        masked_attention: Literal["none", "correct", "strict", "official"] | None = None,
        reuse: int | None = None,
        preset: str | None = None,
        format: Format = "auto",
        drop: Collection[str] = (),
        width: int | None = None,
        height: int | None = None,
        layout_seeds: Sequence[int] | None = None,
        noise: Float[np.ndarray, "n h w z"] | None = None,
        init_image: UInt8[np.ndarray, "H W 3"] | None = None,
        inpaint_mask: Bool[np.ndarray, "H W"] | None = None,
        strength: float | None = None,
        upscale: float | None = None,
        upscale_strength: float = 0.4,
        progress: Callable[[int, int], None] | None = None,
    ) -> Iterator[Result]:
        """Generates what `__call__` does, batch by batch: results come in order, as soon as their batch is done.

        While a batch's results are taken, the next one is already being sampled. There are never more than two:
        neither layouts nor results pile up. An error in a layout comes after the results before it.

        Args:
            layouts: as for `__call__`. A collection is checked as a whole before anything is sampled, so it is gone
                through twice; an iterator is read once, as it is needed, and `progress` counts what has begun.
            seeds: as for `__call__`; so are all other keywords.
        """
        keywords = dict(locals())
        self._process.check()
        settings = self.settings(preset, **{name: keywords[name] for name in _SETTINGS if keywords[name] is not None})
        options = SamplingOptions(**{name: keywords[name] for name in _OPTIONS})
        request = make_request(self.config, settings, options)
        layouts = [layouts] if isinstance(layouts, Layout) else layouts
        if upscale is None:
            return self._stream(request, layouts, progress)
        return both_passes(self._stream, request, layouts, Upscale(upscale, upscale_strength), progress)

    def _stream(self, request: Request, layouts: Iterable[Layout], progress: Progress | None) -> Iterator[Result]:
        once = iter(layouts) is layouts
        done, total = 0, 0 if once else request.check(layouts)
        batches = request.batches(layouts, self.limits)
        pairs = ((batch, self.start_batch(request, batch, watched=progress is not None)) for batch in batches)
        for batch, pending in one_ahead(pairs):
            total += request.evaluations(batch) * once
            for event in pending.events or ():
                event.ready.block_until_ready()
                done += event.evaluations
                if progress is not None:
                    progress(done, total)
            yield from pending.results()
            del pending  # before the next but one is started

    def settings(self, preset: str | None = None, **overrides: Any) -> SamplingConfig:
        """The sampling settings of a call with this preset and these settings; InputError for one out of range."""
        return SamplingConfig.from_dict(self.sampling.to_dict() | with_preset(preset, overrides), "sampling")

    def without_scaleu(self) -> Self:
        """This pipeline with ScaleU's b and s zero, so that it changes nothing: for ablations. Programs are shared."""
        self._process.check()
        unet = self.params["unet"]
        other = copy.copy(self)
        off = {name: jax.tree.map(jnp.zeros_like, part) for name, part in unet.items() if name.startswith("scaleu_")}
        other.params = self.params | {"unet": unet | off}
        return other

    def with_decoder(self, taesd: str | Path | None = None, tile: int | None = None) -> Self:
        """This pipeline with another way to decode.

        `taesd` is a file or folder of TAESD's decoder: faster, a little less sharp. `tile` is the side in pixels of
        tiles that overlap: large images then need less memory.
        """
        other = copy.copy(self)
        if taesd is not None:
            other._taesd = TinyDecoder(), jax.device_put(read_taesd(Path(taesd), self.config), self._place)
        other._tile = check_tile(tile, self.config.latent_stride)
        return other

    def start_batch(self, request: Request, batch: Sequence[ImageRequest], watched: bool = False) -> PendingBatch:
        """Puts all work of a batch on its way, and waits for none of it.

        Args:
            request: the call.
            batch: images of one canvas that fit the rows of one program.
            watched: whether there are progress events.
        """
        canvas = batch[0].canvas
        events: list[ProgressEvent] | None = [] if watched else None
        layouts = {image.number: image.layout for image in batch}
        seeds = [request.seeds[image.seed_index] for image in batch]
        with jax.default_matmul_precision(self.matmul_precision):
            conditions, rows = self.make_conditions(request, layouts, request.latent_shape(canvas)[:2])
            first, inpaint = start_latents(request, batch, self.encode)
            latents = sample_rows(
                self.predict_noise,
                self.params["unet"],
                SamplerInputs(
                    first,
                    conditions,
                    [rows[image.number] for image in batch],
                    inpaint,
                    np.stack(list(map(noise_key, seeds))),
                ),
                request.plan,
                Placement(self.limits.row_limit(canvas, request.masked), self.sharding),
                events,
            )
            pixels = self.decode_parts(latents)
        jax.tree.map(lambda array: array.copy_to_host_async(), (latents, pixels))
        return PendingBatch([image.layout for image in batch], seeds, request, latents, pixels, events)

    def make_conditions(
        self, request: Request, layouts: Mapping[int, Layout], grid: tuple[int, int]
    ) -> tuple[Conditions, dict[int, ImageRows]]:
        """The unique conditions of some layouts on a latent grid (height, width), and each layout's rows."""
        return encode_layouts(self.networks, self.params, self._tokenizer, request, layouts, grid, self.sharding)

    def encode(self, image: UInt8[np.ndarray, "H W 3"]) -> Float[Array, "1 h w z"]:
        """An image to mean latents."""
        self._process.check()
        pixels = jnp.asarray(image, jnp.float32)[None] / 127.5 - 1
        with jax.default_matmul_precision(self.matmul_precision):
            return programs.encode(self.networks.autoencoder, self.params["autoencoder"], pixels)

    def decode(self, latents: Float[Array, "b h w z"]) -> UInt8[np.ndarray, "b H W 3"]:
        """Latents to pixels: clamped to [−1, 1] (InputError for NaN), × 0.5 + 0.5, × 255, truncated (as released)."""
        pixels, finite = zip(*self.decode_parts(latents), strict=True)
        if not all(np.asarray(part).all() for part in finite):
            raise InputError("decode: an image is not finite: its latents are not, or a weight of the autoencoder")
        return np.concatenate([np.asarray(part) for part in pixels])[: len(latents)]

    def decode_parts(self, latents: Float[Array, "b h w z"]) -> list[tuple[UInt8[Array, "n H W 3"], Bool[Array, "n"]]]:
        """Like `decode`, and whether each image was finite, in parts that fit the memory; the last one is padded."""
        self._process.check()
        height, width = (min(side, self._tile or side) * self.config.latent_stride for side in latents.shape[1:3])
        decoder, params = self._taesd or (self.networks.autoencoder, self.params["autoencoder"])
        with jax.default_matmul_precision(self.matmul_precision):
            limit = self.limits.decode_limit((width, height))
            return programs.decode(decoder, params, jnp.asarray(latents), limit, self.sharding, self._tile)

    @property
    def predict_noise(self) -> programs.NoisePredictor:
        """The UNet as the denoising loop takes it."""
        return programs.noise_predictor(self.networks.unet, self.dtype)

    @property
    def matmul_precision(self) -> str:
        """Of matrix products: by default TPUs and recent GPUs would shorten float32 operands."""
        return "highest" if self.dtype == "float32" else "default"
