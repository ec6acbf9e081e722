"""One evaluated image: what was found in it and how well it follows its layout."""

import dataclasses
from typing import Protocol

import numpy as np
from jaxtyping import Float, UInt8

from instdiff_jax.evaluation.metrics import Found, TargetMeasure, mean
from instdiff_jax.evaluation.split import Scene


class TextImageModel(Protocol):
    """Embeds images and texts as unit vectors, like CLIP."""

    def embed_images(self, images: list[UInt8[np.ndarray, "h w 3"]]) -> Float[np.ndarray, "n d"]: ...

    def embed_texts(self, texts: list[str]) -> Float[np.ndarray, "n d"]: ...


@dataclasses.dataclass(frozen=True, eq=False)
class EvaluatedImage:
    """The image of a scene with its detections and measures.

    Attributes:
        found: all detections.
        measures: one for each requested instance; empty without a detector.
        clip_global: cosine between image and caption; None without CLIP.
        clip_local: for each requested instance, the cosine between the pixels in its box and its caption.
    """

    scene: Scene
    found: list[Found]
    measures: list[TargetMeasure]
    clip_global: float | None = None
    clip_local: tuple[float, ...] = ()

    @property
    def score(self) -> float | None:
        """Mean IoU of the instances, of masks if there are any, else of boxes; reports sort by it."""
        return mean(item.box_iou if item.mask_iou is None else item.mask_iou for item in self.measures)
