"""One call of the pipeline as a checked request: the images asked for, in batches, and the plan to sample them."""

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

from jaxtyping import Bool, Float, UInt8
from numpy import ndarray

from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.diffusion.plan import SamplerSettings, SamplingPlan, make_plan
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.diffusion.solvers import SolverTable, solver_table
from instdiff_jax.errors import InputError
from instdiff_jax.grounding import Format
from instdiff_jax.layout import MAX_SIDE, Layout
from instdiff_jax.sampling.conditions import separate_instances
from instdiff_jax.sampling.memory import MemoryLimits
from instdiff_jax.sampling.start import StartImage, check_inputs, check_seed, check_start


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingOptions:
    """The keywords of a call, see `Pipeline.__call__`, except for sampling settings."""

    seeds: int | Iterable[int] = 0
    layout_seeds: Sequence[int] | None = None
    format: Format = "auto"
    drop: Collection[str] = ()
    width: int | None = None
    height: int | None = None
    noise: Float[ndarray, "n h w z"] | None = None
    init_image: UInt8[ndarray, "H W 3"] | None = None
    inpaint_mask: Bool[ndarray, "H W"] | None = None
    strength: float | None = None


class ImageRequest(NamedTuple):
    """One image to sample: of the layout with this number, on a canvas, with one of the request's seeds."""

    number: int
    layout: Layout
    canvas: tuple[int, int]
    seed_index: int


@dataclasses.dataclass(frozen=True, eq=False)
class Request:
    """What one call asks for, checked.

    Attributes:
        config: the model's sizes.
        settings: all sampling settings.
        options: the other keywords.
        plan: the evaluations to run.
        seeds: each layout gets an image per seed, or with `layout_seeds` layout i one with seed i.
        start: the image to start from.
        from_noise: start from noise alone, although there is a start image.
    """

    config: ModelConfig
    settings: SamplingConfig
    options: SamplingOptions
    plan: SamplingPlan
    seeds: list[int]
    start: StartImage | None
    from_noise: bool

    @property
    def masked(self) -> bool:
        """Whether attention in the fusers is masked."""
        return self.settings.masked_attention != "none"

    @property
    def seed_per_layout(self) -> bool:
        """Whether each layout has one seed of its own, instead of all seeds."""
        return self.options.layout_seeds is not None

    def latent_shape(self, canvas: tuple[int, int]) -> tuple[int, int, int]:
        """Height, width and channels of the latents of a canvas (width and height in pixels)."""
        width, height = (side // self.config.latent_stride for side in canvas)
        return height, width, self.config.autoencoder.z_channels

    def separate_instances(self, layout: Layout) -> list[int]:
        """Slots of the instances that are denoised on their own in the first steps."""
        if not self.plan.settings.mis_steps:
            return []
        return separate_instances(layout, self.options.format, self.options.drop, self.settings.merge)

    def evaluations(self, images: Iterable[ImageRequest]) -> int:
        """UNet evaluations of single latents that images take."""
        rows = [ImageRows(0, 0, (0,) * len(self.separate_instances(image.layout))) for image in images]
        return self.plan.evaluations(rows)

    def images(self, layouts: Iterable[Layout]) -> Iterator[ImageRequest]:
        """The images asked for, in order, checked."""
        for number, layout in enumerate(layouts):
            canvas = _canvas(layout, self.options, self.config.canvas_stride)
            check_inputs(canvas, self.latent_shape(canvas), len(self.seeds), self.options.noise, self.start)
            if self.seed_per_layout and number >= len(self.seeds):
                raise InputError(f"layout_seeds: expected one for each layout, got {len(self.seeds)}")
            for index in [number] if self.seed_per_layout else range(len(self.seeds)):
                yield ImageRequest(number, layout, canvas, index)

    def check(self, layouts: Iterable[Layout]) -> int:
        """Checks all images; returns the evaluations that they take."""
        evaluations, count = 0, 0
        for image in self.images(layouts):
            evaluations, count = evaluations + self.evaluations([image]), image.number + 1
        if self.seed_per_layout and count != len(self.seeds):
            raise InputError(f"layout_seeds: expected one for each of {count} layouts, got {len(self.seeds)}")
        return evaluations

    def batches(self, layouts: Iterable[Layout], limits: MemoryLimits) -> Iterator[list[ImageRequest]]:
        """Images of one canvas, in order, that fit the rows of one program; an error comes after those before it."""
        batch: list[ImageRequest] = []
        rows, failure = 0, None
        try:
            for image in self.images(layouts):
                size = 1 + len(self.separate_instances(image.layout))
                limit = limits.row_limit(image.canvas, self.masked)
                if batch and (rows + size > limit or image.canvas != batch[0].canvas):
                    yield batch
                    batch, rows = [], 0
                batch.append(image)
                rows += size
        except Exception as error:
            failure = error
        if batch:
            yield batch
        if failure is not None:
            raise failure


def make_request(config: ModelConfig, settings: SamplingConfig, options: SamplingOptions) -> Request:
    """Checks what a call asks for, except for its layouts.

    Raises:
        InputError: for an option or a setting out of its range.
    """
    start, strength = check_start(options.init_image, options.inpaint_mask, options.strength), options.strength
    if strength is None:
        strength = 0.75 if start is not None and start.repaint is None else 1.0
    seeds = options.seeds if options.layout_seeds is None else options.layout_seeds
    table = solver_table(settings.sampler, settings.steps, config.schedule, settings.alpha, strength, settings.sigmas)
    return Request(
        config=config,
        settings=settings,
        options=options,
        plan=make_plan(table, sampler_settings(settings, table)),
        seeds=[check_seed(seed) for seed in (seeds if isinstance(seeds, Iterable) else [seeds])],
        start=start,
        from_noise=strength == 1,
    )


def sampler_settings(settings: SamplingConfig, table: SolverTable) -> SamplerSettings:
    """The part of the settings that the multi-instance sampler takes."""
    return SamplerSettings(
        mis_steps=int(table.steps * settings.mis),  # of the steps that really run (as released)
        guidance_scale=settings.guidance_scale,
        guidance_interval=settings.guidance_interval,
        mis_guidance=settings.mis_guidance,
        merge=settings.merge,
        reuse=settings.reuse,
    )


def _canvas(layout: Layout, options: SamplingOptions, multiple: int) -> tuple[int, int]:
    """Width and height of a layout's image in pixels."""
    sides = []
    for name in ("width", "height"):
        given = getattr(options, name)
        side = getattr(layout, name) if given is None else given
        if side > MAX_SIDE:
            raise InputError(f"{layout.name}: {name}: expected at most {MAX_SIDE} pixels, got {side}")
        if side % multiple or side <= 0:
            nearest = max(multiple, round(side / multiple) * multiple)
            raise InputError(
                f"{layout.name}: {name}: expected a multiple of {multiple} pixels, got {side}; nearest: {nearest}"
            )
        sides.append(side)
    return sides[0], sides[1]
