"""What a call returns, and the batches on their way to it."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Bool, Float, UInt8
from PIL import Image

from instdiff_jax.diffusion.multi_instance import ProgressEvent
from instdiff_jax.errors import NotFiniteError
from instdiff_jax.layout import Layout
from instdiff_jax.sampling.request import Request

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One generated image.

    Attributes:
        array: its pixels.
        latents: what they were decoded from.
        seed: of its initial noise.
        layout: what it shows.
        batch: rows of each image of its batch, and its place among them. Another batch runs other programs, whose
            rounding differs.
    """

    array: UInt8[np.ndarray, "H W 3"]
    latents: Float[np.ndarray, "h w z"]
    seed: int
    layout: Layout
    batch: tuple[tuple[int, ...], int] = ((1,), 0)

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow image."""
        return Image.fromarray(self.array)


class PendingBatch(NamedTuple):
    """A batch on its way; its arrays may still be being computed.

    Attributes:
        layouts, seeds: of each image.
        request: the call.
        latents: of all images.
        pixels: of all images and whether they were finite, in parts; the last one is padded.
        events: progress on the way to the latents; None if nobody watches.
    """

    layouts: list[Layout]
    seeds: list[int]
    request: Request
    latents: Float[Array, "b h w z"]
    pixels: list[tuple[UInt8[Array, "n H W 3"], Bool[Array, "n"]]]
    events: list[ProgressEvent] | None

    def results(self) -> Iterator[Result]:
        """Waits for the batch's images, and copies each from the device; NotFiniteError for one that is broken."""
        arrays, decoded = (
            itertools.chain(*[np.asarray(part) for part in parts]) for parts in zip(*self.pixels, strict=True)
        )
        rows = tuple(1 + len(self.request.separate_instances(layout)) for layout in self.layouts)
        images = zip(self.layouts, self.seeds, arrays, decoded, np.asarray(self.latents), strict=False)
        for i, (layout, seed, array, finite, latents) in enumerate(images):
            if not np.isfinite(latents).all():
                raise NotFiniteError(layout.name, seed, self._describe_break(i))
            if not finite:
                problem = "the decoded image is not finite, and its latents are: a weight of the autoencoder is broken"
                raise NotFiniteError(layout.name, seed, problem)
            start = self.request.start
            if start is not None and start.repaint is not None:
                array = np.where(start.repaint[..., None], array, start.image)
            # Copies: on a CPU these are views, and a result that is kept would keep its whole batch.
            yield Result(array.copy(), latents.copy(), seed, layout, (rows, i))

    def _describe_break(self, image: int) -> str:
        """Where an image's latents cease to be finite: between two progress events, or somewhere in the run."""
        table = self.request.plan.table
        first, last = 0, table.evaluations
        for event in sorted(self.events or (), key=lambda event: event.start):
            if not np.asarray(event.ready)[event.segment == image].all():
                first, last = event.start, event.stop
                break
        steps = f"steps {table.step_of_evaluation(first)} to {table.step_of_evaluation(last - 1)} of {table.steps}"
        return f"the latents are not finite from {steps}: a weight is not, or float16 overflowed; try another dtype"


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """Each item once the next one is made; an error in making an item comes in that item's turn."""
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
