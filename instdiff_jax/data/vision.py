"""What models of other libraries do here: find what a phrase names, mask what a box is around, caption, answer."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Float, UInt8

Pixels = UInt8[np.ndarray, "H W 3"]


class Found(NamedTuple):
    """Boxes that a detector found: x0, y0, x1, y1 in pixels, and scores, highest first."""

    boxes: Float[np.ndarray, "n 4"]
    scores: Float[np.ndarray, " n"]


@runtime_checkable
class Grounder(Protocol):
    """Finds what a phrase names, such as Grounding DINO."""

    def ground(self, image: Pixels, phrase: str) -> Found: ...


@runtime_checkable
class BoxSegmenter(Protocol):
    """The mask of what a box x0, y0, x1, y1 is around, such as SAM."""

    def segment(self, image: Pixels, box: Sequence[float]) -> Bool[np.ndarray, "H W"]: ...


@runtime_checkable
class Captioner(Protocol):
    """Describes a picture in a few words, such as BLIP."""

    def caption(self, image: Pixels) -> str: ...


@runtime_checkable
class Answerer(Protocol):
    """Answers questions about pictures: a vision language model."""

    def answer(self, image: Pixels, question: str) -> str: ...


def box_ious(boxes: Float[np.ndarray, "n 4"], box: Sequence[float]) -> Float[np.ndarray, " n"]:
    """Intersection over union of each box with one, all x0, y0, x1, y1."""
    x0, y0, x1, y1 = box
    wide = np.maximum(np.minimum(boxes[:, 2], x1) - np.maximum(boxes[:, 0], x0), 0.0)
    high = np.maximum(np.minimum(boxes[:, 3], y1) - np.maximum(boxes[:, 1], y0), 0.0)
    inside = wide * high
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    return inside / np.maximum(areas + (x1 - x0) * (y1 - y0) - inside, 1e-12)


def keep_best(found: Found, threshold: float) -> list[int]:
    """Non-maximum suppression: of boxes whose IoU is above the threshold, the one with the highest score stays.

    Returns:
        Indices of what stays, highest score first.
    """
    kept: list[int] = []
    for i in np.argsort(-found.scores, kind="stable"):
        if not kept or box_ious(found.boxes[kept], found.boxes[i]).max() <= threshold:
            kept.append(int(i))
    return kept
