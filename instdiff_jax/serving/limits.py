"""What a request may ask for: limits on sizes and counts, checked before anything large is made of them."""

import base64
import binascii
import dataclasses
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image

from instdiff_jax.errors import InputError, short
from instdiff_jax.images import open_image
from instdiff_jax.layout import Layout
from instdiff_jax.other_tools import to_official

_IMAGE_KINDS = ("PNG", "JPEG", "WEBP")
# Outlines longer than so many times around the canvas would take the rasterizer's memory.
_MOST_AROUND = 200


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of one server.

    Attributes:
        side: of a canvas in pixels.
        steps: of the solver.
        images: seeds of one request.
        waiting: images of all requests that wait; more are answered 429.
        seconds: that a request may take, waiting included.
        body: bytes of a request.
        kept: finished jobs whose pictures can still be fetched.
    """

    side: int = 1024
    steps: int = 100
    images: int = 16
    waiting: int = 256
    seconds: float = 300.0
    body: int = 16 * 1024 * 1024
    kept: int = 64

    def read_layout(self, values: Any) -> Layout:
        """A layout from its object, or another tool's; InputError for one that is not valid, or too large."""
        if isinstance(values, Mapping):
            values = to_official(values, "layout")
            self._check_size(values)
        return Layout.from_dict(values, "layout")

    def _check_size(self, values: Mapping[str, Any]) -> None:
        """InputError for a canvas or outlines too large; other faults are `Layout.from_dict`'s to find."""
        sides = []
        for name in ("width", "height"):
            side = values.get(name)
            if type(side) is int:
                if side > self.side:
                    raise InputError(f"layout: {name}: expected at most {self.side} pixels, got {short(side)}")
                sides.append(side)
        annos = values.get("annos")
        if len(sides) == 2 and isinstance(annos, list):
            for i, anno in enumerate(annos):
                mask = anno.get("mask") if isinstance(anno, dict) else None
                if isinstance(mask, list) and _outline(mask, 9 * self.side) > _MOST_AROUND * 2 * sum(sides):
                    raise InputError(f"layout: annos[{i}].mask: expected shorter outlines; send run lengths instead")


def _outline(polygons: Sequence[Any], reach: int) -> float:
    """The length of polygons in pixels; of what is no polygon, 0."""
    if polygons and not isinstance(polygons[0], list):
        polygons = [polygons]
    total = 0.0
    for polygon in polygons:
        if not isinstance(polygon, list) or any(type(value) not in (int, float) for value in polygon):
            continue
        x, y = ([min(max(value, -reach), reach) for value in polygon[axis::2]] for axis in (0, 1))
        points = list(zip(x, y, strict=False))
        total += sum(math.dist(a, b) for a, b in zip(points, points[1:] + points[:1], strict=True))
    return total if math.isfinite(total) else 0.0


def decode_base64(text: str, field: str) -> bytes:
    """The bytes of a field; a data URL's header is skipped."""
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{field}: expected base64") from error


def read_pixels(data: bytes, field: str, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """An image of exactly this width and height; its header is read before any pixel is."""
    try:
        with Image.open(io.BytesIO(data), formats=_IMAGE_KINDS) as image:
            found = image.size
    except Exception as error:  # Pillow raises errors of many kinds for a damaged file
        raise InputError(f"{field}: expected an image: PNG, JPEG or WebP") from error
    if size not in (found, found[::-1]):
        raise InputError(f"{field}: expected {size[0]}x{size[1]} pixels as the canvas, got {found[0]}x{found[1]}")
    try:
        pixels = np.asarray(open_image(data))
    except ValueError as error:
        raise InputError(f"{field}: expected an image: {error}") from error
    if pixels.shape[1::-1] != size:
        raise InputError(f"{field}: expected {size[0]}x{size[1]} pixels as the canvas, got another orientation")
    return pixels


def read_mask(data: bytes, field: str, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
    """A mask of exactly this width and height: True where the image is brighter than half."""
    mask = read_pixels(data, field, size).mean(axis=-1) >= 128
    if not mask.any():
        raise InputError(f"{field}: expected an image that is white where to repaint, it has no white")
    return mask
