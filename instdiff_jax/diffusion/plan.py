"""The plan of one sampling: pieces of the solver's evaluations. One program runs a piece on one set of rows.

The plan is made once per call. The sampler runs it, and evaluations are counted from it.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Literal, NamedTuple, Self

from instdiff_jax.diffusion.rows import ImageRows, RowSet
from instdiff_jax.diffusion.solvers import SolverTable


@dataclasses.dataclass(frozen=True)
class SamplerSettings:
    """Settings of the multi-instance sampler, and those that save evaluations.

    Attributes:
        mis_steps: M, the steps in which every instance is also denoised on its own.
        guidance_scale: of classifier-free guidance; 1 leaves out the unconditional entries.
        guidance_interval: fractions of the steps between which guidance is on (Kynkäänniemi et al. 2024, who give
            noise levels). Products with the number of steps are truncated, as α's are. (0, 0) turns guidance off.
        mis_guidance: False turns guidance off for instance rows. The global row keeps it: its solver history is used
            after the merge, and an image without instances must not depend on the rest of its batch.
        merge: how an image's rows become one: their mean, or instances cropped to their boxes and pasted.
        reuse: deep features are computed in every `reuse`-th evaluation of rows that run together, see loop.py.
    """

    mis_steps: int = 0
    guidance_scale: float = 7.5
    guidance_interval: Sequence[float] = (0.0, 1.0)
    mis_guidance: bool = True
    merge: Literal["mean", "crop"] = "mean"
    reuse: int = 1


class Piece(NamedTuple):
    """Evaluations start … stop−1 of one set of rows, run by one program."""

    start: int
    stop: int
    rows: RowSet
    use_fusers: bool
    guided: bool


@dataclasses.dataclass(frozen=True, eq=False)
class SamplingPlan:
    """The solver, the settings, and the pieces in running order."""

    table: SolverTable
    settings: SamplerSettings
    pieces: tuple[Piece, ...]

    def without_instances(self) -> Self:
        """The plan for images that have no instance rows: one row per image from the start, and no merge."""
        pieces = [piece._replace(rows="image") for piece in self.pieces if piece.rows != "instances"]
        return dataclasses.replace(self, pieces=tuple(pieces))

    def evaluations(self, images: Sequence[ImageRows]) -> int:
        """UNet evaluations of single latents, without padding."""
        return sum(_count(piece, images, piece.stop - piece.start) for piece in self.pieces)

    def fresh_evaluations(self, images: Sequence[ImageRows]) -> int:
        """Those of `evaluations` that compute deep features."""
        reuse = self.settings.reuse
        return sum(_count(piece, images, -(-(piece.stop - piece.start) // reuse)) for piece in self.pieces)


def make_plan(table: SolverTable, settings: SamplerSettings) -> SamplingPlan:
    """Splits a solver's evaluations where rows merge, α becomes 0, and guidance begins and ends."""
    merge = table.evaluation_of_step(settings.mis_steps)
    interval = (0.0, 0.0) if settings.guidance_scale == 1 else settings.guidance_interval
    first, last = (table.evaluation_of_step(int(fraction * table.steps)) for fraction in interval)
    guided = range(first, last)
    if settings.mis_guidance or not guided:
        pieces = _split(table, "all", 0, merge, guided)
    else:
        pieces = _split(table, "global", 0, merge, guided) + _split(table, "instances", 0, merge, range(0))
    return SamplingPlan(table, settings, (*pieces, *_split(table, "image", merge, table.evaluations, guided)))


def count_rows(rows: RowSet, images: Sequence[ImageRows]) -> int:
    """The number of rows that the images have in one set."""
    instances = sum(len(image.instances) for image in images)
    return {"all": len(images) + instances, "instances": instances}.get(rows, len(images))


def _split(table: SolverTable, rows: RowSet, start: int, stop: int, guided: range) -> list[Piece]:
    unfused = table.fused_evaluations
    inside = (unfused, guided.start, guided.stop) if guided else (unfused,)
    cuts = sorted({start, stop, *(cut for cut in inside if start < cut < stop)})
    return [Piece(a, b, rows, a < unfused, a in guided) for a, b in itertools.pairwise(cuts)]


def _count(piece: Piece, images: Sequence[ImageRows], times: int) -> int:
    return (1 + piece.guided) * count_rows(piece.rows, images) * times
