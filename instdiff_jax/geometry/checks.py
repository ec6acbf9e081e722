"""Checks of user input: numbers, boxes, points, scribbles and masks in pixels of a canvas.

Each returns the value in its plain type, or raises an InputError that starts with `where`, the file and field.
"""

import numbers
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.masks import RLE

MAX_SIDE = 8192
NORMALISED = "no number is over 1, as if boxes were fractions of the image; they are read as pixels"
MAX_SCRIBBLE_POINTS = 10_000
# Boxes are rounded to this fraction of a pixel: then x0 + (x1 - x0) is exact, and xywh files round-trip.
_BOX_GRID = 2.0**24


def describe(value: Any) -> str:
    """A value of the wrong type, for an error message."""
    return "nothing" if value is None else f"{type(value).__name__} {short(value)}"


def is_list(value: Any) -> bool:
    """Whether the value is a list, a tuple or an array with at least one axis."""
    return isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim > 0


def read_integer(value: Any, where: str, low: int, high: int, unit: str = "a whole number") -> int:
    """A whole number within limits; booleans are not numbers."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or not low <= value <= high:
        raise InputError(f"{where}: expected {unit} from {low} to {high}, got {short(value)}")
    return int(value)


def plain_integer(value: Any) -> int | None:
    """A whole number from 0 to 2^63 - 1, also one written as 1.0 or "1"; None for anything else."""
    if isinstance(value, str) and len(value) < 20 and value.isascii() and value.isdigit():
        value = int(value)
    elif type(value) is float and value.is_integer():
        value = int(value)
    return value if type(value) is int and 0 <= value < 2**63 else None


def read_flag(value: Any, where: str) -> bool:
    """A yes or no: true, false, 1, 0, also as text; nothing is no."""
    text = value.strip().lower() if isinstance(value, str) else value
    for meaning, spellings in ((False, (None, "", "0", "false", "no")), (True, ("1", "true", "yes"))):
        if text in spellings if isinstance(text, str | None) else isinstance(text, int | float) and text == meaning:
            return meaning
    raise InputError(f"{where}: expected true or false, or 1 or 0, got {short(value)}")


def are_normalised(boxes: Iterable[Any]) -> bool:
    """Whether boxes look like fractions of the image, not pixels: there are some, and no number is over 1."""
    some = False
    for box in boxes:
        if not is_list(box) or not len(box):
            continue
        if not all(isinstance(value, int | float) and 0 <= value <= 1 for value in box):
            return False
        some = some or any(0 < value < 1 for value in box)
    return some


def read_numbers(values: Any, count: int | None, where: str, expected: str) -> list[float]:
    """Finite floats from a list, tuple or array of numbers; booleans are not numbers."""
    if not is_list(values) or count is not None and len(values) != count:
        raise InputError(f"{where}: expected {expected}, got {short(values)}")
    for value in values:
        # The comparison also refuses NaN, infinities and integers too large for a float.
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not -1e9 <= value <= 1e9:
            raise InputError(f"{where}: expected {expected}, finite numbers, got {short(value)}")
    return [float(value) for value in values]


def read_text(value: Any, where: str, empty: bool = False) -> str:
    """Valid Unicode text; not blank unless `empty`."""
    if not isinstance(value, str):
        raise InputError(f"{where}: expected text, got {describe(value)}")
    if not empty and not value.strip():
        raise InputError(f"{where}: expected text that is not empty")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise InputError(f"{where}: expected valid Unicode, got half a surrogate pair")
    return value


def read_xywh(box: Any, where: str) -> tuple[float, float, float, float]:
    """A box [x, y, width, height] as files write it, on the canvas or off it; width and height may be 0."""
    x, y, w, h = read_numbers(box, 4, where, "[x, y, width, height]")
    if w < 0 or h < 0:
        raise InputError(f"{where}: expected [x, y, width, height] with no negative size, got {short(box)}")
    return x, y, w, h


def read_box(box: Any, width: int, height: int, where: str) -> tuple[float, float, float, float]:
    """A box x0, y0, x1, y1, clipped to the canvas, of which it must cover some area."""
    x0, y0, x1, y1 = read_numbers(box, 4, where, "[x0, y0, x1, y1]")
    if x1 < x0 or y1 < y0:
        raise InputError(f"{where}: expected x0 <= x1 and y0 <= y1, got {short(box)}")
    x0, y0, x1, y1 = (round(edge * _BOX_GRID) / _BOX_GRID for edge in (x0, y0, x1, y1))
    x0, x1 = (min(max(edge, 0.0), float(width)) for edge in (x0, x1))
    y0, y1 = (min(max(edge, 0.0), float(height)) for edge in (y0, y1))
    if x0 >= x1 or y0 >= y1:
        raise InputError(f"{where}: expected some area on the canvas of {width}x{height} pixels, got none")
    return x0, y0, x1, y1


def read_point(point: Any, width: int, height: int, where: str) -> tuple[float, float]:
    """A point x, y on the canvas."""
    x, y = read_numbers(point, 2, where, "[x, y]")
    _check_on_canvas([(x, y)], width, height, where)
    return x, y


def read_scribble(scribble: Any, width: int, height: int, where: str) -> Float[np.ndarray, "n 2"]:
    """2 to 10,000 points on the canvas, from pairs [[x, y], ...]."""
    if not is_list(scribble):
        raise InputError(f"{where}: expected a list of points, got {describe(scribble)}")
    if not 2 <= len(scribble) <= MAX_SCRIBBLE_POINTS:
        raise InputError(f"{where}: expected 2 to {MAX_SCRIBBLE_POINTS} points, got {len(scribble)}")
    pairs = [read_numbers(pair, 2, f"{where}[{k}]", "[x, y]") for k, pair in enumerate(scribble)]
    _check_on_canvas(pairs, width, height, where)
    return np.array(pairs, np.float64)


def pair_up(scribble: Any, where: str) -> Any:
    """A scribble as pairs where it is flat, [x1, y1, x2, y2, ...], as the official JSON has it."""
    if not isinstance(scribble, (list, tuple)) or not scribble or isinstance(scribble[0], (list, tuple)):
        return scribble
    flat = read_numbers(scribble, None, where, "[x1, y1, x2, y2, ...]")
    if len(flat) % 2:
        raise InputError(f"{where}: expected pairs of x and y, got {len(flat)} numbers")
    return [flat[k : k + 2] for k in range(0, len(flat), 2)]


def read_mask(mask: Any, width: int, height: int, where: str) -> RLE:
    """A mask of the canvas's size with at least one pixel, from an array of booleans (or of 0 and 1) or from an RLE."""
    if not isinstance(mask, RLE):
        if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biu":
            raise InputError(f"{where}: expected an array of booleans, got {describe(mask)}")
        if mask.dtype != bool and not ((mask == 0) | (mask == 1)).all():
            raise InputError(f"{where}: expected values 0 and 1")
    size = mask.size if isinstance(mask, RLE) else mask.shape
    if tuple(size) != (height, width):
        raise InputError(f"{where}: expected the canvas's shape [{height}, {width}], got {list(size)}")
    if not isinstance(mask, RLE):
        mask = RLE.from_mask(np.asarray(mask, bool))
    if not mask.area:
        raise InputError(f"{where}: expected at least one pixel, the mask is empty")
    return mask


def _check_on_canvas(points: Sequence[Sequence[float]], width: int, height: int, where: str) -> None:
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise InputError(f"{where}: expected points on the canvas of {width}x{height} pixels, got [{x:g}, {y:g}]")
