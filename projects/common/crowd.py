"""Things in front of each other: who owns each pixel, and how much of each thing is still visible."""

from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Int

from instdiff_jax.geometry.masks import box_from_mask

# Training drops boxes smaller than 1% of the image.
_MIN_BOX = 0.01


class Crowd:
    """The things placed so far, from back to front.

    Attributes:
        size: side of the image in pixels.
        hidden: largest fraction of a thing that others may hide.
        owner: index of the thing that is visible at each pixel; -1 is the background.
        areas: of each thing in pixels, hidden ones included.
        visible: of each thing, those that are not hidden.
        covers: pairs (i, j): thing i lies in front of thing j and hides a part of it.
    """

    def __init__(self, size: int, hidden: float):
        self.size, self.hidden = size, hidden
        self.owner: Int[np.ndarray, "H W"] = np.full((size, size), -1, np.int16)
        self.areas: list[int] = []
        self.visible: list[int] = []
        self.covers: list[tuple[int, int]] = []

    def put(
        self,
        mask: Bool[np.ndarray, "h w"],
        corner: tuple[int, int],
        apart: Callable[[int], bool] = lambda index: False,
        inside: int | None = None,
    ) -> bool:
        """Places a thing in front of the others, unless it hides too much of one.

        Args:
            mask: of the thing in its window.
            corner: (x, y) of the window's top left corner in pixels.
            apart: whether the thing of an index may not be covered at all.
            inside: index of the thing that it is a part of, and in which it must lie.

        Returns:
            Whether it was placed.
        """
        if not mask.any():  # too small to cover half of any pixel
            return False
        area = np.s_[corner[1] : corner[1] + mask.shape[0], corner[0] : corner[0] + mask.shape[1]]
        window = self.owner[area]
        hides = np.bincount(window[mask] + 1, minlength=len(self.areas) + 1)
        below = [int(k) for k in np.flatnonzero(hides[1:])]
        if inside is not None:
            if hides[0] or below != [inside]:
                return False
        else:
            for k in below:
                left = self.visible[k] - hides[k + 1]
                if apart(k) or left < (1 - self.hidden) * self.areas[k]:
                    return False
                rest = self.owner == k
                rest[area][mask] = False
                x0, y0, x1, y1 = box_from_mask(rest)
                if (x1 - x0) * (y1 - y0) < _MIN_BOX * self.size**2:
                    return False
        for k in below:
            self.visible[k] -= hides[k + 1]
            if k != inside:
                self.covers.append((len(self.areas), k))
        window[mask] = len(self.areas)
        pixels = int(np.count_nonzero(mask))
        self.areas.append(pixels)
        self.visible.append(pixels)
        return True
