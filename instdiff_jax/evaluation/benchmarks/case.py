"""What every benchmark is made of: cases to draw, judges of pictures, a rule for each picture and one for all."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from instdiff_jax.data.vision import Answerer, BoxSegmenter, Grounder, Pixels
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import Detector
from instdiff_jax.evaluation.image import TextImageModel
from instdiff_jax.evaluation.predictions import Predictions
from instdiff_jax.geometry.checks import read_numbers
from instdiff_jax.grounding import Format
from instdiff_jax.layout import Instance, Layout


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


class Judges(NamedTuple):
    """The models that a benchmark's rule asks; None for one that it does not need."""

    grounder: Grounder | None = None
    segmenter: BoxSegmenter | None = None
    answerer: Answerer | None = None
    detector: Detector | Predictions | None = None
    clip: TextImageModel | None = None


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
        layout: a case's layout on a square canvas of a side.
        format: the pipeline's, which says what the model sees of the layouts.
        sampling: settings of `SamplingConfig` that the benchmark's numbers are made with; flags take precedence.
    """

    name: str
    files: str
    judges: tuple[str, ...]
    read: Callable[[Path], list[Case]]
    judge: Callable[[Case, Pixels, Judges], dict[str, Any]]
    table: Callable[[Sequence[tuple[Case, Mapping[str, Any]]]], dict[str, float]]
    published: tuple[Published, ...]
    notes: str
    layout: Callable[[Case, int], Layout] = Case.layout
    format: Format = "auto"
    sampling: Mapping[str, Any] = {}


def read_unit_box(values: Any, where: str) -> tuple[float, float, float, float]:
    """A box x0, y0, x1, y1 in parts of the sides, clipped to the canvas; it must have an area."""
    x0, y0, x1, y1 = (min(max(edge, 0.0), 1.0) for edge in read_numbers(values, 4, where, "[x0, y0, x1, y1]"))
    if x1 <= x0 or y1 <= y0:
        raise InputError(f"{where}: expected x0 < x1 and y0 < y1 in parts of the sides, got {values}")
    return x0, y0, x1, y1
