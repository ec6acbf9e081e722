"""One call of `Pipeline.stream`: what is asked for, picture by picture, and the batches on their way."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Float, UInt8

from instdiff_jax.config import SamplingConfig
from instdiff_jax.diffusion.multi_instance import ImageRows, Mark, Piece, count_evaluations, plan_pieces
from instdiff_jax.diffusion.solvers import SolverTable
from instdiff_jax.grounding import Format
from instdiff_jax.layout import Layout
from instdiff_jax.sampling.conditions import alone
from instdiff_jax.sampling.start import Start

T = TypeVar("T")


class Picture(NamedTuple):
    """One picture to draw: of the layout of this number, on a canvas, with seed k of the job."""

    number: int
    layout: Layout
    canvas: tuple[int, int]
    k: int


def mis_steps(settings: SamplingConfig, table: SolverTable) -> int:
    """M, counted on the steps that really run (as released)."""
    return int(table.steps * settings.mis)


def plan(settings: SamplingConfig, table: SolverTable) -> list[Piece]:
    """The runs of the denoising loop under some settings."""
    rules = dict(guidance_interval=settings.guidance_interval, mis_guidance=settings.mis_guidance)
    return plan_pieces(table, mis_steps(settings, table), **rules)


@dataclasses.dataclass(frozen=True, eq=False)
class Job:
    """The settings of a call, checked."""

    seeds: list[int]
    seed_per_layout: bool  # layout i with seed i alone, instead of every layout with every seed
    size: tuple[int | None, int | None]  # width and height in pixels instead of the layouts' own
    settings: SamplingConfig
    table: SolverTable
    format: Format
    drop: tuple[str, ...]
    noise: Float[np.ndarray, "n h w z"] | None
    start: Start | None
    from_noise: bool

    @property
    def mis_steps(self) -> int:
        """M, counted on the steps that really run (as released)."""
        return mis_steps(self.settings, self.table)

    @functools.cached_property
    def pieces(self) -> list[Piece]:
        """The runs of the denoising loop."""
        return plan(self.settings, self.table)

    @property
    def masked(self) -> bool:
        """Whether instances are kept apart inside the fusers."""
        return self.settings.masked_attention != "none"

    def alone(self, layout: Layout) -> list[int]:
        """Which instances are denoised alone in the first steps."""
        return alone(layout, self.format, self.drop, self.settings.merge) if self.mis_steps else []

    def evaluations(self, pictures: Sequence[Picture]) -> int:
        """UNet evaluations of single latents that pictures take."""
        images = [ImageRows(0, 0, (0,) * len(self.alone(picture.layout))) for picture in pictures]
        return count_evaluations(self.pieces, images, self.settings.guidance_scale != 1)


class Flight(NamedTuple):
    """A batch on its way; its arrays may still be being computed."""

    batch: list[Picture]
    latents: Float[Array, "b h w z"]
    images: list[UInt8[Array, "n H W 3"]]
    marks: list[Mark] | None


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, each made before the one before it is used; an error in making one comes when it is its turn."""
    end = object()
    current = next(items, end)
    while current is not end:
        failure, following = None, end
        try:
            following = next(items, end)
        except Exception as error:
            failure = error
        yield current
        if failure is not None:
            raise failure
        current = following
