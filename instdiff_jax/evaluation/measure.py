"""Measures a folder of images: runs the detector, CLIP and features, and collects all metrics."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, UInt8

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.attributes import name_attributes, unnamed_kinds
from instdiff_jax.evaluation.detect import Detector
from instdiff_jax.evaluation.detectors import Features, finds_masks, run_detector
from instdiff_jax.evaluation.fid import Gaussian, distance_to, fit_gaussian
from instdiff_jax.evaluation.files import image_path, read_image
from instdiff_jax.evaluation.image import EvaluatedImage, TextImageModel
from instdiff_jax.evaluation.metrics import (
    Found,
    attribute_accuracy,
    attribute_leakage,
    average_precision,
    mean,
    measure_targets,
)
from instdiff_jax.evaluation.predictions import Predictions
from instdiff_jax.evaluation.split import Scene, Split, crop_box

Numbers = dict[str, float | None]
# Groups of the breakdown by the number of requested instances.
_GROUPS = ((1, 1), (2, 2), (3, 3), (4, 4), (5, 5), (6, 6), (7, 10), (11, 20), (21, 30))


@dataclasses.dataclass(frozen=True, eq=False)
class Measures:
    """What to measure, and with which models.

    Attributes:
        detector: finds instances; without it only CLIP scores and the Fréchet distance are measured.
        clip: scores images and crops against captions, and names the attributes that the detector does not.
        features: for the Fréchet distance to real images; None: not measured.
        reference: Gaussian of real images' features; None uses the split's images.
        min_score: detections with a lower score count for average precision only.
        batch: images in memory at a time.
    """

    detector: Detector | Predictions | None = None
    clip: TextImageModel | None = None
    features: Features | None = None
    reference: Gaussian | None = None
    min_score: float = 0.25
    batch: int = 32


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of an evaluation. A number is None if it cannot be measured.

    Attributes:
        metrics: of all images.
        by_count: pairs of a number of instances and the metrics of images with that many.
        by_category: category to AP of boxes and masks.
        notes: remarks, one line each.
    """

    images: list[EvaluatedImage]
    metrics: Numbers
    by_count: list[tuple[str, Numbers]]
    by_category: dict[str, Numbers]
    notes: list[str]


class Inspected(NamedTuple):
    """Evaluated images, before their metrics are summarized.

    Attributes:
        kinds: the kinds of attributes that can be measured.
        distance: the Fréchet distance, if measured.
        notes: remarks, one line each.
    """

    images: list[EvaluatedImage]
    kinds: list[str]
    distance: float | None
    notes: list[str]


def inspect(
    split: Split, folder: Path, measures: Measures, report: Callable[[int], None] = lambda count: None
) -> Inspected:
    """Evaluates the images of all scenes of a split, FOLDER/images/<image_id>.png.

    Calls `report` with the number of finished images.

    Raises:
        InputError: for missing or broken images, or real images if `features` need them.
    """
    images, drawn, real = [], [], []
    for first in range(0, len(split.scenes), measures.batch):
        scenes = split.scenes[first : first + measures.batch]
        pixels = np.stack([read_image(image_path(folder, scene), split.size) for scene in scenes])
        images += _inspect_batch(scenes, pixels, measures)
        if measures.features is not None:
            drawn.append(describe(measures.features, pixels))
            if measures.reference is None:
                real.append(describe(measures.features, np.stack([scene.real_image() for scene in scenes])))
        report(len(scenes))

    notes: list[str] = []
    kinds: list[str] = []
    if measures.detector is not None:
        images, kinds, notes = _settle_attributes(images, measures.clip, folder)
        notes += _detector_notes(images, split, measures.detector)
    distance = None
    if measures.features is not None and len(images) > 1:
        described = np.concatenate(drawn)
        reference = measures.reference or fit_gaussian(np.concatenate(real), "features of the real images")
        distance, remarks = distance_to(described, reference, len(described))
        notes += remarks
    return Inspected(images, kinds, distance, notes)


def measure(
    split: Split, folder: Path, measures: Measures, report: Callable[[int], None] = lambda count: None
) -> Outcome:
    """Measures the images of all scenes of a split; arguments and errors are those of `inspect`."""
    images, kinds, distance, notes = inspect(split, folder, measures, report)
    detector = measures.detector
    metrics = summarize(images, split, detector, kinds)
    if distance is not None:
        metrics["FID"] = distance
    by_count = []
    for low, high in _GROUPS:
        group = [image for image in images if low <= len(image.scene.asked) <= high]
        if group:
            by_count.append((str(low) if low == high else f"{low}–{high}", summarize(group, split, detector, kinds)))
    if split.left_out:
        notes.append(f"{split.left_out} images of the split have no instance to request and are left out.")
    return Outcome(images, metrics, by_count, _by_category(images, split, detector), notes)


def summarize(
    images: Sequence[EvaluatedImage], split: Split, detector: Detector | Predictions | None, kinds: Sequence[str]
) -> Numbers:
    """The metrics of some images, in the order of reports; `images` and `instances` are counts."""
    targets = [target for image in images for target in image.scene.asked]
    measures = [item for image in images for item in image.measures]
    numbers: Numbers = {"images": len(images), "instances": len(targets)}
    if detector is not None:
        scenes, found = [image.scene for image in images], [image.found for image in images]
        names = list(split.categories.values())
        for name, kind in (("box", "bbox"), ("mask", "segm")):
            if kind == "segm" and not finds_masks(detector):
                continue
            precision = average_precision(scenes, found, kind, names)
            numbers |= {f"{name}_{key}": getattr(precision, key) for key in ("AP", "AP50", "AP75", "AR")}
            numbers[f"{name}_IoU"] = mean(getattr(item, f"{name}_iou") for item in measures)
        numbers["PiM_point"] = mean(item.point_in for item in measures)
        numbers["PiM_scribble"] = mean(item.scribble_in for item in measures)
        numbers["found"] = mean(item.match is not None for item in measures)
        numbers |= attribute_accuracy(targets, measures, kinds)
        numbers |= attribute_leakage([(image.scene.asked, image.measures) for image in images], kinds)
    numbers["CLIP_global"] = mean(image.clip_global for image in images)
    numbers["CLIP_local"] = mean(value for image in images for value in image.clip_local)
    return {name: value for name, value in numbers.items() if value is not None}


def _by_category(
    images: Sequence[EvaluatedImage], split: Split, detector: Detector | Predictions | None
) -> dict[str, Numbers]:
    if detector is None:
        return {}
    scenes, found = [image.scene for image in images], [image.found for image in images]
    rows: dict[str, Numbers] = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        if kind == "bbox" or finds_masks(detector):
            precision = average_precision(scenes, found, kind, list(split.categories.values()))
            for category, value in precision.by_category.items():
                rows.setdefault(category, {})[f"{name}_AP"] = value
    return rows


def _inspect_batch(
    scenes: Sequence[Scene], pixels: UInt8[np.ndarray, "b H W 3"], measures: Measures
) -> list[EvaluatedImage]:
    found: list[list[Found]] = [[] for _ in scenes]
    has_masks = False
    if measures.detector is not None:
        has_masks = finds_masks(measures.detector)
        rows = run_detector(measures.detector, [scene.image_id for scene in scenes], pixels)
        found = [[Found.from_detection(item, has_masks) for item in row] for row in rows]
    images = []
    for scene, image, row in zip(scenes, pixels, found, strict=True):
        measured = []
        if measures.detector is not None:
            measured = measure_targets(scene.asked, row, measures.min_score, has_masks)
        scored = (None, ()) if measures.clip is None else _clip_scores(measures.clip, scene, image)
        images.append(EvaluatedImage(scene, row, measured, *scored))
    return images


def _settle_attributes(
    images: list[EvaluatedImage], clip: TextImageModel | None, folder: Path
) -> tuple[list[EvaluatedImage], list[str], list[str]]:
    """CLIP names the kinds of attributes that the detector does not. Without CLIP they are skipped, with a note."""
    kinds = sorted({kind for image in images for target in image.scene.asked for kind in target.attributes})
    unknown = unnamed_kinds(images, kinds) if any(image.found for image in images) else []
    if unknown and clip is not None:
        return name_attributes(images, clip, unknown, folder), kinds, []
    if unknown:
        known = [kind for kind in kinds if kind not in unknown]
        return images, known, [f"The detector names no {' and no '.join(unknown)}, which the split has; --clip would."]
    return images, kinds, []


def _detector_notes(images: Sequence[EvaluatedImage], split: Split, detector: Detector | Predictions) -> list[str]:
    notes = []
    names = sorted({found.category for image in images for found in image.found})
    if names and not set(names) & set(split.categories.values()):
        notes.append(f"The detector knows none of the split's categories; it found {', '.join(names[:3])} and so on.")
    if not finds_masks(detector):
        notes.append("The detector finds boxes only: no number is about masks.")
    return notes


def _clip_scores(clip: TextImageModel, scene: Scene, image: np.ndarray) -> tuple[float, tuple[float, ...]]:
    """Cosine of the image with its caption, and of each instance's box with the instance's caption."""
    crops = [image, *(crop_box(image, target.box) for target in scene.asked)]
    texts = [scene.caption, *(target.caption for target in scene.asked)]
    cosines = (clip.embed_images(crops) * clip.embed_texts(texts)).sum(axis=1)
    return float(cosines[0]), tuple(float(value) for value in cosines[1:])


def describe(features: Features, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b d"]:
    """The features of images in float64; InputError if their shape is wrong."""
    vectors = np.asarray(features(images), np.float64)
    if vectors.ndim != 2 or len(vectors) != len(images):
        raise InputError(f"--features: expected an array of shape [{len(images)}, d], got {list(vectors.shape)}")
    return vectors
