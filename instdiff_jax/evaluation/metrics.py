"""How well detections match the requested instances: COCO's average precision, IoU, points in masks, attributes.

Paper (arXiv 2402.03290), section 4: a detector finds instances in the generated images, and the layout is the ground
truth. Every metric is a fraction from 0 to 1, or None if there is nothing to measure.
"""

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instdiff_jax.evaluation.detect import Detection
from instdiff_jax.evaluation.split import Scene, Target
from instdiff_jax.geometry.masks import encode_mask

MATCH_IOU = 0.5


class Found(NamedTuple):
    """A detection whose mask is compressed RLE, a thousand times smaller.

    Attributes:
        category, score, box, attributes: as in `Detection`.
        rle: the mask; None if the detector has no masks.
    """

    category: str
    score: float
    box: tuple[float, float, float, float]
    rle: dict[str, Any] | None
    attributes: Mapping[str, str]

    @classmethod
    def from_detection(cls, detection: Detection, has_masks: bool = True) -> "Found":
        rle = encode_mask(detection.mask) if has_masks else None
        box = tuple(float(value) for value in detection.box)
        return cls(detection.category, float(detection.score), box, rle, dict(detection.attributes))


class TargetMeasure(NamedTuple):
    """One requested instance, compared with the detections of its category that have a high enough score.

    Attributes:
        box_iou: the best IoU over the detections; 0 without any.
        mask_iou: the same for masks; None if the annotation or the detector has none.
        point_in: whether the point lies in a detected mask.
        scribble_in: fraction of the scribble's points in a detected mask.
        match: the detection with the best IoU if that is at least 0.5; None if not found.
    """

    box_iou: float
    mask_iou: float | None
    point_in: float | None
    scribble_in: float | None
    match: Found | None


def measure_targets(
    targets: Sequence[Target], detections: Sequence[Found], min_score: float, has_masks: bool = True
) -> list[TargetMeasure]:
    """Measures each target separately: one detection may match several targets.

    Args:
        targets: of one image.
        detections: in that image.
        min_score: detections with a lower score are ignored (but count for average precision).
        has_masks: whether the detector finds masks.
    """
    measures = []
    for target in targets:
        same = [found for found in detections if found.category == target.category and found.score >= min_score]
        boxes = _ious([list(found.box) for found in same], target.xywh)
        masks = [found.rle for found in same]
        mask_ious = _ious(masks, target.rle) if has_masks and target.rle is not None else None
        ious = boxes if mask_ious is None else mask_ious
        best = int(np.argmax(ious)) if len(ious) else -1
        is_found = best >= 0 and ious[best] >= MATCH_IOU
        covered = coco_mask.decode(coco_mask.merge(masks)).astype(bool) if has_masks and masks else None
        measures.append(
            TargetMeasure(
                box_iou=float(boxes.max(initial=0)),
                mask_iou=None if mask_ious is None else float(mask_ious.max(initial=0)),
                point_in=points_in_mask([target.point], covered) if has_masks else None,
                scribble_in=points_in_mask(target.scribble, covered) if has_masks else None,
                match=same[best] if is_found else None,
            )
        )
    return measures


def points_in_mask(points: Sequence[Sequence[float]], mask: np.ndarray | None) -> float:
    """PiM: the fraction of points x, y (pixels) in the mask; 0 without a mask."""
    if mask is None:
        return 0.0
    columns, rows = np.floor(np.asarray(points, np.float64)).astype(int).T
    height, width = mask.shape
    return float(mask[np.clip(rows, 0, height - 1), np.clip(columns, 0, width - 1)].mean())


def _ious(detected: list, target: Any) -> Float[np.ndarray, " n"]:
    """IoU of each detection with the target: boxes x, y, width, height, or RLE masks."""
    return coco_mask.iou(detected, [target], [0])[:, 0] if detected else np.zeros(0)


def attribute_accuracy(
    targets: Sequence[Target], measures: Sequence[TargetMeasure], kinds: Sequence[str]
) -> dict[str, float | None]:
    """Accuracy of attributes.

    For each kind: KIND_accuracy over all targets that have the attribute (not found counts as wrong) and
    KIND_accuracy_found over those found. With several kinds also all_attributes_accuracy: all of a target's are right.
    """
    numbers: dict[str, float | None] = {}
    pairs = list(zip(targets, measures, strict=True))
    for kind in kinds:
        having = [(target.attributes[kind], measure.match) for target, measure in pairs if kind in target.attributes]
        right = [
            (match is not None, match is not None and match.attributes.get(kind) == value) for value, match in having
        ]
        numbers[f"{kind}_accuracy"] = mean(ok for _, ok in right)
        numbers[f"{kind}_accuracy_found"] = mean(ok for is_found, ok in right if is_found)
    if len(kinds) > 1:
        having = [(target, measure.match) for target, measure in pairs if set(kinds) & set(target.attributes)]
        right = [
            match is not None
            and all(match.attributes.get(kind) == value for kind, value in target.attributes.items() if kind in kinds)
            for target, match in having
        ]
        numbers["all_attributes_accuracy"] = mean(right)
    return numbers


def attribute_leakage(
    images: Sequence[tuple[Sequence[Target], Sequence[TargetMeasure]]], kinds: Sequence[str]
) -> dict[str, float | None]:
    """Leakage of attributes between instances.

    For each kind, KIND_leak: of the instances found with a wrong attribute, the fraction whose attribute is that of
    another requested instance of the image.

    Args:
        images: the targets of each image, and their measures.
        kinds: of attributes.
    """
    numbers: dict[str, float | None] = {}
    for kind in kinds:
        leaked = []
        for targets, measures in images:
            wanted = [target.attributes.get(kind) for target in targets]
            for value, measure in zip(wanted, measures, strict=True):
                seen = None if measure.match is None else measure.match.attributes.get(kind)
                if value is not None and seen is not None and seen != value:
                    leaked.append(seen in wanted)
        numbers[f"{kind}_leak"] = mean(leaked)
    return numbers


def mean(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are not None; None if there are none."""
    kept = [float(value) for value in values if value is not None]
    return float(np.mean(kept)) if kept else None


class Precision(NamedTuple):
    """COCO's averages, and the AP of each category in the ground truth."""

    AP: float | None
    AP50: float | None
    AP75: float | None
    AR: float | None
    by_category: dict[str, float]


def average_precision(
    scenes: Sequence[Scene], detections: Sequence[Sequence[Found]], kind: str, categories: Sequence[str]
) -> Precision:
    """COCO's AP over IoU 0.50:0.95, at 0.50 and 0.75, and AR, at 100 detections and all areas (pycocotools).

    Args:
        scenes: the ground truth; targets that were not requested are COCO's crowds: neither found nor missed.
        detections: in each scene's image; other categories than those given are ignored.
        kind: "bbox", or "segm", for which targets without a mask are crowds.
        categories: names.
    """
    number_of = {name: k for k, name in enumerate(categories, 1)}
    truth, found = [], []
    for number, (scene, rows) in enumerate(zip(scenes, detections, strict=True), 1):
        for target in scene.targets:
            box = target.xywh
            rle = target.rle or _box_rle(box, scene.size)
            area = float(coco_mask.area(rle)) if kind == "segm" else box[2] * box[3]
            crowd = not target.asked or kind == "segm" and target.rle is None
            row = {"image_id": number, "category_id": number_of[target.category], "bbox": box, "segmentation": rle}
            truth.append(row | {"area": area, "iscrowd": int(crowd)})
        for detection in rows:
            if detection.category in number_of and (kind == "bbox" or detection.rle is not None):
                row = {"image_id": number, "category_id": number_of[detection.category], "score": detection.score}
                x, y, w, h = detection.box
                found.append(row | {"bbox": [x, y, w, h], "segmentation": detection.rle, "area": w * h, "iscrowd": 0})
    return score_detections([scene.size for scene in scenes], truth, found, kind, categories)


def score_detections(
    sides: Sequence[int], truth: list[dict], found: list[dict], kind: str, categories: Sequence[str]
) -> Precision:
    """COCO's averages of rows in COCO's form, whose images and categories are numbered from 1.

    Args:
        sides: of the images, which are squares.
        truth: rows with image_id, category_id, bbox, segmentation (RLE), area and iscrowd.
        found: the same with score.
        kind: "bbox" or "segm".
        categories: names.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        evaluation = COCOeval(*(coco_of_rows(sides, rows, categories) for rows in (truth, found)), kind)
        evaluation.params.areaRng, evaluation.params.areaRngLbl = [[0, 1e10]], ["all"]
        evaluation.params.maxDets = [100]
        evaluation.evaluate()
        evaluation.accumulate()
    # precision: IoU threshold, recall threshold, category, area, detections; -1 for categories without ground truth.
    precision, recall = evaluation.eval["precision"][..., 0, 0], evaluation.eval["recall"][..., 0, 0]
    each = {name: _mean(precision[:, :, k]) for k, name in enumerate(categories)}
    return Precision(
        AP=_mean(precision),
        AP50=_mean(precision[0]),
        AP75=_mean(precision[5]),
        AR=_mean(recall),
        by_category={name: value for name, value in each.items() if value is not None},
    )


def _mean(values: np.ndarray) -> float | None:
    kept = values[values > -1]
    return float(kept.mean()) if kept.size else None


def coco_of_rows(sides: Sequence[int], rows: list[dict], categories: Sequence[str]) -> COCO:
    """pycocotools' index of rows, see `score_detections`; the index says on standard output that it is made."""
    coco = COCO()
    # COCO wants sizes even for masks in RLE.
    images = [{"id": k, "width": side, "height": side} for k, side in enumerate(sides, 1)]
    listed = [{"id": k, "name": name} for k, name in enumerate(categories, 1)]
    # Ids from 1: COCOeval takes a match with id 0 for none.
    annotations = [row | {"id": number} for number, row in enumerate(rows, 1)]
    coco.dataset = {"images": images, "annotations": annotations, "categories": listed}
    coco.createIndex()
    return coco


def _box_rle(box: Sequence[float], size: int) -> dict[str, Any]:
    return coco_mask.frPyObjects(np.array([box], np.float64), size, size)[0]
