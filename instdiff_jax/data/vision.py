"""What models of other libraries do here: find what a phrase names, mask what a box is around, caption, answer.

A model may have a second method that takes several at once: `ground_all(images, phrases)`, `segment_all(image, boxes)`
and `caption_all(images)`, each with a list of what the first method returns.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import pycocotools.mask as coco_mask
from jaxtyping import Bool, Float, UInt8

Pixels = UInt8[np.ndarray, "H W 3"]
Pictures = Sequence[UInt8[np.ndarray, "_ _ 3"]]  # each of its own size


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


@runtime_checkable
class Tagger(Protocol):
    """Names the kinds of things in a picture, such as Florence-2."""

    def tags(self, image: Pixels) -> list[str]: ...


def ground_all(grounder: Grounder, images: Pictures, phrases: Sequence[str]) -> list[Found]:
    """What each phrase names in its image."""
    return _all(grounder, "ground", len(images), (list(images), list(phrases)), zip(images, phrases, strict=True))


def segment_all(
    segmenter: BoxSegmenter, image: Pixels, boxes: Sequence[Sequence[float]]
) -> list[Bool[np.ndarray, "H W"]]:
    """The masks of what boxes of one image are around."""
    return _all(segmenter, "segment", len(boxes), (image, list(boxes)), ((image, box) for box in boxes))


def caption_all(captioner: Captioner, images: Pictures) -> list[str]:
    """A description of each image."""
    return _all(captioner, "caption", len(images), (list(images),), ((image,) for image in images))


def _all(model: Any, method: str, count: int, together: tuple, one_by_one: Iterable[tuple]) -> list[Any]:
    many = getattr(model, f"{method}_all", None)
    if many is None or count < 2:
        return [getattr(model, method)(*each) for each in one_by_one]
    found = list(many(*together))
    if len(found) != count:
        raise ValueError(f"{method}_all: expected {count} results, got {len(found)}")
    return found


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
