"""Training images: the resize, crop and flip shared by an image and its locations.

Follows the released training data code (paper, "Training"). That code rescales maps twice;
ours does it once.
"""

import dataclasses
import functools

import numpy as np
from jaxtyping import Float, Int, UInt8
from PIL import Image

# An image longer than this many canvases is cropped before it is resized.
_LONGEST = 8


@dataclasses.dataclass(frozen=True)
class Crop:
    """Maps an image to a square canvas: resize of the short side to `size`, center crop, optional flip.

    Attributes:
        width: of the original image in pixels.
        height: of the original image in pixels.
        size: side of the canvas in pixels.
        flip: mirror left and right.
    """

    width: int
    height: int
    size: int
    flip: bool = False

    @functools.cached_property
    def halvings(self) -> list[tuple[int, int]]:
        """Intermediate sizes: halved while the short side is at least twice the canvas."""
        sizes, side = [], (self.width, self.height)
        while min(side) >= 2 * self.size:
            side = (side[0] // 2, side[1] // 2)
            sizes.append(side)
        return sizes

    @functools.cached_property
    def resized(self) -> tuple[int, int]:
        """Width and height before the crop."""
        width, height = self.halvings[-1] if self.halvings else (self.width, self.height)
        scale = self.size / min(width, height)
        return round(width * scale), round(height * scale)

    @property
    def corner(self) -> tuple[int, int]:
        """x, y of the crop's corner in the resized image."""
        return (self.resized[0] - self.size) // 2, (self.resized[1] - self.size) // 2

    @property
    def scale(self) -> float:
        """Canvas pixels per original pixel, as locations are scaled."""
        return self.size / min(self.width, self.height)

    def image(self, image: Image.Image) -> UInt8[np.ndarray, "size size 3"]:
        """The canvas of an RGB image."""
        for size in self.halvings:
            image = image.resize(size, Image.Resampling.BOX)
        x, y = self.corner
        if max(self.resized) > _LONGEST * self.size:
            # Resize only what the crop keeps: a whole thin image would take gigabytes.
            scales = [side / resized for side, resized in zip(image.size, self.resized)]
            box = tuple(edge * scale for edge, scale in zip((x, y, x + self.size, y + self.size), scales * 2))
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC, box)
            x = y = 0
        elif image.size != self.resized:
            image = image.resize(self.resized, Image.Resampling.BICUBIC)
        canvas = np.asarray(image)[y : y + self.size, x : x + self.size]
        return np.ascontiguousarray(canvas[:, ::-1] if self.flip else canvas)

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, " n"]]:
        """Boxes on the canvas, clipped.

        Args:
            boxes: x, y, width, height in pixels of the original image.

        Returns:
            x0, y0, x1, y1 in pixels of the canvas, and each box's area in pixels; an area of 0 outside the canvas.
        """
        boxes = np.asarray(boxes, np.float64)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners = np.clip(corners * self.scale - np.tile(self.corner, 2), 0, self.size)
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        if self.flip:
            corners[:, [0, 2]] = self.size - corners[:, [2, 0]]
        return corners, area

    def points(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Converts points x, y from original pixels to canvas pixels, clipped to the canvas."""
        points = np.clip(np.asarray(points, np.float64) * self.scale - self.corner, 0, self.size)
        if self.flip:
            points[:, 0] = self.size - points[:, 0]
        return points

    def grid(self, map_size: int) -> tuple[Int[np.ndarray, "map_size"], Int[np.ndarray, "map_size"]]:
        """The row and column of the original image that each row and column of a map shows.

        The canvas takes its nearest original pixel, as PIL's NEAREST does, and a map of another size than the canvas
        takes canvas pixel floor(i * size / map_size), as PyTorch's nearest interpolation inside UniFusion does.
        """
        (x, y), (width, height) = self.corner, self.resized
        columns = _nearest(self.width, width, x, self.size)
        rows = _nearest(self.height, height, y, self.size)
        if self.flip:
            columns = columns[::-1]
        if map_size != self.size:
            take = np.arange(map_size) * self.size // map_size
            columns, rows = columns[take], rows[take]
        return rows, columns


@functools.lru_cache(maxsize=256)
def _nearest(source: int, target: int, start: int, count: int) -> Int[np.ndarray, " count"]:
    """The source index of `count` target indices. PIL makes the table, so that ties round as in PIL."""
    line = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    table = np.asarray(line.resize((target, 1), Image.Resampling.NEAREST))[0, start : start + count].copy()
    table.flags.writeable = False
    return table
