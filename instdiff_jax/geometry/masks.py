"""Masks: decoding and encoding COCO's formats, the box around a mask, and maps."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from pycocotools import mask as coco_mask

from instdiff_jax.errors import InputError, short

# A vertex further out than this many canvas sides is an error; the rasterizer would need unbounded memory for it.
_POLYGON_MARGIN = 4


class RLE(NamedTuple):
    """A mask as COCO's compressed run lengths: a few hundred bytes.

    Attributes:
        size: height and width in pixels.
        counts: the run lengths, compressed as in COCO's files.
    """

    size: tuple[int, int]
    counts: str

    @classmethod
    def from_mask(cls, mask: Bool[np.ndarray, "H W"]) -> Self:
        """Encodes a mask."""
        return cls._of(coco_mask.encode(np.asfortranarray(mask, np.uint8)))

    @classmethod
    def from_coco(cls, mask: Any, height: int, width: int, where: str) -> Self:
        """Reads any of COCO's formats without decoding pixels; see `decode_mask` for the arguments."""
        if isinstance(mask, Mapping):
            runs = _read_runs(mask, height, width, where)
            if (runs[1:] == 0).any():  # no encoder writes empty runs; equal masks must have equal counts
                return cls.from_mask(_fill_runs(runs, height, width).astype(bool))
            return cls._of(coco_mask.frPyObjects({"size": [height, width], "counts": runs.tolist()}, height, width))
        return cls._of(_merge_polygons(mask, height, width, where))

    @classmethod
    def _of(cls, rle: Any) -> Self:
        height, width = rle["size"]
        return cls((int(height), int(width)), rle["counts"].decode("ascii"))

    @property
    def area(self) -> int:
        """The number of pixels."""
        return int(coco_mask.area({"size": list(self.size), "counts": self.counts.encode()}))

    def decode(self) -> Bool[np.ndarray, "H W"]:
        """The mask, read-only. The last 32 masks are cached, enough for one layout."""
        return _decode(self)

    def runs(self) -> list[int]:
        """The run lengths, column by column, of pixels outside and inside in turn."""
        return _unpack_counts(self.counts, "mask").tolist()

    def to_dict(self) -> dict[str, Any]:
        """The mask for a JSON file: `{"size": [h, w], "counts": str}`."""
        return {"size": list(self.size), "counts": self.counts}


@functools.lru_cache(maxsize=32)
def _decode(rle: RLE) -> Bool[np.ndarray, "H W"]:
    mask = decode_mask(rle.to_dict(), *rle.size, "mask")
    mask.flags.writeable = False
    return mask


class CompactMask:
    """A dataclass field for a mask: an RLE is stored as it is and decoded when it is read."""

    def __get__(self, instance: object, owner: type) -> Bool[np.ndarray, "H W"] | None:
        if instance is None:
            return None  # the field's default
        mask = vars(instance)["mask"]
        return mask.decode() if isinstance(mask, RLE) else mask

    def __set__(self, instance: object, mask: Bool[np.ndarray, "H W"] | RLE | None) -> None:
        vars(instance)["mask"] = mask


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
        return _fill_runs(_read_runs(mask, height, width, where), height, width)
    return coco_mask.decode(_merge_polygons(mask, height, width, where)).astype(bool)


def encode_mask(mask: Bool[np.ndarray, "H W"]) -> dict[str, Any]:
    """A mask as compressed RLE, ready for JSON: `{"size": [h, w], "counts": str}`."""
    return RLE.from_mask(mask).to_dict()


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


def _read_runs(rle: Mapping, height: int, width: int, where: str) -> Int[np.ndarray, " runs"]:
    """Checked run lengths, read by our own code: pycocotools writes past its buffer where runs exceed the size."""
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
    return runs


def _fill_runs(runs: Int[np.ndarray, " runs"], height: int, width: int) -> Bool[np.ndarray, "H W"]:
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


def _merge_polygons(polygons: Any, height: int, width: int, where: str) -> Any:
    """The RLE of polygons, as pycocotools has it."""
    if not isinstance(polygons, (list, tuple)):
        raise InputError(f"{where}: expected an RLE object or a list of polygons, got {type(polygons).__name__}")
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
    return coco_mask.merge(rles)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
