"""What a detector is: it takes images and finds instances with a category, a box and a mask."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

from instdiff_jax.geometry.masks import box_from_mask


class Detection(NamedTuple):
    """One instance that a detector found in an image.

    Attributes:
        category: name of a category of the split.
        score: confidence; higher is more certain.
        box: x, y, width, height in pixels.
        mask: True where the instance is visible.
        attributes: kind to value, {"colour": "red", "texture": "striped"}; empty if the detector knows none.
    """

    category: str
    score: float
    box: tuple[float, float, float, float]
    mask: Bool[np.ndarray, "H W"]
    attributes: Mapping[str, str] = {}


@runtime_checkable
class Detector(Protocol):
    """Finds instances.

    A detector may also have `features` (see `Featurizer`), `has_masks` (False if its masks mean nothing) and
    `fingerprint` (a string that identifies it by content).
    """

    def detect(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[list[Detection]]:
        """The instances in each image."""
        ...


@runtime_checkable
class Featurizer(Protocol):
    """Describes images by vectors, which the Fréchet distance compares."""

    def features(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b d"]:
        """One vector per image."""
        ...


def xywh_of_mask(mask: Bool[np.ndarray, "H W"]) -> tuple[float, float, float, float]:
    """The box x, y, width, height around a mask in pixels; zeros for an empty mask."""
    corners = box_from_mask(mask)
    if corners is None:
        return 0.0, 0.0, 0.0, 0.0
    x0, y0, x1, y1 = map(float, corners)
    return x0, y0, x1 - x0, y1 - y0
