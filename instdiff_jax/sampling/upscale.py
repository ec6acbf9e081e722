"""Larger pictures: each result enlarged, and denoised again from there with the same layout."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from instdiff_jax.errors import InputError
from instdiff_jax.layout import MAX_SIDE, Layout
from instdiff_jax.sampling.request import ImageRequest, Request, make_request
from instdiff_jax.sampling.results import Result

Progress = Callable[[int, int], None]
Stream = Callable[[Request, Iterable[Layout], Progress | None], Iterator[Result]]


class Upscale(NamedTuple):
    """A second pass: how many times larger the sides are, and the fraction of the steps that run."""

    factor: float
    strength: float = 0.4


def check_upscale(request: Request, upscale: Upscale) -> None:
    """InputError for a factor or a strength out of range, and beside an inpaint mask."""
    if not 1 < upscale.factor <= 4:
        raise InputError(f"upscale: expected a number above 1 and at most 4, got {upscale.factor!r}")
    if not 0 < upscale.strength <= 1:
        raise InputError(f"upscale_strength: expected a fraction above 0, at most 1, got {upscale.strength!r}")
    if request.start is not None and request.start.repaint is not None:
        raise InputError("upscale: expected no inpaint_mask with it: the second pass would paint the kept region anew")


def both_passes(
    stream: Stream, request: Request, layouts: Iterable[Layout], upscale: Upscale, progress: Progress | None
) -> Iterator[Result]:
    """The results of the second pass, one after the other.

    Args:
        stream: samples a request's images of layouts.
        request: the first pass.
        layouts: as in a call; a collection is checked as a whole before anything is sampled.
        upscale: the second pass.
        progress: as in a call; the second pass of an iterator's layouts counts when it begins.

    Raises:
        InputError: for a factor, a strength or a canvas out of range, before anything is sampled.
    """
    check_upscale(request, upscale)
    counts = Counts(progress, request, upscale)
    if iter(layouts) is not layouts:
        for image in request.images(layouts):
            canvas_of(request, image.canvas, upscale)
            counts.plan(image)
    for result in stream(request, layouts, counts.first if progress else None):
        height, width = result.array.shape[:2]
        larger = second_pass(request, (width, height), upscale, result)
        yield from stream(larger, [result.layout], counts.second() if progress else None)


def canvas_of(request: Request, canvas: tuple[int, int], upscale: Upscale) -> tuple[int, int]:
    """Width and height of the second pass: the nearest that the networks allow."""
    multiple = request.config.canvas_stride
    width, height = (max(1, round(side * upscale.factor / multiple)) * multiple for side in canvas)
    if max(width, height) > MAX_SIDE:
        raise InputError(f"upscale: expected at most {MAX_SIDE} pixels a side, got {width}×{height}")
    return width, height


def second_pass(request: Request, canvas: tuple[int, int], upscale: Upscale, result: Result | None = None) -> Request:
    """The request for a result's second pass; without a result, one that only serves for counting."""
    width, height = canvas_of(request, canvas, upscale)
    image = np.zeros((1, 1, 3), np.uint8) if result is None else enlarge(result.array, width, height)
    options = dataclasses.replace(
        request.options,
        seeds=0 if result is None else result.seed,
        layout_seeds=None,
        noise=None,
        width=width,
        height=height,
        init_image=image,
        inpaint_mask=None,
        strength=upscale.strength,
    )
    return make_request(request.config, request.settings, options)


def enlarge(image: UInt8[np.ndarray, "H W 3"], width: int, height: int) -> UInt8[np.ndarray, "height width 3"]:
    """The image in another size (Lanczos)."""
    return np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


class Counts:
    """Counts the evaluations of both passes as those of one call."""

    def __init__(self, progress: Progress | None, request: Request, upscale: Upscale):
        self._progress, self._done, self._total = progress, [0, 0], [0, 0]
        self._second = second_pass(request, (1, 1), upscale)
        self._planned = False

    def plan(self, image: ImageRequest) -> None:
        """Notes the evaluations that an image's second pass will take."""
        self._planned = True
        self._total[1] += self._second.evaluations([image])

    def first(self, done: int, total: int) -> None:
        """Progress of the first pass."""
        self._done[0], self._total[0] = done, total
        self._report()

    def second(self) -> Progress:
        """Progress of the next result's second pass."""
        before, began = self._done[1], False

        def report(done: int, total: int) -> None:
            nonlocal began
            if not began and not self._planned:
                self._total[1] += total
            began, self._done[1] = True, before + done
            self._report()

        return report

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(sum(self._done), sum(self._total))
