"""What a call returns, and the batches on their way to it."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Array, Float, UInt8
from PIL import Image

from instdiff_jax.diffusion.multi_instance import ProgressEvent
from instdiff_jax.errors import NotFiniteError
from instdiff_jax.layout import Layout
from instdiff_jax.sampling.start import StartImage

T = TypeVar("T")


@dataclasses.dataclass(frozen=True, eq=False)
class Result:
    """One generated image.

    Attributes:
        array: its pixels.
        latents: what they were decoded from.
        seed: of its initial noise.
        layout: what it shows.
    """

    array: UInt8[np.ndarray, "H W 3"]
    latents: Float[np.ndarray, "h w z"]
    seed: int
    layout: Layout

    @property
    def image(self) -> Image.Image:
        """The pixels as a Pillow image."""
        return Image.fromarray(self.array)


class PendingBatch(NamedTuple):
    """A batch on its way; its arrays may still be being computed.

    Attributes:
        layouts, seeds: of each image.
        start: the image to start from, of which a part may be kept.
        latents: of all images.
        pixels: of all images, in parts; the last one is padded.
        events: progress on the way to the latents; None if nobody watches.
    """

    layouts: list[Layout]
    seeds: list[int]
    start: StartImage | None
    latents: Float[Array, "b h w z"]
    pixels: list[UInt8[Array, "n H W 3"]]
    events: list[ProgressEvent] | None

    def results(self) -> Iterator[Result]:
        """Waits for the batch's images, and copies each from the device; NotFiniteError for one that is broken."""
        arrays = itertools.chain(*[np.asarray(part) for part in self.pixels])
        for layout, seed, array, latents in zip(
            self.layouts, self.seeds, arrays, np.asarray(self.latents), strict=False
        ):
            if not np.isfinite(latents).all():
                raise NotFiniteError(layout.name, seed)
            if self.start is not None and self.start.repaint is not None:
                array = np.where(self.start.repaint[..., None], array, self.start.image)
            # Copies: on a CPU these are views, and a result that is kept would keep its whole batch.
            yield Result(array.copy(), latents.copy(), seed, layout)


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
