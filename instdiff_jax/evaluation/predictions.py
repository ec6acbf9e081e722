"""Detections from a file in COCO's results format, written by any detector."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.detect import Detection, xywh_of_mask
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import plain_integer
from instdiff_jax.geometry.masks import RLE


class Annotated(Protocol):
    """What predictions refer to: categories by id, ids of images, and the side of the canvas in pixels."""

    @property
    def categories(self) -> Mapping[int, str]: ...

    @property
    def image_ids(self) -> Collection[int]: ...

    @property
    def size(self) -> int: ...


class Predictions:
    """Detections of some images, by image id.

    Attributes:
        has_masks: whether every prediction has a mask.
    """

    def __init__(self, path: str | Path, split: Annotated):
        """Reads and checks a file.

        Args:
            path: JSON `[{"image_id", "category_id", "score", "bbox": [x, y, w, h], "segmentation": RLE or polygons}]`
                in pixels of the canvas; either the segmentation or the bbox may be missing.
            split: its image and category ids are the valid ones.

        Raises:
            InputError: if the file is not of this format, an id is unknown, or a mask is broken.
        """
        rows = read_json(path)
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise InputError(f"{path}: expected a list of objects, as in COCO's results format")
        self._of_image: dict[int, list[tuple[dict, RLE | None]]] = {}
        self._names, self._size = split.categories, split.size
        for i, row in enumerate(rows):
            where = f"{path}: [{i}]"
            self._check(row, split, where)
            mask = row.get("segmentation")
            # Read now: a broken one should be found before hours of generating images.
            rle = RLE.from_coco(mask, split.size, split.size, f"{where}.segmentation") if mask else None
            self._of_image.setdefault(plain_integer(row["image_id"]), []).append((row, rle))
        self.has_masks = all(row.get("segmentation") for row in rows)

    def _check(self, row: Mapping[str, Any], split: Annotated, where: str) -> None:
        for key, known in (("image_id", split.image_ids), ("category_id", split.categories)):
            if plain_integer(row.get(key)) not in known:
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
        """The detections in an image."""
        return [self._detection(row, rle) for row, rle in self._of_image.get(image_id, [])]

    def _detection(self, row: Mapping[str, Any], rle: RLE | None) -> Detection:
        mask = np.zeros((self._size, self._size), bool) if rle is None else rle.decode()
        box = row.get("bbox") or xywh_of_mask(mask)
        return Detection(
            self._names[plain_integer(row["category_id"])], float(row["score"]), tuple(map(float, box)), mask
        )


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e9 <= value <= 1e9
