"""Draws a benchmark's pictures, judges them and writes its table; every step goes on where it was left."""

import io
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instdiff_jax.data.vision import Pixels
from instdiff_jax.data.vision_hub import open_model
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks import coco_mig, layoutsam, overlaybench
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges
from instdiff_jax.evaluation.files import write_image
from instdiff_jax.evaluation.generate import image_seed
from instdiff_jax.files import read_json, write_json, write_text
from instdiff_jax.paths import output_path, read_file
from instdiff_jax.sampling.pipeline import Pipeline

BATCH = 128  # layouts in memory at a time
BENCHMARKS = {one.BENCHMARK.name: one.BENCHMARK for one in (coco_mig, layoutsam, overlaybench)}


# Field of `Judges` -> the flag that names it.
_FLAGS = {"grounder": "--detector", "segmenter": "--segmenter", "answerer": "--vlm"}


def open_judges(needed: Sequence[str], names: Mapping[str, str | None]) -> Judges:
    """The judges that a benchmark needs, by fields of `Judges`; see `vision_hub.open_model` for the names."""
    return Judges(**{field: open_model(_FLAGS[field], names.get(field)) for field in needed})


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
    pipeline: Pipeline,
    cases: Sequence[Case],
    folder: Path,
    side: int,
    seed: int,
    sampling: Mapping[str, Any],
    report: Callable[[], object] = lambda: None,
) -> int:
    """Draws the pictures of `side` pixels that are not there, each from a seed of its own key; returns their number."""
    waiting = undrawn(folder, cases)
    for first in range(0, len(waiting), BATCH):
        part = waiting[first : first + BATCH]
        seeds = [image_seed(seed, zlib.crc32(case.key.encode())) for case in part]
        results = pipeline.stream([case.layout(side) for case in part], layout_seeds=seeds, **sampling)
        for case, result in zip(part, results, strict=True):
            path = picture_path(folder, case)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_image(path, result.array)
            report()
    return len(waiting)


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


def summarise(benchmark: Benchmark, cases: Sequence[Case], folder: Path) -> dict[str, float] | None:
    """Writes results.json and results.md from all verdicts; None if some are missing, as other shards' may be."""
    if not all(judged_path(folder, case).exists() for case in cases):
        return None
    judged = [(case, read_json(judged_path(folder, case))) for case in cases]
    try:
        numbers = benchmark.table(judged)
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / 'judged'}: verdicts of another benchmark or version; delete the folder") from error
    write_json(folder / "results.json", {"benchmark": benchmark.name, "pictures": len(cases), "numbers": numbers})
    write_text(folder / "results.md", markdown(benchmark, numbers, len(cases)))
    return numbers


def markdown(benchmark: Benchmark, numbers: Mapping[str, float], pictures: int) -> str:
    """Our row beside those that others have printed, with their sources."""
    columns = list(numbers)
    lines = [
        f"# {benchmark.name}, {pictures} pictures",
        "",
        f"| method | {' | '.join(columns)} |",
        f"| --- |{' --- |' * len(columns)}",
        f"| this run | {' | '.join(f'{100 * value:.1f}' for value in numbers.values())} |",
    ]
    for row in benchmark.published:
        values = (f"{100 * row.numbers[name]:.1f}" if name in row.numbers else "" for name in columns)
        lines.append(f"| {row.method} (printed) | {' | '.join(values)} |")
    sources = dict.fromkeys(f"- printed rows: {row.source}" for row in benchmark.published)
    return "\n".join([*lines, "", f"- {benchmark.notes}", *sources, ""])
