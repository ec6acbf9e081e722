"""Masks and points: decoding, 256 points of a mask, 20 points of a scribble. All in pixels, x before y.

What the released model was trained on fixes every rule here, odd ones included (paper section 3.2); the
parity data holds the official results.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from PIL import Image
from pycocotools import mask as coco_mask

from instdiff_jax.errors import InputError
from instdiff_jax.geometry.contours import trace_contours

INSIDE_POINTS = 128
BOUNDARY_POINTS = 128
SCRIBBLE_POINTS = 20

# A vertex further out than this many canvas sides is a mistake, and would cost the rasteriser unbounded memory.
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


def mask_points(mask: Bool[np.ndarray, "H W"], rng: np.random.Generator | None = None) -> Float[np.ndarray, "256 2"]:
    """128 points inside a mask and 128 on its boundary, ordered by distance to (0, 0).

    Args:
        mask: the mask.
        rng: draws the inside points of a mask with fewer than 128 pixels; by default the same every time.

    Returns:
        x, y in pixels. The boundary's coordinates are one too large, up to x1 + 1 and y1 + 1: the official code
        pads the mask by one before it traces contours and never takes that off again. Zeros for an empty mask.
    """
    box = box_from_mask(mask)
    if box is None:
        return np.zeros((INSIDE_POINTS + BOUNDARY_POINTS, 2), np.float32)
    x0, y0, x1, y1 = box.astype(int)
    crop = np.ascontiguousarray(mask[y0:y1, x0:x1])
    # Contours come in raster order of where they begin, so tracing the crop changes nothing but an offset.
    contours = [contour for contour in trace_contours(np.pad(crop, 1)) if len(contour) >= 3]
    boundary = np.concatenate(contours)[:, ::-1] + (x0, y0)
    boundary = boundary[np.linspace(0, len(boundary) - 1, BOUNDARY_POINTS).astype(int)]
    inside = _inside_points(crop, x0, y0, np.random.default_rng(0) if rng is None else rng)
    return order_by_origin(np.concatenate([inside, boundary])).astype(np.float32)


def sample_scribble(mask: Bool[np.ndarray, "H W"], rng: np.random.Generator) -> Float[np.ndarray, "20 2"]:
    """20 random pixels of a mask ordered by distance to (0, 0): what training takes for a scribble.

    Returns:
        x, y in pixels; zeros for an empty mask. A mask with fewer than 20 pixels repeats some.
    """
    box = box_from_mask(mask)
    if box is None:
        return np.zeros((SCRIBBLE_POINTS, 2), np.float32)
    x0, y0, x1, y1 = box.astype(int)
    pixels = np.flatnonzero(mask[y0:y1, x0:x1])
    chosen = pixels[rng.choice(len(pixels), SCRIBBLE_POINTS, replace=len(pixels) < SCRIBBLE_POINTS)]
    rows, columns = np.divmod(chosen, x1 - x0)
    return order_by_origin(np.stack([columns + x0, rows + y0], axis=1)).astype(np.float32)


def resample_scribble(
    points: Float[np.ndarray, "n 2"], count: int = SCRIBBLE_POINTS, size: tuple[float, float] = (1.0, 1.0)
) -> Float[np.ndarray, "count 2"]:
    """A scribble with any number of points as `count` of them, ordered by distance to (0, 0).

    Exactly `count` points are kept as they are, as the official code does; other numbers are replaced by points
    at equal arc length along the path. The order is that of the released command line.

    Args:
        points: x, y in pixels along the path; at least one.
        count: how many points to return.
        size: width and height of the canvas: the official order is by distance in fractions of the canvas.

    Returns:
        x, y in pixels.
    """
    points = np.asarray(points, np.float64)
    if len(points) != count:
        steps = np.sqrt((np.diff(points, axis=0) ** 2).sum(axis=1))
        length = np.concatenate([[0.0], np.cumsum(steps)])
        at = np.linspace(0.0, length[-1], count)
        points = np.stack([np.interp(at, length, points[:, axis]) for axis in (0, 1)], axis=1)
    order = np.argsort(_norm(points / size), kind="stable")
    return points[order]


def resize_map(mask: Bool[np.ndarray, "H W"], size: int) -> Bool[np.ndarray, "size size"]:
    """A mask as a square map by nearest neighbour, the whole canvas squeezed into it as in official evaluation."""
    if mask.shape == (size, size):
        return mask.astype(bool)
    image = Image.fromarray(mask.astype(np.uint8)).resize((size, size), Image.Resampling.NEAREST)
    return np.asarray(image, bool)


def normalize_points(points: Float[np.ndarray, "n 2"], width: float, height: float) -> Float[np.ndarray, "n 2"]:
    """Pixels as fractions of the canvas, at most 1: the offset of boundary points can reach beyond the edge."""
    return np.minimum(np.asarray(points, np.float64) / (width, height), 1.0).astype(np.float32)


def order_by_origin(points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
    """Points in order of their distance to (0, 0); equally distant ones stay in the order they came."""
    return points[np.argsort(_norm(np.asarray(points, np.float64)), kind="stable")]


def short(value: Any) -> str:
    """A value for an error message: one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def _norm(vectors: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    # Not hypot, which rounds otherwise: distances that tie in the official code would no longer tie.
    return np.sqrt(vectors[:, 0] ** 2 + vectors[:, 1] ** 2)


def _inside_points(
    mask: Bool[np.ndarray, "h w"], x0: int, y0: int, rng: np.random.Generator
) -> Int[np.ndarray, "128 2"]:
    """Pixels (x, y) at 128 even ranks of their distance to the centroid; the crop's corner lies at (x0, y0)."""
    pixels = np.flatnonzero(mask)
    n = len(pixels)
    if n < INSIDE_POINTS:
        chosen = pixels[rng.integers(0, n, INSIDE_POINTS)]
    else:
        segment = n // INSIDE_POINTS
        ranks = np.arange(INSIDE_POINTS) * segment + segment // 2
        # Coordinates of the whole canvas, not of the crop: which distances tie depends on the centroid's rounding.
        rows, columns = np.arange(y0, y0 + mask.shape[0]), np.arange(x0, x0 + mask.shape[1])
        dy = rows - (mask.sum(axis=1) * rows).sum() / n
        dx = columns - (mask.sum(axis=0) * columns).sum() / n
        distance = np.sqrt((dy * dy)[:, None] + dx * dx).ravel()[pixels]
        chosen = pixels[_at_ranks(distance, ranks)]
    rows, columns = np.divmod(chosen, mask.shape[1])
    return np.stack([columns + x0, rows + y0], axis=1)


def _at_ranks(values: Float[np.ndarray, " n"], ranks: Int[np.ndarray, " k"]) -> Int[np.ndarray, " k"]:
    """`argsort(values, kind="stable")[ranks]` for values >= 0, sorting only the buckets that hold those ranks."""
    buckets = 16 * len(ranks)
    bucket = (values * ((buckets - 1) / max(values.max(), 1e-9))).astype(np.int32)
    counts = np.bincount(bucket, minlength=buckets)
    holder = np.searchsorted(np.cumsum(counts), ranks, side="right")
    needed = np.zeros(buckets, bool)
    needed[holder] = True
    candidates = np.flatnonzero(needed[bucket])
    candidates = candidates[np.argsort(values[candidates], kind="stable")]
    skipped = np.cumsum(np.where(needed, 0, counts))[holder]
    return candidates[ranks - skipped]


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
