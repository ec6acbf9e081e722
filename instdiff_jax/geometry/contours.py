"""Contours of a binary mask at level 0, equal to skimage.measure.find_contours and many times faster.

Training needs the boundary points of about seven masks per image; skimage's assembly of segments in Python
dictionaries would take longer than all other work on the image.
"""

from collections import deque

import numpy as np
from jaxtyping import Bool, Int

# Marching squares. A square of pixels (upper left, upper right, lower left, lower right as bits 1, 2, 4, 8) is crossed
# on its edges: top, bottom, left, right = 0, 1, 2, 3. Rows: the (from, to) edges of up to two segments, ones of the
# mask being connected by edges only; -1 stands for no segment.
_TOP, _BOTTOM, _LEFT, _RIGHT, _NONE = 0, 1, 2, 3, -1
_SEGMENTS = np.array(
    [
        (_NONE, _NONE, _NONE, _NONE),
        (_TOP, _LEFT, _NONE, _NONE),
        (_RIGHT, _TOP, _NONE, _NONE),
        (_RIGHT, _LEFT, _NONE, _NONE),
        (_LEFT, _BOTTOM, _NONE, _NONE),
        (_TOP, _BOTTOM, _NONE, _NONE),
        (_RIGHT, _TOP, _LEFT, _BOTTOM),
        (_RIGHT, _BOTTOM, _NONE, _NONE),
        (_BOTTOM, _RIGHT, _NONE, _NONE),
        (_TOP, _LEFT, _BOTTOM, _RIGHT),
        (_BOTTOM, _TOP, _NONE, _NONE),
        (_BOTTOM, _LEFT, _NONE, _NONE),
        (_LEFT, _RIGHT, _NONE, _NONE),
        (_TOP, _RIGHT, _NONE, _NONE),
        (_LEFT, _TOP, _NONE, _NONE),
        (_NONE, _NONE, _NONE, _NONE),
    ],
    np.int8,
)
# The two pixels of each edge as bits of the square.
_EDGE_PIXELS = np.array([(0, 1), (2, 3), (0, 2), (1, 3)])


def _zero_pixels() -> Int[np.ndarray, "16 4"]:
    """For every square and edge: which of its four pixels is the edge's pixel of value 0."""
    case = np.arange(16)[:, None]
    first, second = _EDGE_PIXELS[:, 0], _EDGE_PIXELS[:, 1]
    return np.where((case >> first) & 1, second, first)


_ZERO_PIXEL = _zero_pixels()


def trace_contours(mask: Bool[np.ndarray, "H W"]) -> list[Int[np.ndarray, "n 2"]]:
    """The contours of a mask whose outermost pixels are all 0.

    At level 0 linear interpolation puts every crossing of an edge exactly on its pixel of value 0, so a point is a
    pixel. Where each is passed once, segments chain into loops; a loop ends with its last segment in raster
    order, and loops are in the order of their first. Where a pixel is passed twice (in a gap one pixel wide) the
    outcome depends on the order in which segments are joined, and they are joined one by one.

    Returns:
        Row, column of the points of each contour; the first point of a closed one is repeated at the end.
    """
    ones = mask.view(np.uint8)
    case = ones[:-1, :-1] + 2 * ones[:-1, 1:] + 4 * ones[1:, :-1] + 8 * ones[1:, 1:]
    width = mask.shape[1]
    rows, columns = np.nonzero((case > 0) & (case < 15))
    case = case[rows, columns]
    origin = rows * width + columns
    segments = _SEGMENTS[case]
    offsets = np.array([0, 1, width, width + 1])
    ends = origin[:, None] + offsets[_ZERO_PIXEL[case[:, None], segments]]
    ends = ends.reshape(-1, 2)
    # A segment whose two crossings fall on one pixel has no length and is left out.
    ends = ends[(segments.reshape(-1, 2)[:, 0] != _NONE) & (ends[:, 0] != ends[:, 1])]
    start, stop = ends[:, 0], ends[:, 1]
    by_start = np.argsort(start)
    ordered = start[by_start]
    if (ordered[1:] == ordered[:-1]).any() or not np.array_equal(ordered, np.sort(stop)):
        contours = [np.array(chain) for chain in _join(start.tolist(), stop.tolist())]
    else:
        contours = [stop[loop] for loop in _loops(by_start[np.searchsorted(ordered, stop)].tolist())]
    return [np.stack(np.divmod(contour, width), axis=1) for contour in contours]


def _loops(following: list[int]) -> list[list[int]]:
    """The cycles of a permutation of segments, each from its highest segment round to it again, by their lowest."""
    seen = [False] * len(following)
    loops = []
    for first in range(len(following)):
        if seen[first]:
            continue
        loop, segment = [], first
        while not seen[segment]:
            seen[segment] = True
            loop.append(segment)
            segment = following[segment]
        turn = loop.index(max(loop))
        loops.append(loop[turn:] + loop[: turn + 1])
    return loops


def _join(start: list[int], stop: list[int]) -> list[deque[int]]:
    """Chains of points, grown segment by segment; by their oldest segment.

    A point remembers only the chain that came to begin or end there last. So where a pixel is passed twice a chain may
    stay open or lose its partner: this reproduces skimage's outcome, which the released model was trained on.
    """
    chains: dict[int, deque[int]] = {}
    begins: dict[int, tuple[deque[int], int]] = {}
    finishes: dict[int, tuple[deque[int], int]] = {}
    for number, (first, last) in enumerate(zip(start, stop, strict=True)):
        after, before = begins.pop(last, None), finishes.pop(first, None)
        if before is None and after is None:
            chain = chains[number] = deque((first, last))
            begins[first] = finishes[last] = (chain, number)
        elif after is None:
            before[0].append(last)
            finishes[last] = before
        elif before is None:
            after[0].appendleft(first)
            begins[first] = after
        elif before[0] is after[0]:
            before[0].append(last)
        else:
            # The older chain takes up the younger one.
            if before[1] < after[1]:
                kept, gone = before, after
                kept[0].extend(gone[0])
            else:
                kept, gone = after, before
                kept[0].extendleft(reversed(gone[0]))
                begins.pop(gone[0][0], None)
            chains.pop(gone[1], None)
            begins[kept[0][0]] = finishes[kept[0][-1]] = kept
    return [chain for _, chain in sorted(chains.items())]
