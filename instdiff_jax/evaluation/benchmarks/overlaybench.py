"""OverLayBench (arXiv 2509.19282): boxes that overlap; a vision language model finds boxes and answers questions.

The rules are those of https://github.com/mlpc-ucsd/OverLayBench, `overlaybenchpytools/utils.py`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.data.vision import Pixels
from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges, Published, Thing, read_unit_box
from instdiff_jax.files import json_files, read_json
from instdiff_jax.geometry.checks import plain_integer, read_numbers, read_text
from instdiff_jax.other_tools import read_list

SIDE = 1024  # of the annotations' canvas in pixels
SPLITS = ("simple", "medium", "hard")
Box = Sequence[float]


def read(path: Path) -> list[Case]:
    """Reads rows {image_id, annotation} as JSON: simple.json, medium.json and hard.json of a folder, or one of them."""
    files = [file for file in json_files(path) if file.stem in SPLITS] if path.is_dir() else [path]
    if not files:
        raise InputError(f"{path}: expected {', '.join(f'{name}.json' for name in SPLITS)}, found none")
    cases = []
    for file in files:
        rows = read_json(file)
        if not isinstance(rows, list):
            raise InputError(f"{file}: expected a list of rows, as in cywang143/OverLayBench_Eval")
        cases += [_case(row, file.stem, f"{file}: [{i}]") for i, row in enumerate(rows)]
    return cases


def _case(row: Any, split: str, where: str) -> Case:
    number = str(row.get("image_id")) if isinstance(row, Mapping) else ""
    if not number.isalnum():
        raise InputError(f"{where}: expected an object with image_id and annotation")
    values = row.get("annotation")
    if isinstance(values, str):
        (values,) = read_list(f"[{values}]", f"{where}.annotation")
    if not isinstance(values, Mapping) or not isinstance(values.get("annotations"), Mapping):
        raise InputError(f"{where}.annotation: expected an object with annotations")
    things = []
    for name, one in values["annotations"].items():
        place = f"{where}.annotations.{short(name)}"
        if not isinstance(one, Mapping):
            raise InputError(f"{place}: expected an object with bbox, category and local_prompt")
        edges = [int(edge) for edge in read_numbers(one.get("bbox"), 4, f"{place}.bbox", "[x0, y0, x1, y1]")]
        box = read_unit_box([edge / SIDE for edge in edges], f"{place}.bbox")
        phrase = read_text(one.get("local_prompt") or name, f"{place}.local_prompt")
        things.append(Thing(phrase, box, read_text(one.get("category"), f"{place}.category"), str(name)))
    caption = read_text(values.get("global_prompt") or values.get("caption"), f"{where}.global_prompt")
    relations = values.get("relations") or {}
    if not isinstance(relations, Mapping):
        raise InputError(f"{where}.relations: expected an object, got {short(relations)}")
    more = {
        "boxes": [[int(edge) for edge in one["bbox"]] for one in values["annotations"].values()],
        "overlaps": _read_pairs(values.get("valid_overlap") or [], len(things), f"{where}.valid_overlap"),
        "relations": {str(pair): text for pair, text in relations.items()},
        "annotations": {name: dict(one) for name, one in values["annotations"].items()},
    }
    return Case(f"{split}-{number}", caption, tuple(things), split, f"{split}/seed_1/{number}.png", more)


def _read_pairs(rows: Any, count: int, where: str) -> list[tuple[int, int]]:
    """Pairs of instances, by their numbers, whose overlap is measured."""
    if not isinstance(rows, list):
        raise InputError(f"{where}: expected a list, got {short(rows)}")
    pairs = []
    for i, row in enumerate(rows):
        given = row.get("overlap_box") if isinstance(row, Mapping) else None
        numbers = [plain_integer(one) for one in given] if isinstance(given, list | tuple) else []
        a, b = numbers[:2] if len(numbers) >= 2 else (None, None)
        if a is None or b is None or max(a, b) >= count:
            raise InputError(f"{where}[{i}].overlap_box: expected two numbers below {count}, got {short(given)}")
        pairs.append((a, b))
    return pairs


def judge(case: Case, image: Pixels, judges: Judges) -> dict[str, Any]:
    """IoU of matched boxes, IoU of the pairs' overlaps, and the shares of entities and relations answered with yes."""
    assert judges.answerer is not None
    side = image.shape[0]
    found = read_answer(judges.answerer.answer(image, boxes_question(case)))
    boxes = {name: resized(rows, side) for name, rows in found.items() if isinstance(rows, list)}
    iou, overlap = box_scores(case, boxes)
    entities = read_answer(judges.answerer.answer(image, entities_question(case, side)))
    relations = read_answer(judges.answerer.answer(image, relations_question(case, side)))
    return {
        "iou": iou,
        "overlap": overlap,
        "entities": [_is_yes(entities.get(thing.detail)) for thing in case.things],
        "relations": [_is_yes(relations.get(pair)) for pair in case.more["relations"]],
    }


def _is_yes(answer: Any) -> bool:
    return isinstance(answer, str) and answer.lower() == "yes"


def box_iou(a: Box, b: Box) -> float:
    """Intersection over union; areas of boxes with crossed edges count as they come, as in the benchmark."""
    wide = max(0, min(a[2], b[2]) - max(a[0], b[0]))
    inside = wide * max(0, min(a[3], b[3]) - max(a[1], b[1]))
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inside
    return inside / union if union > 0 else 0.0


def overlap_of(a: Box, b: Box) -> list[float]:
    return [max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])]


def match(asked: Sequence[Box], found: Sequence[Box]) -> list[tuple[float, int, int]]:
    """Pairs (IoU, asked, found), best first, each box once; zero pairs count too."""
    pairs = [(box_iou(a, b), i, j) for i, a in enumerate(asked) for j, b in enumerate(found)]
    taken: list[tuple[float, int, int]] = []
    for pair in sorted(pairs, key=lambda pair: -pair[0]):
        if pair[1] not in {one[1] for one in taken} and pair[2] not in {one[2] for one in taken}:
            taken.append(pair)
    return taken


def box_scores(case: Case, found: Mapping[str, Sequence[Box]]) -> tuple[float, float]:
    """mIoU and O-mIoU of one picture: matched by category; what is not found counts 0.

    Args:
        case: what was asked; its boxes are whole pixels of the annotations' canvas.
        found: category to boxes on that canvas.
    """
    boxes: list[Box] = case.more["boxes"]
    matched: dict[tuple[float, ...], Box] = {}
    ious: list[float] = []
    for category in dict.fromkeys(thing.category for thing in case.things):
        members = [i for i, thing in enumerate(case.things) if thing.category == category]
        pairs = match([boxes[i] for i in members], found.get(category, []))
        ious += [pair[0] for pair in pairs] + [0.0] * (len(members) - len(pairs))
        for _, i, j in pairs:  # of equal boxes the first match counts, as in the benchmark
            matched.setdefault(tuple(boxes[members[i]]), found[category][j])
    overlaps = [
        box_iou(
            overlap_of(boxes[i], boxes[j]),
            overlap_of(*(matched.get(tuple(boxes[k]), (0, 0, 0, 0)) for k in (i, j))),
        )
        for i, j in case.more["overlaps"]
    ]
    return float(np.mean(ious)), float(np.mean(overlaps)) if overlaps else 0.0


def resized(rows: Sequence[Any], side: int) -> list[list[int]]:
    """Boxes of an answer in whole pixels of the annotations' canvas; what is no box is left out."""
    boxes = []
    for row in rows:
        try:
            if isinstance(row, list) and len(row) == 4:
                boxes.append([int(float(edge) * SIDE / side) for edge in row])
        except (TypeError, ValueError, OverflowError):
            continue
    return boxes


def read_answer(text: str) -> dict[str, Any]:
    """The JSON object of an answer, in a ```json fence or alone; empty if there is none."""
    fenced = re.search(r"```json\s*([\s\S]+?)\s*```", text)
    try:
        values = json.loads(fenced[1] if fenced else text)
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def boxes_question(case: Case) -> str:
    """Asks for all boxes by category."""
    names = sorted({thing.category for thing in case.things})
    return (
        f"Find every instance of these categories in the image: {names}. Answer with JSON alone: an object that maps "
        "each category to a list of boxes [x1, y1, x2, y2] in pixels. Each box is around one single object, never "
        "around a group."
    )


def _listed(case: Case, side: int, *keys: str) -> dict[str, Any]:
    rows = {}
    for name, one in case.more["annotations"].items():
        box = [int(edge * side / SIDE) for edge in one["bbox"]]
        rows[name] = {key: box if key == "bbox" else one.get(key) for key in keys}
    return rows


def entities_question(case: Case, side: int) -> str:
    """Asks whether each instance fits its caption."""
    return (
        f"Instances with their boxes and descriptions: {_listed(case, side, 'bbox', 'local_prompt')}. For each name "
        'answer "Yes" if the instance is clearly there, not corrupted, and as its description says, else "No". Answer '
        "with JSON alone: an object that maps each name to its answer."
    )


def relations_question(case: Case, side: int) -> str:
    """Asks whether each pair stands as described."""
    return (
        f"Instances with their boxes: {_listed(case, side, 'bbox')}. Relations of pairs: {case.more['relations']}. For "
        'each pair answer "Yes" if both are there, whole and separate, and the relation holds in the image, else "No". '
        "Answer with JSON alone: an object that maps each pair, as it is written, to its answer."
    )


def table(judged: Sequence[tuple[Case, Mapping[str, Any]]]) -> dict[str, float]:
    """By split: IoUs are means over pictures, rates are over all instances and all pairs."""
    columns: dict[str, float] = {}
    for split in SPLITS:
        rows = [values for case, values in judged if case.level == split]
        if rows:
            columns[f"mIoU {split}"] = float(np.mean([row["iou"] for row in rows]))
            columns[f"O-mIoU {split}"] = float(np.mean([row["overlap"] for row in rows]))
            for name, key in (("SR_E", "entities"), ("SR_R", "relations")):
                answers = [answer for row in rows for answer in row[key]]
                columns[f"{name} {split}"] = float(np.mean(answers)) if answers else 0.0
    return columns


def _row(method: str, *splits: tuple[float, float, float, float]) -> Published:
    numbers = {
        f"{name} {split}": value / 100
        for split, values in zip(SPLITS, splits, strict=True)
        for name, value in zip(("mIoU", "O-mIoU", "SR_E", "SR_R"), values, strict=True)
    }
    return Published(
        method, numbers, "https://mlpc-ucsd.github.io/OverLayBench, the authors' leaderboard (Qwen2.5-VL-32B)"
    )


BENCHMARK = Benchmark(
    name="overlaybench",
    files="simple.json, medium.json and hard.json: rows of cywang143/OverLayBench_Eval",
    judges=("answerer",),
    read=read,
    judge=judge,
    table=table,
    published=(
        _row("GLIGEN", (60.54, 36.22, 49.99, 78.72), (52.46, 26.53, 44.88, 77.46), (50.79, 23.85, 41.7, 79.93)),
        _row(
            "InstanceDiffusion",
            (71.21, 49.99, 77.71, 87.49),
            (60.08, 34.15, 72.51, 83.36),
            (53.68, 25.63, 66.02, 80.34),
        ),
        _row("MIGC", (58.64, 32.15, 63.41, 81.6), (47.42, 20.06, 56.67, 77.85), (40.04, 13.26, 47.8, 74.48)),
        _row("HiCo", (69.47, 47.23, 67.75, 86.08), (55.02, 29.6, 58.24, 79.89), (46.56, 20.35, 48.88, 75.19)),
        _row("3DIS", (65.75, 38.38, 86.24, 86.98), (55.66, 27.29, 80.8, 83.69), (50.65, 21.75, 74.31, 81.57)),
        _row("EliGen", (68.17, 43.72, 86.5, 89.67), (58.56, 32.62, 80.85, 84.42), (52.53, 26.19, 74.03, 84.09)),
        _row(
            "CreatiLayout (SD3)", (58.78, 32.52, 72.34, 84.45), (47.04, 20.67, 62.6, 78.31), (44.24, 18.05, 52.1, 79.98)
        ),
        _row(
            "CreatiLayout (FLUX)", (71.17, 49.8, 84.35, 90.87), (59.72, 35.51, 77.2, 86.39), (54.5, 28.97, 69.72, 86.45)
        ),
    ),
    notes="Our questions are worded anew; numbers compare with the paper's only through the folder for its own scorer.",
)
