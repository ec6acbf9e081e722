"""COCO-Position (MIGC, arXiv 2402.05408): 2 to 6 things of COCO's categories, each found in its box or not.

MIGC's authors no longer have their scorer, they say in its repository. The rule is that of ConsistCompose (arXiv
2511.18333), `eval/coco_position_benchmark.py`, which its authors made of MIG_Bench's and published with the prompts.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instdiff_jax.data.vision import Pixels, box_ious, keep_best
from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges, Published, Thing, read_unit_box
from instdiff_jax.evaluation.benchmarks.coco_mig import MIN_IOU, NMS, SIDE
from instdiff_jax.evaluation.metrics import score_detections
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import read_text


def read(path: Path) -> list[Case]:
    """Reads coco_position.jsonl, which is one object {id: {caption, segment: [{label, bbox}]}}."""
    path = path / "coco_position.jsonl" if path.is_dir() else path
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object {{id: {{caption, segment}}}}")
    return [_case(str(key), value, f"{path}: {short(key)}") for key, value in values.items()]


def _case(key: str, value: Any, where: str) -> Case:
    if not isinstance(value, Mapping) or not isinstance(value.get("segment"), list) or not value["segment"]:
        raise InputError(f"{where}: expected an object with caption and segment")
    things = []
    for i, row in enumerate(value["segment"]):
        if not isinstance(row, Mapping):
            raise InputError(f"{where}: segment[{i}]: expected an object with label and bbox")
        label = read_text(row.get("label"), f"{where}: segment[{i}].label").strip()
        box = read_unit_box(row.get("bbox"), f"{where}: segment[{i}].bbox")
        things.append(Thing(label, box, label.removeprefix("a ")))
    caption = read_text(value.get("caption"), f"{where}: caption").strip()
    # The scorer reads the id after the last "_".
    return Case(key, caption, tuple(things), f"L{len(things)}", f"instdiff_{key}.png")


def judge(case: Case, image: Pixels, judges: Judges) -> dict[str, Any]:
    """For each thing: the best IoU of a detection of its category with its box, that box, and the highest score."""
    assert judges.grounder is not None
    if image.shape[:2] != (SIDE, SIDE):
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BICUBIC))
    things = []
    for thing in case.things:
        box = np.array(thing.box) * SIDE
        found = judges.grounder.ground(image, thing.category)
        kept = keep_best(found, NMS)
        ious = box_ious(found.boxes[kept], box) if kept else np.zeros(1)
        best = int(ious.argmax())
        # The scorer keeps no box that touches nothing, and gives the best box the highest score of all.
        near = found.boxes[kept[best]].tolist() if ious[best] > 0 else None
        score = float(found.scores[kept[0]]) if kept else 0.0
        things.append({"iou": float(ious[best]), "asked": box.tolist(), "found": near, "score": score})
    return {"things": things}


def table(judged: Sequence[tuple[Case, Mapping[str, Any]]]) -> dict[str, float]:
    """Success rates of instances and of whole pictures, mean IoU, COCO's AP of all boxes as one category; by level."""
    ious = [[thing["iou"] for thing in values["things"]] for _, values in judged]
    whole = [all(iou >= MIN_IOU for iou in one) for one in ious]
    flat = [iou for one in ious for iou in one]
    columns = {"ISR": float(np.mean([iou >= MIN_IOU for iou in flat])), "SR": float(np.mean(whole))}
    columns["mIoU"] = float(np.mean(flat))
    precision = _precision([values["things"] for _, values in judged])
    columns |= {name: getattr(precision, name) or 0.0 for name in ("AP", "AP50", "AP75")}
    for level in sorted({case.level for case, _ in judged}):
        won = [good for good, (case, _) in zip(whole, judged, strict=True) if case.level == level]
        columns[f"SR {level}"] = float(np.mean(won))
    return columns


def _precision(pictures: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    def row(number: int, box: Sequence[float]) -> dict[str, Any]:
        x0, y0, x1, y1 = box
        sides = x1 - x0, y1 - y0
        rows = {"image_id": number, "category_id": 1, "bbox": [x0, y0, *sides], "area": sides[0] * sides[1]}
        return rows | {"iscrowd": 0}

    pairs = [(number, thing) for number, things in enumerate(pictures, 1) for thing in things]
    truth = [row(number, thing["asked"]) for number, thing in pairs]
    found = [row(number, thing["found"]) | {"score": thing["score"]} for number, thing in pairs if thing["found"]]
    return score_detections([SIDE] * len(pictures), truth, found, "bbox", ["object"])


def _row(method: str, *numbers: float) -> Published:
    names = ("ISR", "SR", "mIoU", "AP", "AP50", "AP75")
    source = "github.com/OpenSenseNova/ConsistCompose (README; arXiv 2511.18333)"
    return Published(method, {name: value / 100 for name, value in zip(names, numbers, strict=True)}, source)


BENCHMARK = Benchmark(
    name="coco-position",
    files="coco_position.jsonl of github.com/OpenSenseNova/ConsistCompose, or a JSON file of that form",
    judges=("grounder",),
    read=read,
    judge=judge,
    table=table,
    published=(
        _row("GLIGEN", 82.6, 52.1, 69.0, 40.5, 75.9, 39.1),
        _row("InstanceDiffusion", 87.8, 65.5, 78.1, 57.2, 83.6, 65.5),
        _row("MIGC++", 86.8, 63.4, 74.9, 48.3, 79.2, 52.6),
        _row("CreatiLayout", 74.0, 42.5, 64.9, 32.4, 61.1, 31.6),
        _row("ConsistCompose", 92.6, 76.1, 85.3, 70.9, 89.1, 76.9),
    ),
    notes="By ConsistCompose's scorer: MIGC's own, whose numbers are in its paper, is not published.",
)
