"""Detectors by name: the shapes' segmentation network, a file of predictions, a model of the transformers library."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8

from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.detect import Detection, Detector
from instdiff_jax.evaluation.split import Split
from instdiff_jax.files import read_json
from instdiff_jax.geometry.masks import decode_mask

NAMES = "shapes:FOLDER, predictions:FILE.json or transformers:NAME"


class Predictions:
    """Detections that some detector wrote to a file in COCO's results format.

    Attributes:
        has_masks: whether every prediction has a mask.
    """

    def __init__(self, path: str | Path, split: Split):
        """Reads and checks the file: `[{"image_id", "category_id", "score", "bbox": [x, y, w, h], "segmentation": RLE
        or polygons}]`, in pixels of the canvas, where the segmentation or the bbox may be left out.

        Raises:
            InputError: for a file or prediction that is not so, or of an image or category that the split lacks.
        """
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected a list of objects, as in COCO's results format")
        self._of_image: dict[int, list[tuple[str, dict]]] = {}
        self._names, self._size = split.categories, split.size
        for i, row in enumerate(rows):
            where = f"{path}: [{i}]"
            self._check(row, split, where)
            self._of_image.setdefault(row["image_id"], []).append((where, row))
        self.has_masks = all(row.get("segmentation") for row in rows)

    def _check(self, row: Mapping[str, Any], split: Split, where: str) -> None:
        for key, known in (("image_id", split.image_ids), ("category_id", split.categories)):
            if type(row.get(key)) is not int or row[key] not in known:
                raise InputError(f"{where}.{key}: expected an id of the split's annotations, got {short(row.get(key))}")
        if not _is_number(row.get("score")):
            raise InputError(f"{where}.score: expected a number, got {short(row.get('score'))}")
        box = row.get("bbox")
        if box is None and not row.get("segmentation"):
            raise InputError(f"{where}: expected a bbox or a segmentation")
        numbers = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        if box is not None and not (numbers and box[2] >= 0 and box[3] >= 0):
            raise InputError(f"{where}.bbox: expected [x, y, width, height] in pixels, got {short(box)}")

    def of_image(self, image_id: int) -> list[Detection]:
        """The detections of an image; InputError for a broken mask."""
        return [self._detection(row, where) for where, row in self._of_image.get(image_id, [])]

    def _detection(self, row: Mapping[str, Any], where: str) -> Detection:
        mask, size = np.zeros((self._size, self._size), bool), self._size
        if row.get("segmentation"):
            mask = decode_mask(row["segmentation"], size, size, f"{where}.segmentation")
        box = row.get("bbox") or box_around(mask)
        return Detection(self._names[row["category_id"]], float(row["score"]), tuple(map(float, box)), mask)


def box_around(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """The box x, y, width, height of a mask; zeros for an empty one."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return 0.0, 0.0, 0.0, 0.0
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] - columns[0] + 1),
        float(rows[-1] - rows[0] + 1),
    )


def open_detector(name: str, split: Split) -> Detector | Predictions:
    """The detector that a --detector flag names; InputError where there is none of that name."""
    kind, _, rest = name.partition(":")
    if not rest or kind not in ("shapes", "predictions", "transformers"):
        raise InputError(f"--detector: expected {NAMES}, got {name!r}")
    if kind == "predictions":
        return Predictions(rest, split)
    # Imported here: each brings in a library that the others do without.
    if kind == "shapes":
        from projects.shapes.segmenter import Segmenter

        return Segmenter.from_folder(rest)
    from instdiff_jax.evaluation.hub import HubDetector

    return HubDetector.from_name(rest)


def finds_masks(detector: Detector | Predictions) -> bool:
    """Whether a detector's masks mean anything; it says so by an attribute `has_masks`, True without one."""
    return bool(getattr(detector, "has_masks", True))


def detector_fingerprint(detector: Detector | Predictions | None) -> str | None:
    """Tells a detector from another by what it is, not by its name; a detector says so by an attribute `fingerprint`.

    Of predictions it says only what they hold: one detector writes another file for every folder of pictures.
    """
    if isinstance(detector, Predictions):
        return f"predictions of {'masks' if detector.has_masks else 'boxes'}"
    return getattr(detector, "fingerprint", None)


def run_detector(
    detector: Detector | Predictions, image_ids: Sequence[int], images: UInt8[np.ndarray, "b H W 3"]
) -> list[list[Detection]]:
    """The detections of some pictures."""
    if isinstance(detector, Predictions):
        return [detector.of_image(image_id) for image_id in image_ids]
    found = detector.detect(images)
    if len(found) != len(images):
        raise ValueError(f"expected detections of {len(images)} pictures, got {len(found)}")
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
