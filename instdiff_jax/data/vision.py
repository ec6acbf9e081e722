"""What models of other libraries do here: find what a phrase names, mask what a box is around, caption, answer."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import pycocotools.mask as coco_mask
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
    corners = np.vstack([np.asarray(boxes, float).reshape(-1, 4), np.asarray(box, float)])
    sides = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    return coco_mask.iou(sides[:-1], sides[-1:], [0])[:, 0] if len(boxes) else np.zeros(0)


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
