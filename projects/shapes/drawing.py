"""Draws shapes and backgrounds: outlines, textures and colours.

Edges are antialiased with 4x4 samples per pixel. Blending uses integers, so that a scene is the same bytes on every
machine.

Axes: h, w rows and columns of a stamp (the smallest window around a shape), S the 4 samples per pixel along an axis.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

# The paper's eight colours (section 4, attribute binding), each with the tone of its stripes, dots and checks.
# The tone is a shade of the same colour: stripes of another colour would make the attribute ambiguous.
COLOURS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "black": ((22, 22, 24), (92, 92, 96)),
    "white": ((246, 246, 246), (186, 186, 190)),
    "red": ((216, 36, 36), (122, 12, 18)),
    "green": ((44, 164, 60), (16, 88, 30)),
    "yellow": ((250, 212, 36), (190, 138, 8)),
    "blue": ((44, 88, 222), (14, 36, 122)),
    "pink": ((252, 144, 192), (204, 82, 142)),
    "purple": ((134, 48, 180), (72, 16, 106)),
}
TEXTURES = ("plain", "striped", "dotted", "checkered")
# Muted tones, from which each of the eight colours stands out.
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "grey": (148, 148, 148),
    "beige": (200, 184, 152),
    "brown": (128, 100, 80),
    "teal": (86, 136, 138),
    "olive": (128, 130, 88),
    "slate": (100, 114, 138),
}
BACKGROUND_KINDS = ("plain", "gradient", "glow", "cloudy")

_S = 4
_JITTER = 10

Plane = Float[np.ndarray, "hS wS"]
Inside = Bool[np.ndarray, "hS wS"]


def _circle(u: Plane, v: Plane) -> Inside:
    return u * u + v * v <= 1


def _square(u: Plane, v: Plane) -> Inside:
    return np.maximum(np.abs(u), np.abs(v)) <= 0.88


def _triangle(u: Plane, v: Plane) -> Inside:
    return (v <= 0.8) & (np.abs(u) * 1.7 <= v + 0.9)


def _diamond(u: Plane, v: Plane) -> Inside:
    return np.abs(u) / 0.66 + np.abs(v) <= 1


def _hexagon(u: Plane, v: Plane) -> Inside:
    x, y = np.abs(u), np.abs(v)
    return (y <= 0.866) & (0.866 * x + 0.5 * y <= 0.866)


def _cross(u: Plane, v: Plane) -> Inside:
    x, y = np.abs(u), np.abs(v)
    return (np.minimum(x, y) <= 0.32) & (np.maximum(x, y) <= 0.96)


def _ring(u: Plane, v: Plane) -> Inside:
    r = u * u + v * v
    return (r <= 1) & (r >= 0.52 * 0.52)


def _crescent(u: Plane, v: Plane) -> Inside:
    return (u * u + v * v <= 1) & ((u - 0.48) ** 2 + v * v >= 0.78 * 0.78)


def _heart(u: Plane, v: Plane) -> Inside:
    x, y = np.abs(u) * 1.14, 0.13 - v * 1.12
    t = x * x + y * y - 1
    return t * t * t <= x * x * (y * y * y)


def _star(u: Plane, v: Plane) -> Inside:
    # Two reflections fold the five arms onto the upward one; its edge runs from the tip to the inner corner.
    x, y = np.abs(u), -v
    for nx in (0.809017, -0.809017):
        reach = 2 * np.maximum(nx * x - 0.587785 * y, 0)
        x, y = x - reach * nx, y + reach * 0.587785
    inner_x, inner_y = 0.46 * 0.587785, 0.46 * 0.809017
    return np.abs(x) * (1 - inner_y) <= inner_x * (1 - y)


# Each takes coordinates in the shape's frame: -1 to 1 from edge to edge, v downwards.
OUTLINES: dict[str, Callable[[Plane, Plane], Inside]] = {
    "circle": _circle,
    "square": _square,
    "triangle": _triangle,
    "star": _star,
    "heart": _heart,
    "ring": _ring,
    "cross": _cross,
    "hexagon": _hexagon,
    "crescent": _crescent,
    "diamond": _diamond,
}
SHAPES = tuple(OUTLINES)


def _arrow(u: Plane, v: Plane) -> Inside:
    shaft = (u >= -0.96) & (u <= 0.1) & (np.abs(v) <= 0.3)
    return shaft | (u >= 0) & (u <= 0.96) & (np.abs(v) <= 0.96 - u)


# What no scene has: `arrows.py` teaches it to the small model.
NEW_OUTLINES: dict[str, Callable[[Plane, Plane], Inside]] = {"arrow": _arrow}
# The furthest an outline reaches from its centre, in half sides.
_REACH = 1.3


class Stamp(NamedTuple):
    """A shape in the smallest window around it.

    Attributes:
        cover: how many of a pixel's 16 samples the shape covers.
        tone: how many of those have the tone of its texture.
    """

    cover: UInt8[np.ndarray, "h w"]
    tone: UInt8[np.ndarray, "h w"]

    @property
    def mask(self) -> Bool[np.ndarray, "h w"]:
        """Pixels of which the shape covers at least half."""
        return self.cover >= _S * _S // 2


def make_stamp(
    shape: str,
    texture: str,
    side: float,
    turn: float,
    stretch: float,
    period: float,
    offset: tuple[float, float],
) -> Stamp:
    """Draws one shape.

    Args:
        shape: a name in `OUTLINES` or `NEW_OUTLINES`.
        texture: one of `TEXTURES`.
        side: from edge to edge in pixels, before rotation.
        turn: rotation in degrees, clockwise.
        stretch: width / height; the area stays the same.
        period: of the texture, in pixels.
        offset: subpixel position (x, y) of the centre, from 0 to 1.
    """
    half = math.ceil(_REACH * side / 2 * math.sqrt(max(stretch, 1 / stretch))) + 1
    points = (np.arange(2 * half * _S, dtype=np.float32) + np.float32(0.5)) / np.float32(_S) - np.float32(half)
    x, y = points - np.float32(offset[0]), (points - np.float32(offset[1]))[:, None]
    cos, sin = math.cos(math.radians(turn)), math.sin(math.radians(turn))
    wide, high = side / 2 * math.sqrt(stretch), side / 2 / math.sqrt(stretch)
    u = x * np.float32(cos / wide) + y * np.float32(sin / wide)
    v = x * np.float32(-sin / high) + y * np.float32(cos / high)
    inside = (OUTLINES | NEW_OUTLINES)[shape](u, v)
    cover = _count(inside)
    rows, columns = np.flatnonzero(cover.any(axis=1)), np.flatnonzero(cover.any(axis=0))
    window = np.s_[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    if texture == "plain":
        return Stamp(cover[window], np.zeros_like(cover[window]))
    tone = _count(inside & _pattern(texture, u * np.float32(wide / period), v * np.float32(high / period)))
    return Stamp(cover[window], tone[window])


def paint(
    image: UInt8[np.ndarray, "H W 3"], stamp: Stamp, corner: tuple[int, int], colour: str, shift: Int[np.ndarray, "3"]
) -> None:
    """Paints a stamp over an image, in place.

    Args:
        image: the canvas.
        stamp: what to paint.
        corner: (x, y) of the stamp's top left corner in pixels.
        colour: a name in `COLOURS`.
        shift: added to the colour's red, green and blue.
    """
    base, tone = (np.clip(np.array(rgb) + shift, 0, 255).astype(np.int32) for rgb in COLOURS[colour])
    height, width = stamp.cover.shape
    window = image[corner[1] : corner[1] + height, corner[0] : corner[0] + width]
    cover, dark = (plane.astype(np.int32)[..., None] for plane in stamp)
    total = _S * _S
    window[:] = (window * (total - cover) + base * (cover - dark) + tone * dark + total // 2) // total


def draw_background(
    kind: str, names: tuple[str, str], size: int, rng: np.random.Generator
) -> UInt8[np.ndarray, "size size 3"]:
    """Draws a background: the first colour alone (plain), or fading into the second (gradient, glow, cloudy)."""
    first, second = (np.array(BACKGROUNDS[name]) + rng.integers(-_JITTER, _JITTER + 1, 3) for name in names)
    if kind == "plain":
        return np.broadcast_to(first.astype(np.uint8), (size, size, 3)).copy()
    step = np.arange(size, dtype=np.float32) / np.float32(size - 1)
    x, y = step, step[:, None]
    if kind == "gradient":
        dx, dy = [(1, 0), (0, 1), (0.5, 0.5), (-0.5, 0.5)][rng.integers(4)]
        share = np.float32(dx) * x + np.float32(dy) * y + np.float32(0.5 if dx < 0 else 0)
    elif kind == "glow":
        cx, cy = np.float32(rng.uniform(0.3, 0.7, 2))
        share = np.minimum(((x - cx) ** 2 + (y - cy) ** 2) * np.float32(2), np.float32(1))
    else:
        share = _clouds(size, rng)
    # Weights in 1/256, so that the blend is exact.
    weight = (share * np.float32(256)).astype(np.int32)[..., None]
    return ((first * (256 - weight) + second * weight + 128) // 256).astype(np.uint8)


def draw_shift(rng: np.random.Generator) -> Int[np.ndarray, "3"]:
    """A small random shift of a colour (RGB)."""
    return rng.integers(-_JITTER, _JITTER + 1, 3)


def _count(inside: Inside) -> UInt8[np.ndarray, "h w"]:
    points = inside.view(np.uint8)
    rows = points[0::_S] + points[1::_S] + points[2::_S] + points[3::_S]
    return rows[:, 0::_S] + rows[:, 1::_S] + rows[:, 2::_S] + rows[:, 3::_S]


def _pattern(texture: str, u: Plane, v: Plane) -> Inside:
    """Where the tone is; u and v are in periods."""
    if texture == "striped":
        return v - np.floor(v) >= np.float32(0.55)
    if texture == "dotted":
        x, y = u - np.rint(u), v - np.rint(v)
        return x * x + y * y <= np.float32(0.31 * 0.31)
    return (u - np.floor(u) < np.float32(0.5)) ^ (v - np.floor(v) < np.float32(0.5))


def _clouds(size: int, rng: np.random.Generator) -> Float[np.ndarray, "size size"]:
    """Smooth noise from 0 to 1: a coarse random grid with smoothstep interpolation."""
    cells = int(rng.integers(3, 7))
    grid = rng.random((cells + 1, cells + 1)).astype(np.float32)
    at = np.arange(size, dtype=np.float32) * np.float32(cells / size)
    low = at.astype(np.int32)
    ease = at - low
    ease = ease * ease * (np.float32(3) - np.float32(2) * ease)
    rows = grid[low] + (grid[low + 1] - grid[low]) * ease[:, None]
    return rows[:, low] + (rows[:, low + 1] - rows[:, low]) * ease
