"""COCO-MIG (MIGC, arXiv 2402.05408): instances in place and in their colour, by the number of instances, L2 to L6.

The rule is that of https://github.com/LeyRio/MIG_Bench, `eval_mig.py`: a detector looks for the category; the best box
must reach an IoU of 0.5 with the layout's; then a fifth of the mask in the layout's box must have the colour in HSV.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from jaxtyping import Bool, Int, UInt8
from PIL import Image

from instdiff_jax.data.vision import Pixels, box_ious, keep_best
from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.benchmarks.case import Benchmark, Case, Judges, Published, Thing, read_unit_box
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import read_text
from instdiff_jax.paths import read_file

SIDE = 512  # the scorer's canvas
MIN_IOU, MIN_SHARE, NMS = 0.5, 0.2, 0.8
# Lowest and highest hue, saturation and value on OpenCV's scale of bytes (hue: half degrees). MIG_Bench, eval_mig.py.
COLOURS: dict[str, tuple[tuple[tuple[int, int, int], tuple[int, int, int]], ...]] = {
    "red": (((0, 50, 70), (9, 255, 255)), ((159, 50, 70), (180, 255, 255))),
    "blue": (((90, 50, 70), (128, 255, 255)),),
    "yellow": (((25, 50, 70), (35, 255, 255)),),
    "green": (((36, 50, 70), (89, 255, 255)),),
    "black": (((0, 0, 0), (180, 255, 30)),),
    "white": (((0, 0, 221), (180, 43, 255)),),
    "brown": (((6, 43, 35), (25, 255, 255)),),
}
LEVELS = ("L2", "L3", "L4", "L5", "L6")


def read(path: Path) -> list[Case]:
    """Reads mig_bench_anno.yaml ({caption: {phrase: boxes, coco_id}}) or mig_bench.json ({id: {caption, segment}})."""
    if path.is_dir():
        path = next(
            (path / name for name in ("mig_bench.json", "mig_bench_anno.yaml") if (path / name).is_file()), path
        )
    if path.suffix.lower() in (".yaml", ".yml"):
        rows = _from_yaml(path)
    else:
        values = read_json(path)
        if not isinstance(values, dict):
            raise InputError(f"{path}: expected an object {{id: {{caption, segment}}}}")
        rows = [(str(key), value, f"{path}: {short(key)}") for key, value in values.items()]
    return [_case(key, value, where) for key, value, where in rows]


def _from_yaml(path: Path) -> list[tuple[str, Any, str]]:
    try:
        values = yaml.load(read_file(path), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: expected YAML: {short(str(error))}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected {{caption: {{phrase: boxes, coco_id: number}}}}")
    rows = []
    for caption, value in values.items():
        where = f"{path}: {short(caption)}"
        if not isinstance(value, dict) or "coco_id" not in value:
            raise InputError(f"{where}: expected {{phrase: boxes, coco_id: number}}, got {short(value)}")
        pairs = [(phrase, boxes) for phrase, boxes in value.items() if phrase != "coco_id"]
        if not all(isinstance(boxes, list) for _, boxes in pairs):
            raise InputError(f"{where}: expected a list of boxes for each phrase")
        segment = [{"label": phrase, "bbox": box} for phrase, boxes in pairs for box in boxes]
        rows.append((str(value["coco_id"]), {"caption": caption, "segment": segment}, where))
    return rows


def _case(key: str, value: Any, where: str) -> Case:
    if not isinstance(value, Mapping) or not isinstance(value.get("segment"), list):
        raise InputError(f"{where}: expected an object with caption and segment")
    things = tuple(_thing(row, f"{where}: segment[{i}]") for i, row in enumerate(value["segment"]))
    if not 2 <= len(things) <= 6:
        raise InputError(f"{where}: expected 2 to 6 instances, got {len(things)}")
    caption = read_text(value.get("caption"), f"{where}: caption")
    return Case(key, caption, things, f"L{len(things)}", f"{_file_name(caption)}_420_{key}.png")


def _file_name(caption: str) -> str:
    """The scorer reads the id after the last "_"; the rest is for people."""
    return "".join(sign if sign.isalnum() or sign in " -" else " " for sign in caption)[:120].strip() or "picture"


def _thing(row: Any, where: str) -> Thing:
    if not isinstance(row, Mapping):
        raise InputError(f"{where}: expected an object with label and bbox")
    phrase = read_text(row.get("label"), f"{where}.label")
    words = phrase.split(" ")
    if len(words) < 3 or words[1] not in COLOURS:
        raise InputError(
            f"{where}.label: expected 'a COLOUR NAME' with one of {', '.join(COLOURS)}, got {short(phrase)}"
        )
    return Thing(phrase, read_unit_box(row.get("bbox"), f"{where}.bbox"), " ".join(words[2:]), words[1])


def judge(case: Case, image: Pixels, judges: Judges) -> dict[str, Any]:
    """For each instance: whether it is in place, whether its colour is right, and the IoU that counts."""
    assert judges.grounder is not None and judges.segmenter is not None
    if image.shape[:2] != (SIDE, SIDE):
        image = np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    rows = []
    for thing in case.things:
        box = np.array(thing.box) * SIDE
        found = judges.grounder.ground(image, thing.category)
        kept = keep_best(found, NMS)
        iou = float(box_ious(found.boxes[kept], box).max()) if kept else 0.0
        placed = iou >= MIN_IOU
        coloured = placed and colour_share(image, judges.segmenter.segment(image, box), thing.detail) >= MIN_SHARE
        # An instance in place but of another colour counts as IoU 0; one out of place keeps its IoU below 0.5.
        rows.append({"placed": placed, "coloured": bool(coloured), "iou": iou if coloured or not placed else 0.0})
    return {"things": rows}


def colour_share(image: Pixels, mask: Bool[np.ndarray, "H W"], colour: str) -> float:
    """The share of a mask's pixels that have a colour; 0 for an empty mask."""
    if not mask.any():
        return 0.0
    hsv = to_hsv(image[mask])
    right = np.zeros(len(hsv), bool)
    for low, high in COLOURS[colour]:
        right |= ((hsv >= low) & (hsv <= high)).all(-1)
    return float(right.mean())


def to_hsv(pixels: UInt8[np.ndarray, "... 3"]) -> Int[np.ndarray, "... 3"]:
    """Hue (0 to 179), saturation and value as OpenCV gives them for bytes; equal in all 2**24 colours."""
    ranks, one = np.arange(1, 256), 1 << 12
    by_value = np.concatenate([[0], np.rint(255 * one / ranks).astype(np.int64)])
    by_range = np.concatenate([[0], np.rint(180 * one / (6 * ranks)).astype(np.int64)])
    red, green, blue = (pixels[..., i].astype(np.int64) for i in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    spread = value - np.minimum(np.minimum(red, green), blue)
    saturation = (spread * by_value[value] + one // 2) >> 12
    turned = np.where(value == green, blue - red + 2 * spread, red - green + 4 * spread)
    hue = (np.where(value == red, green - blue, turned) * by_range[spread] + one // 2) >> 12
    return np.stack([np.where(hue < 0, hue + 180, hue), saturation, value], -1)


def table(judged: Sequence[tuple[Case, Mapping[str, Any]]]) -> dict[str, float]:
    """Mean IoU and instance success rate by level and over all instances; success rate of whole pictures."""
    columns: dict[str, float] = {}
    for level in (*LEVELS, "all"):
        chosen = [values["things"] for case, values in judged if level in (case.level, "all")]
        things = [thing for rows in chosen for thing in rows]
        if things:
            columns[f"mIoU {level}"] = float(np.mean([thing["iou"] for thing in things]))
            columns[f"ISR {level}"] = float(np.mean([thing["placed"] and thing["coloured"] for thing in things]))
            whole = [all(thing["placed"] and thing["coloured"] for thing in rows) for rows in chosen]
            columns[f"SR {level}"] = float(np.mean(whole))
    return columns


def _row(method: str, ious: tuple[float, ...], rates: tuple[float, ...]) -> Published:
    names = [f"{kind} {level}" for kind in ("mIoU", "ISR") for level in (*LEVELS, "all")]
    source = "https://github.com/LeyRio/MIG_Bench (README, 800 prompts without people)"
    return Published(method, dict(zip(names, ious + rates, strict=True)), source)


def _all(method: str, success: float, instances: float, iou: float) -> Published:
    numbers = {"SR all": success / 100, "ISR all": instances / 100, "mIoU all": iou / 100}
    return Published(method, numbers, "arXiv 2510.11000, table 2")


BENCHMARK = Benchmark(
    name="coco-mig",
    files="mig_bench_anno.yaml of github.com/limuloo/MIGC, or mig_bench.json",
    judges=("grounder", "segmenter"),
    read=read,
    judge=judge,
    table=table,
    published=(
        _row("BoxDiff", (0.37, 0.33, 0.25, 0.23, 0.23, 0.26), (0.28, 0.24, 0.14, 0.12, 0.13, 0.16)),
        _row("GLIGEN", (0.37, 0.29, 0.253, 0.26, 0.26, 0.27), (0.42, 0.32, 0.27, 0.27, 0.28, 0.30)),
        _row("ReCo", (0.55, 0.48, 0.49, 0.47, 0.49, 0.49), (0.63, 0.53, 0.55, 0.52, 0.55, 0.55)),
        _row("InstanceDiffusion", (0.52, 0.48, 0.50, 0.42, 0.42, 0.46), (0.58, 0.52, 0.55, 0.47, 0.47, 0.51)),
        _row("MIGC", (0.64, 0.58, 0.57, 0.54, 0.57, 0.56), (0.74, 0.67, 0.67, 0.63, 0.66, 0.66)),
        _all("GLIGEN", 4.25, 29.56, 27.44),
        _all("InstanceDiffusion", 23.00, 60.28, 54.79),
        _all("MIGC", 27.75, 66.44, 56.96),
        _all("EliGen", 26.00, 64.12, 59.23),
        _all("ContextGen", 33.12, 69.72, 65.12),
    ),
    notes="mIoU counts 0 for an instance in place whose colour is wrong, and the IoU for one out of place.",
)
