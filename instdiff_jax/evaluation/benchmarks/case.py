"""What every benchmark is made of: cases to draw, judges of pictures, a rule for each picture and one for all."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from instdiff_jax.errors import InputError
from instdiff_jax.geometry.checks import read_numbers
from instdiff_jax.layout import Instance, Layout

Pixels = UInt8[np.ndarray, "H W 3"]


class Thing(NamedTuple):
    """One instance that a case asks for.

    Attributes:
        phrase: its caption in the layout.
        box: x0, y0, x1, y1 in parts of the canvas's sides.
        category: what a detector looks for.
        detail: what else the benchmark's rule reads: a colour, a longer caption, or a name.
    """

    phrase: str
    box: tuple[float, float, float, float]
    category: str
    detail: str = ""


class Case(NamedTuple):
    """One picture that a benchmark asks for.

    Attributes:
        key: its id in the benchmark.
        caption: of the whole picture.
        things: its instances.
        level: the column of the benchmark's table that it belongs to.
        file: the picture's name where the benchmark's own scorer looks for it.
        more: what else the rule reads.
    """

    key: str
    caption: str
    things: tuple[Thing, ...]
    level: str
    file: str
    more: Mapping[str, Any] = {}

    def layout(self, side: int) -> Layout:
        """The layout on a square canvas; boxes stay inside it."""
        instances = tuple(
            Instance(thing.phrase, box=tuple(edge * side for edge in thing.box), category_name=thing.category)
            for thing in self.things
        )
        return Layout(self.caption, side, side, instances, name=self.key)


class Found(NamedTuple):
    """Boxes that a detector found: x0, y0, x1, y1 in pixels, and scores, highest first."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]


@runtime_checkable
class Grounder(Protocol):
    """Finds what a phrase names, such as Grounding DINO."""

    def ground(self, image: Pixels, phrase: str) -> Found: ...


@runtime_checkable
class BoxSegmenter(Protocol):
    """The mask of what a box is around, such as SAM."""

    def segment(self, image: Pixels, box: Sequence[float]) -> Bool[np.ndarray, "H W"]: ...


@runtime_checkable
class Answerer(Protocol):
    """Answers questions about pictures: a vision language model."""

    def answer(self, image: Pixels, question: str) -> str: ...


class Judges(NamedTuple):
    """The models that a benchmark's rule asks; None for one that it does not need."""

    grounder: Grounder | None = None
    segmenter: BoxSegmenter | None = None
    answerer: Answerer | None = None


class Published(NamedTuple):
    """A row that others have printed: the method, its numbers by the table's columns, and where it stands."""

    method: str
    numbers: Mapping[str, float]
    source: str


class Benchmark(NamedTuple):
    """A benchmark.

    Attributes:
        name: in `instdiff benchmark NAME`.
        files: what its annotation file is, for help and errors.
        judges: the judges that it needs, by their names in `Judges`.
        read: its cases from a file or folder, in order.
        judge: what its rule says of one picture, as JSON values.
        table: all pictures' values as the table's columns.
        published: rows of others.
        notes: how the rule differs from what its name suggests, in a sentence.
    """

    name: str
    files: str
    judges: tuple[str, ...]
    read: Callable[[Path], list[Case]]
    judge: Callable[[Case, Pixels, Judges], dict[str, Any]]
    table: Callable[[Sequence[tuple[Case, Mapping[str, Any]]]], dict[str, float]]
    published: tuple[Published, ...]
    notes: str


def read_unit_box(values: Any, where: str) -> tuple[float, float, float, float]:
    """A box x0, y0, x1, y1 in parts of the sides, clipped to the canvas; it must have an area."""
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in read_numbers(values, 4, where, "[x0, y0, x1, y1]"))
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"{where}: expected x0 < x1 and y0 < y1 in parts of the sides, got {values}")
    return x0, y0, x1, y1


def box_ious(boxes: Float[np.ndarray, "n 4"], box: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Intersection over union of each box with one, all x0, y0, x1, y1."""
    x0, y0, x1, y1 = box
    wide = np.maximum(np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0), 0.0)
    high = np.maximum(np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0), 0.0)
    inside = wide * high
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return inside / (areas + (x1 - x0) * (y1 - y0) - inside)


def keep_best(found: Found, threshold: float) -> Found:
    """Non-maximum suppression: of boxes whose IoU is above the threshold, the one with the highest score."""
    order = np.argsort(-found.scores, kind="stable")
    kept: list[int] = []
    for i in order:
        if not kept or box_ious(found.boxes[kept], found.boxes[i]).max() <= threshold:
            kept.append(int(i))
    return Found(found.boxes[kept], found.scores[kept])
