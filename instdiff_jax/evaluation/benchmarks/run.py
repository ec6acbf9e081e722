"""Draws a benchmark's pictures, judges them and writes its table; every step goes on where it was left."""

import io
import zlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from instdiff_jax.data.plugs import import_plug
from instdiff_jax.data.vision import Answerer, Pixels
from instdiff_jax.data.vision_hub import open_model
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks import coco_mig, coco_position, coco_protocol, layoutsam, lvis, overlaybench
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges
from instdiff_jax.evaluation.benchmarks.fid import Fid
from instdiff_jax.evaluation.detectors import open_detector
from instdiff_jax.evaluation.files import encode_image, write_image
from instdiff_jax.evaluation.generate import image_seed
from instdiff_jax.files import read_json, write_file, write_json, write_text
from instdiff_jax.grounding import FORMATS
from instdiff_jax.paths import output_path, read_file
from instdiff_jax.sampling.pipeline import Pipeline

BATCH = 128  # layouts in memory at a time
_SINGLE = (coco_mig, coco_position, layoutsam, overlaybench)
_MANY = (coco_protocol, lvis)
BENCHMARKS = {module.BENCHMARK.name: module.BENCHMARK for module in _SINGLE}
BENCHMARKS |= {one.name: one for module in _MANY for one in module.BENCHMARKS}


# Field of `Judges` -> the flag that names it.
_FLAGS = {"grounder": "--detector", "segmenter": "--segmenter", "answerer": "--vlm"}


class Canvas(NamedTuple):
    """The annotations that a file of predictions refers to, on the pictures' canvas; see `predictions.Annotated`."""

    categories: Mapping[int, str]
    image_ids: Collection[int]
    size: int


def open_judges(
    needed: Sequence[str], names: Mapping[str, str | None], cases: Sequence[Case] = (), size: int = 512
) -> Judges:
    """The judges that a benchmark needs, by fields of `Judges`.

    Args:
        needed: the fields.
        names: field to what its flag names, see `vision_hub.open_model` and, for `detector`, `open_detector`.
        cases, size: the benchmark's and the side of its pictures, for a detector of the categories of the cases' file.

    Raises:
        InputError: for one that is missing or cannot be opened.
    """
    return Judges(**{field: _open_judge(field, names.get(field), cases, size) for field in needed})


def _open_judge(field: str, name: str | None, cases: Sequence[Case], size: int) -> Any:
    if field == "detector":
        shared = cases[0].more["shared"]
        return open_detector(name or "", Canvas(shared.categories, shared.image_ids, size))
    if field == "clip":
        from instdiff_jax.evaluation.hub import Clip

        if not name:
            raise InputError("--clip: expected a CLIP model of the transformers library, got nothing")
        if name.startswith("python:"):
            found = import_plug("--clip", name)
            return found() if isinstance(found, type) else found
        return Clip.from_name(name)
    model = open_model(_FLAGS[field], name)
    if field == "answerer" and not isinstance(model, Answerer):
        raise InputError(f"--vlm: {name}: expected a model that answers questions; Florence-2 does not")
    return model


def picture_path(folder: Path, case: Case) -> Path:
    """FOLDER/images/..., in the layout that the benchmark's own scorer reads."""
    return output_path(folder, "images", *Path(case.file).parts)


def judged_path(folder: Path, case: Case) -> Path:
    return output_path(folder, "judged", f"{case.key}.json")


def undrawn(folder: Path, cases: Sequence[Case]) -> list[Case]:
    """The cases that have no picture yet."""
    return [case for case in cases if not picture_path(folder, case).exists()]


def read_cases(benchmark: Benchmark, path: Path, limit: int | None = None) -> list[Case]:
    """The benchmark's cases; InputError for a file that is not its, or two cases of one id."""
    cases = benchmark.read(path)
    seen: set[str] = set()
    for case in cases:
        if case.key in seen or case.key.startswith(".") or "/" in case.key:
            raise InputError(f"{path}: {case.key}: expected an id of its own for each picture, without slashes")
        seen.add(case.key)
    if not cases:
        raise InputError(f"{path}: expected {benchmark.files}, found no pictures in it")
    return cases[:limit]


def draw(
    benchmark: Benchmark,
    pipeline: Pipeline,
    cases: Sequence[Case],
    folder: Path,
    size: int,
    seed: int,
    sampling: Mapping[str, Any],
    report: Callable[[], object] = lambda: None,
) -> int:
    """Draws the pictures of `size` pixels that are not there, each from a seed of its own key; returns their number."""
    waiting = undrawn(folder, cases)
    # A layout without instances is drawn as training's samples without grounding are.
    bare = {"drop": FORMATS, "mis": 0.0}
    for group, more in (([c for c in waiting if c.things], {}), ([c for c in waiting if not c.things], bare)):
        for first in range(0, len(group), BATCH):
            part = group[first : first + BATCH]
            seeds = [image_seed(seed, zlib.crc32(case.key.encode())) for case in part]
            layouts = [benchmark.layout(case, size) for case in part]
            options = dict(sampling) | {"format": benchmark.format} | more
            results = pipeline.stream(layouts, layout_seeds=seeds, **options)
            for case, result in zip(part, results, strict=True):
                write_picture(picture_path(folder, case), result.array)
                report()
    return len(waiting)


def write_picture(path: Path, pixels: Pixels) -> None:
    """Writes a PNG, or a JPEG of Pillow's default quality, as the official script does, where the name ends so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix.lower() in (".jpg", ".jpeg"):
        write_file(path, lambda file: file.write(encode_image(pixels, format="JPEG")), sync=False)
    else:
        write_image(path, pixels)


def judge(
    benchmark: Benchmark,
    cases: Sequence[Case],
    folder: Path,
    judges: Judges,
    report: Callable[[], object] = lambda: None,
) -> int:
    """Judges the pictures that have no verdict yet, FOLDER/judged/KEY.json; returns their number."""
    waiting = [case for case in cases if not judged_path(folder, case).exists()]
    for case in waiting:
        write_json(judged_path(folder, case), benchmark.judge(case, read_picture(picture_path(folder, case)), judges))
        report()
    return len(waiting)


def read_picture(path: Path) -> Pixels:
    """A picture of any size; InputError if it is missing or broken."""
    if not path.exists():
        raise InputError(f"{path}: missing; draw it first")
    try:
        with Image.open(io.BytesIO(read_file(path))) as image:
            return np.asarray(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as an image; delete it and run again ({error})") from error


def all_judged(cases: Sequence[Case], folder: Path) -> bool:
    """Whether every case has its verdict; other shards' may be missing."""
    return all(judged_path(folder, case).exists() for case in cases)


def summarise(benchmark: Benchmark, cases: Sequence[Case], folder: Path, fid: Fid | None = None) -> str:
    """Writes results.json and results.md from all verdicts, and FID if it was measured; returns the page."""
    judged = [(case, read_json(judged_path(folder, case))) for case in cases]
    try:
        numbers = benchmark.table(judged)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'judged'}: verdicts of another benchmark or version; delete the folder") from error
    notes: Sequence[str] = ()
    if fid is not None:
        numbers, notes = numbers | {"FID": fid.value}, fid.notes
    write_json(folder / "results.json", {"benchmark": benchmark.name, "pictures": len(cases), "numbers": numbers})
    page = markdown(benchmark, numbers, len(cases), notes)
    write_text(folder / "results.md", page)
    return page


def _cell(name: str, value: float | None) -> str:
    """Shares are printed in per cent, FID as it is."""
    return "" if value is None else f"{value if name == 'FID' else 100 * value:.1f}"


def markdown(benchmark: Benchmark, numbers: Mapping[str, float], pictures: int, more_notes: Sequence[str] = ()) -> str:
    """Our row beside those that others have printed, with their sources."""
    columns = list(numbers)
    lines = [
        f"# {benchmark.name}, {pictures} pictures",
        "",
        f"| method | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        f"| this run | {' | '.join(_cell(name, value) for name, value in numbers.items())} |",
    ]
    sources = list(dict.fromkeys(row.source for row in benchmark.published))
    for row in benchmark.published:
        values = (_cell(name, row.numbers.get(name)) for name in columns)
        lines.append(f"| {row.method} (printed, {sources.index(row.source) + 1}) | {' | '.join(values)} |")
    notes = [f"- {note}" for note in (benchmark.notes, *more_notes)]
    return "\n".join([*lines, "", *notes, *(f"- printed, {k}: {source}" for k, source in enumerate(sources, 1)), ""])
