"""Points of masks and scribbles: 256 of a mask, 20 of a scribble. All in pixels, x before y.

The released model's training data fixes every rule here (paper, "Location parameterization"); the parity data holds
the official results.
"""

import numpy as np
from jaxtyping import Bool, Float, Int, Real

from instdiff_jax.geometry.contours import trace_contours
from instdiff_jax.geometry.masks import box_from_mask

INSIDE_POINTS = 128
BOUNDARY_POINTS = 128
MASK_POINTS = INSIDE_POINTS + BOUNDARY_POINTS
SCRIBBLE_POINTS = 20


def mask_points(mask: Bool[np.ndarray, "H W"], rng: np.random.Generator | None = None) -> Float[np.ndarray, "256 2"]:
    """128 points inside a mask and 128 on its boundary, ordered by distance to (0, 0).

    Args:
        mask: the mask.
        rng: draws the inside points of a mask with fewer than 128 pixels; by default the same every time.

    Returns:
        x, y in pixels. The boundary's coordinates are one too large, up to x1 + 1 and y1 + 1: the official code
        pads the mask by one before tracing and does not subtract it. Zeros for an empty mask.
    """
    box = box_from_mask(mask)
    if box is None:
        return np.zeros((MASK_POINTS, 2), np.float32)
    x0, y0, x1, y1 = box.astype(int)
    crop = np.ascontiguousarray(mask[y0:y1, x0:x1])
    # Contours are in raster order of their first point, so tracing the crop only changes the offset.
    contours = [contour for contour in trace_contours(np.pad(crop, 1)) if len(contour) >= 3]
    boundary = np.concatenate(contours)[:, ::-1] + (x0, y0)
    boundary = boundary[np.linspace(0, len(boundary) - 1, BOUNDARY_POINTS).astype(int)]
    inside = _inside_points(crop, x0, y0, np.random.default_rng(0) if rng is None else rng)
    return order_by_origin(np.concatenate([inside, boundary])).astype(np.float32)


def sample_scribble(mask: Bool[np.ndarray, "H W"], rng: np.random.Generator) -> Float[np.ndarray, "20 2"]:
    """20 random pixels of a mask ordered by distance to (0, 0): the scribbles of training.

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
    points: Real[np.ndarray, "n 2"], count: int = SCRIBBLE_POINTS, size: tuple[float, float] = (1.0, 1.0)
) -> Float[np.ndarray, "count 2"]:
    """Resamples a scribble to `count` points, ordered by distance to (0, 0).

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


def normalize_points(points: Real[np.ndarray, "n 2"], width: float, height: float) -> Float[np.ndarray, "n 2"]:
    """Pixels as fractions of the canvas, at most 1: boundary points may lie beyond the edge."""
    return np.minimum(np.asarray(points, np.float64) / (width, height), 1.0).astype(np.float32)


def order_by_origin(points: Real[np.ndarray, "n 2"]) -> Real[np.ndarray, "n 2"]:
    """Points in order of their distance to (0, 0); a stable sort."""
    return points[np.argsort(_norm(np.asarray(points, np.float64)), kind="stable")]


def _norm(vectors: Real[np.ndarray, "n 2"]) -> Float[np.ndarray, " n"]:
    # Not hypot, which rounds differently: ties of the official code would no longer be ties.
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
