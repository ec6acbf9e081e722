"""Masks: decoding and encoding COCO's formats, the box around a mask, and maps."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from pycocotools import mask as coco_mask

from instdiff_jax.errors import InputError, short

# A vertex further out than this many canvas sides is an error; the rasterizer would need unbounded memory for it.
_POLYGON_MARGIN = 4


def decode_mask(mask: Any, height: int, width: int, where: str) -> Bool[np.ndarray, "H W"]:
    """Decodes a COCO mask.

    Args:
        mask: compressed RLE (`{"size": [h, w], "counts": str}`), uncompressed RLE (counts is a list of run
            lengths), or polygons (a list of flat `[x1, y1, x2, y2, ...]` lists in pixels).
        height: height of the canvas in pixels, which the mask must have too.
        width: width of the canvas in pixels.
        where: file and field, for error messages.

    Raises:
        InputError: for anything that is not one of the three, or a mask of another size.
    """
    if isinstance(mask, Mapping):
        return _decode_rle(mask, height, width, where)
    if isinstance(mask, (list, tuple)):
        return _decode_polygons(mask, height, width, where)
    raise InputError(f"{where}: expected an RLE object or a list of polygons, got {type(mask).__name__}")


def encode_mask(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """A mask as compressed RLE, ready for JSON: `{"size": [h, w], "counts": str}`."""
    rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    return {"size": [int(side) for side in rle["size"]], "counts": rle["counts"].decode("ascii")}


def box_from_mask(mask: Bool[np.ndarray, "H W"]) -> Float[np.ndarray, " 4"] | None:
    """The tightest box (x0, y0, x1, y1) around a mask, edges of pixels; None for an empty mask."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return None
    return np.array([columns[0], rows[0], columns[-1] + 1, rows[-1] + 1], np.float64)


def resize_map(mask: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "size size"]:
    """A mask as a square map by nearest neighbour, the whole canvas squeezed into it as in official evaluation."""
    if mask.shape == (size, size):
        return mask.astype(bool)
    image = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(image, bool)


def _decode_rle(rle: Mapping, height: int, width: int, where: str) -> Bool[np.ndarray, "H W"]:
    """Decodes run lengths with our own code: pycocotools writes past its buffer where runs exceed the size."""
    counts, size = rle.get("counts"), rle.get("size")
    if "counts" not in rle or "size" not in rle:
        raise InputError(f"{where}: expected RLE with the keys size and counts, got {short(list(rle))}")
    if not isinstance(size, (list, tuple)) or len(size) != 2 or any(type(side) is not int for side in size):
        raise InputError(f"{where}.size: expected [height, width], got {short(size)}")
    if tuple(size) != (height, width):
        raise InputError(f"{where}.size: expected the canvas' [{height}, {width}] (height, width), got {short(size)}")
    if isinstance(counts, (str, bytes)):
        runs = _unpack_counts(counts, where)
    elif isinstance(counts, (list, tuple)):
        if any(type(run) is not int or not 0 <= run <= height * width for run in counts):
            raise InputError(f"{where}.counts: expected run lengths from 0 to {height * width}")
        runs = np.array(counts, np.int64)
    else:
        raise InputError(f"{where}.counts: expected a string or a list of run lengths, got {type(counts).__name__}")
    if (runs < 0).any() or (runs > height * width).any() or runs.sum() != height * width:
        raise InputError(f"{where}.counts: broken RLE, expected runs that sum to {height * width} pixels")
    return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T


def _unpack_counts(counts: str | bytes, where: str) -> Int[np.ndarray, " runs"]:
    """COCO's compressed run lengths: 5 bits a character, low ones first, each run from the third as a difference."""
    raw = counts.encode("utf-8", "surrogatepass") if isinstance(counts, str) else counts
    codes = np.frombuffer(raw, np.uint8).astype(np.int64) - 48
    last = (codes & 0x20) == 0
    if (codes < 0).any() or (codes > 63).any() or not len(codes) or not last[-1]:
        raise InputError(f"{where}.counts: broken compressed RLE")
    ends = np.flatnonzero(last)
    starts = np.concatenate([[0], ends[:-1] + 1])
    shift = 5 * (np.arange(len(codes)) - np.repeat(starts, ends - starts + 1))
    if shift.max() > 35:
        raise InputError(f"{where}.counts: broken compressed RLE")
    values = np.add.reduceat((codes & 0x1F) << shift, starts)
    values -= np.where(codes[ends] & 0x10, np.int64(1) << (shift[ends] + 5), 0)
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return values


def _decode_polygons(polygons: list, height: int, width: int, where: str) -> Bool[np.ndarray, "H W"]:
    if polygons and all(_is_number(value) for value in polygons):
        polygons = [polygons]
    if not polygons:
        raise InputError(f"{where}: expected at least one polygon")
    for i, polygon in enumerate(polygons):
        field = f"{where}[{i}]"
        if not isinstance(polygon, (list, tuple)) or not all(_is_number(value) for value in polygon):
            raise InputError(f"{field}: expected a polygon as numbers [x1, y1, x2, y2, ...]")
        if len(polygon) < 6 or len(polygon) % 2:
            raise InputError(f"{field}: expected a polygon of at least 3 points, got {len(polygon)} numbers")
        reach = _POLYGON_MARGIN * max(height, width)
        # Written so that NaN and infinities fail too.
        if not all(-reach <= value <= reach for value in polygon):
            raise InputError(f"{field}: expected coordinates on the canvas of {width}x{height} pixels")
    rles = coco_mask.frPyObjects([[float(value) for value in polygon] for polygon in polygons], height, width)
    return coco_mask.decode(coco_mask.merge(rles)).astype(bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
