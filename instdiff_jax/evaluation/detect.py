"""What a detector is: pictures in, named instances with masks out. Which detectors there are is in `detectors.py`."""

from collections.abc import Mapping
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8


class Detection(NamedTuple):
    """One instance that a detector found in a picture.

    Attributes:
        category: name of a COCO category; of the shapes dataset: the shape's name.
        score: confidence, higher is surer.
        box: x, y, width, height in pixels.
        mask: True where the instance is seen.
        attributes: kind to value, {"colour": "red", "texture": "striped"}; empty from a detector that knows none.
    """

    category: str
    score: float
    box: tuple[float, float, float, float]
    mask: Bool[np.ndarray, "H W"]
    attributes: Mapping[str, str] = {}


@runtime_checkable
class Detector(Protocol):
    """Finds instances; a detector may also have `features`, see `Featurizer`."""

    def detect(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[list[Detection]]:
        """The instances of each picture."""
        ...


@runtime_checkable
class Featurizer(Protocol):
    """Describes pictures by the vectors that the Fréchet distance compares."""

    def features(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b d"]:
        """One vector a picture."""
        ...
