"""LayoutSAM-Eval (CreatiLayout, arXiv 2412.03859): a vision language model answers questions about each box.

The rule is that of https://github.com/HuiZhang0812/CreatiLayout, `score_layoutsam_benchmark.py`: is the thing in the
crop of its box; and if it is, do colour, texture and shape fit the detailed caption.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instdiff_jax.data.vision import Pixels
from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges, Published, Thing, read_unit_box
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import plain_integer, read_numbers, read_text
from instdiff_jax.other_tools import read_list
from instdiff_jax.paths import read_file

ATTRIBUTES = ("color", "texture", "shape")


def read(path: Path) -> list[Case]:
    """Reads the dataset's rows as .json or .jsonl: file_name, global_caption, width, height and lists of regions."""
    if path.suffix.lower() == ".jsonl":
        rows = []
        for i, line in enumerate(read_file(path).decode("utf-8", "replace").splitlines()):
            try:
                rows += [json.loads(line)] if line.strip() else []
            except (ValueError, RecursionError) as error:
                raise InputError(f"{path}:{i + 1}: expected JSON: {short(str(error))}") from error
    else:
        rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: expected a list of rows, as in HuiZhang0812/LayoutSAM-eval")
    return [_case(row, f"{path}: [{i}]") for i, row in enumerate(rows)]


def _case(row: Any, where: str) -> Case:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object, got {short(row)}")
    sides = [plain_integer(row.get(key)) for key in ("width", "height")]
    if not all(sides):
        raise InputError(f"{where}: expected width and height in pixels, got {short(sides)}")
    boxes = read_list(row.get("bbox_list"), f"{where}.bbox_list")
    names = read_list(row.get("region_captions"), f"{where}.region_captions")
    details = read_list(row.get("detail_region_captions"), f"{where}.detail_region_captions")
    if not len(boxes) == len(names) == len(details) or not boxes:
        raise InputError(f"{where}: expected as many boxes as captions of both kinds, got {len(boxes)}, {len(names)}")
    things = []
    for i, (box, name, detail) in enumerate(zip(boxes, names, details, strict=True)):
        edges = read_numbers(box, 4, f"{where}.bbox_list[{i}]", "[x0, y0, x1, y1]")
        # The scorer rounds so too.
        parts = [round(edge / sides[k % 2], 3) for k, edge in enumerate(edges)]  # type: ignore[operator]
        texts = [read_text(text, f"{where}.region_captions[{i}]") for text in (name, detail)]
        things.append(Thing(texts[1], read_unit_box(parts, f"{where}.bbox_list[{i}]"), texts[0], texts[1]))
    file = read_text(row.get("file_name"), f"{where}.file_name")
    caption = read_text(row.get("global_caption"), f"{where}.global_caption")
    return Case(Path(file).stem, caption, tuple(things), "all", Path(file).name)


def judge(case: Case, image: Pixels, judges: Judges) -> dict[str, Any]:
    """For each region: whether its subject is there, and whether each attribute fits."""
    assert judges.answerer is not None
    height, width = image.shape[:2]
    rows = []
    for thing in case.things:
        x0, y0, x1, y1 = (int(edge * side) for edge, side in zip(thing.box, (width, height) * 2, strict=True))
        crop = image[y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)]
        name, detail = thing.category.replace("/", ""), thing.detail.replace("/", "")
        there = _yes(judges.answerer.answer(crop, presence_question(name)))
        row = {"spatial": there}
        for attribute in ATTRIBUTES:
            row[attribute] = there and _yes(judges.answerer.answer(crop, attribute_question(name, detail, attribute)))
        rows.append(row)
    return {"things": rows}


def presence_question(name: str) -> str:
    """The benchmark's own words: another wording is another benchmark."""
    return (
        f'Is the subject "{name}" present in the image? '
        'Strictly answer with "Yes" or "No", without any irrelevant words.'
    )


def attribute_question(name: str, detail: str, attribute: str) -> str:
    """The benchmark's own words."""
    return (
        f'Is the subject in "{name}" in the image consistent with the {attribute} described in the detailed '
        f'description: "{detail}"? Strictly answer with "Yes" or "No", without any irrelevant words. '
        f'If the {attribute} is not mentioned in the detailed description, the answer is "Yes".'
    )


def _yes(answer: str) -> bool:
    return "Yes" in answer or "yes" in answer


def table(judged: Sequence[tuple[Case, Mapping[str, Any]]]) -> dict[str, float]:
    """Shares of all regions of all pictures."""
    things = [thing for _, values in judged for thing in values["things"]]
    return {name: sum(thing[name] for thing in things) / len(things) for name in ("spatial", *ATTRIBUTES)}


def _row(method: str, *values: float) -> Published:
    numbers = {name: value / 100 for name, value in zip(("spatial", *ATTRIBUTES), values, strict=True)}
    return Published(method, numbers, "arXiv 2510.11000, table 2 (1,000 of the pictures, those with large boxes)")


BENCHMARK = Benchmark(
    name="layoutsam",
    files="rows of HuiZhang0812/LayoutSAM-eval as .json or .jsonl",
    judges=("answerer",),
    read=read,
    judge=judge,
    table=table,
    published=(
        _row("GLIGEN", 77.35, 54.86, 59.38, 57.75),
        _row("InstanceDiffusion", 86.39, 71.39, 76.73, 75.37),
        _row("MIGC", 86.04, 71.07, 74.88, 73.37),
        _row("3DIS", 88.34, 80.97, 82.52, 81.30),
        _row("CreatiLayout", 93.59, 77.43, 79.62, 78.89),
        _row("EliGen", 94.05, 83.84, 87.31, 87.01),
        _row("ContextGen", 93.96, 87.44, 89.26, 88.36),
    ),
    notes="The printed numbers of others were judged by MiniCPM-V 2.6; another judge gives other numbers.",
)
