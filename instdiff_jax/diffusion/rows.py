"""Packs images into rows, and rows into batches of a few sizes.

A row is one latent being denoised: an image's global one, or one of its instances'. Images have different numbers of
instances, and each number of rows needs its own program. So batches are padded to a few sizes.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

EXACT_ROWS = 8  # per device; up to here a batch is never padded
WASTE = 1.2  # larger batches are padded to at most this factor

# Rows that run together. Before the merge: all rows, or global and instance rows separately. After it: one per image.
RowSet = Literal["all", "global", "instances", "image"]


class ImageRows(NamedTuple):
    """The rows of one image, as indices of unique conditions.

    Attributes:
        layout: of the global row.
        negative: of each row's unconditional entry.
        instances: one per instance row.
        boxes: x0, y0, x1, y1 in [0, 1] per instance row; only the crop merge reads them.
    """

    layout: int
    negative: int
    instances: tuple[int, ...] = ()
    boxes: Sequence[Sequence[float]] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch, padded to whole chunks. Each image's global row comes first.

    Attributes:
        image: the image whose noise and known region a row uses (padding: image 0).
        segment: the image that a row is merged into; padding has `num_images`, which the merge ignores.
        slot: 0 for a global row, i for an image's i-th instance, −1 for padding.
        boxes: the instance's box in [0, 1].
        conditions: indices of unique conditions: the conditional one and the negative one.
        num_images: images of the batch.
        count: rows without padding; they come first.
        chunk: rows per call of the compiled program.
    """

    image: Int[np.ndarray, "rows"]
    segment: Int[np.ndarray, "rows"]
    slot: Int[np.ndarray, "rows"]
    boxes: Float[np.ndarray, "rows 4"]
    conditions: Int[np.ndarray, "rows 2"]
    num_images: int
    count: int
    chunk: int

    def chunks(self) -> list[slice]:
        """The rows of each call of the compiled program."""
        return [slice(first, first + self.chunk) for first in range(0, len(self.image), self.chunk)]


def bucket_size(rows: int, devices: int = 1) -> int:
    """The padded number of rows: a multiple of the number of devices.

    Exact up to 8 rows per device. Above that the sizes per device are 10, 13, 16, 20, 25, 31, …, at most 20% padding.
    """
    each = -(-rows // devices)
    size = EXACT_ROWS
    while size < each:
        size = int(WASTE * (size + 1))
    return devices * (each if each <= EXACT_ROWS else size)


def pack_rows(
    images: Sequence[ImageRows], which: RowSet = "all", *, devices: int = 1, max_rows: int | None = None
) -> Rows:
    """Packs images into rows.

    Args:
        images: each with any number of instances; at least one row in total.
        which: the rows to pack; "global" and "image" are both an image's first row.
        devices: chunks are a multiple of this.
        max_rows: the most rows in a chunk (at least one per device); None for no limit.
    """
    rows = [row for number, image in enumerate(images) for row in _rows_of_image(number, image, which)]
    cap = len(rows) if max_rows is None else max(max_rows // devices, 1) * devices
    chunks = -(-len(rows) // cap)
    chunk = bucket_size(-(-len(rows) // chunks), devices)
    if max_rows is not None:
        chunk = min(chunk, cap)
    count = len(rows)
    rows += [(0, len(images), -1, *rows[0][3:])] * (-count % chunk)
    image, segment, slot, boxes, conditions = zip(*rows, strict=True)
    return Rows(
        image=np.array(image, np.int32),
        segment=np.array(segment, np.int32),
        slot=np.array(slot, np.int32),
        boxes=np.array(boxes, np.float32),
        conditions=np.array(conditions, np.int32),
        num_images=len(images),
        count=count,
        chunk=chunk,
    )


def _rows_of_image(number: int, image: ImageRows, which: RowSet) -> list[tuple]:
    """(image, segment, slot, box, conditions) of the image's rows in one set."""
    nowhere = (0.0, 0.0, 0.0, 0.0)
    rows = []
    if which != "instances":
        rows.append((number, number, 0, nowhere, (image.layout, image.negative)))
    if which in ("all", "instances"):
        boxes = list(image.boxes) or [nowhere] * len(image.instances)
        for slot, (condition, box) in enumerate(zip(image.instances, boxes, strict=True), start=1):
            rows.append((number, number, slot, box, (condition, image.negative)))
    return rows


def join_rows(sets: Sequence[Rows]) -> Rows:
    """Concatenates sets of rows of the same images, for the merge."""
    arrays = ("image", "segment", "slot", "boxes", "conditions")
    joined = {name: np.concatenate([getattr(rows, name) for rows in sets]) for name in arrays}
    return dataclasses.replace(sets[0], count=sum(rows.count for rows in sets), **joined)
