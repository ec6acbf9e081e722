"""The formulas of InstanceDiffusion's evaluation scripts: points in masks, attributes by CLIP, precision on COCO.

Of https://github.com/frank-xwang/InstanceDiffusion, `eval/eval_pim.py` and `eval/eval_attribute_binding.py`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from PIL import Image
from pycocotools import mask as coco_mask

from instdiff_jax.data.vision import Pixels
from instdiff_jax.evaluation.image import TextImageModel
from instdiff_jax.evaluation.metrics import Precision, score_detections
from instdiff_jax.geometry.points import SCRIBBLE_POINTS

Masks = Sequence[Mapping[str, Any]]  # compressed RLE


def mask_ious(asked: Masks, found: Masks) -> Float[np.ndarray, "asked found"]:
    """IoU of every mask asked for with every one found; -1 for two empty masks, which never match."""
    if not asked or not found:
        return np.zeros((len(asked), len(found)))
    ious = coco_mask.iou(list(found), list(asked), [0] * len(asked)).T
    # One by one: for more than 255 at once pycocotools raises OverflowError.
    empty = [np.array([coco_mask.area(mask) for mask in masks]) == 0 for masks in (asked, found)]
    return np.where(empty[0][:, None] & empty[1], -1.0, ious)


def match_masks(ious: Float[np.ndarray, "asked found"]) -> list[tuple[int, int]]:
    """Gives each mask asked for, in order, the free mask found with the highest IoU, whatever its category, even at 0.

    Returns:
        Pairs of indices: asked, found. Each mask found is in one pair at most.
    """
    pairs: list[tuple[int, int]] = []
    free = list(range(ious.shape[1]))
    for i, row in enumerate(ious):
        if free and row[free].max() >= 0:
            best = free[int(row[free].argmax())]
            free.remove(best)
            pairs.append((i, best))
    return pairs


def centre_in_mask(asked: Bool[np.ndarray, "H W"], found: Bool[np.ndarray, "H W"]) -> float | None:
    """Whether the centre of the box around a mask lies in the mask found; None for an empty mask."""
    rows, columns = np.nonzero(asked)
    if not len(rows):
        return None
    x, y = (int((int(axis.min()) + int(axis.max())) / 2) for axis in (columns, rows))
    return float(found[y, x])


def scribble_in_mask(
    asked: Bool[np.ndarray, "H W"], found: Bool[np.ndarray, "H W"], rng: np.random.RandomState
) -> float | None:
    """The share of 20 random pixels of a mask that lie in the mask found; None without a pixel but (0, 0)."""
    pixels = np.argwhere(asked)
    if not len(pixels):
        return None
    chosen = pixels[rng.choice(len(pixels), SCRIBBLE_POINTS, replace=len(pixels) < SCRIBBLE_POINTS)]
    return float(found[tuple(chosen.T)].mean()) if chosen.sum() else None


def points_in_masks(
    asked: Masks, found: Masks, pairs: Sequence[tuple[int, int]], rng: np.random.RandomState | None
) -> float | None:
    """PiM of one picture: the mean over its pairs of masks, of scribbles if there is an `rng`, else of centres."""
    shares = []
    for i, k in pairs:
        masks = coco_mask.decode(dict(asked[i])).astype(bool), coco_mask.decode(dict(found[k])).astype(bool)
        shares.append(centre_in_mask(*masks) if rng is None else scribble_in_mask(*masks, rng))
    shares = [share for share in shares if share is not None]
    return float(np.mean(shares)) if shares else None


def attribute_score(
    clip: TextImageModel, image: Pixels, box: Sequence[float], phrase: str, values: Sequence[str], wanted: str
) -> tuple[float, bool] | None:
    """CLIP's view of the pixels in the box of a layout, whatever is there.

    Args:
        clip: the model.
        image: the picture.
        box: x0, y0, x1, y1 in parts of its sides.
        phrase: the instance's caption, "red dog".
        values: the attributes to choose from.
        wanted: the right one.

    Returns:
        The cosine of the crop with the phrase, and whether "a WANTED object" is the text nearest to the crop; None
        for a box without a pixel.
    """
    height, width = image.shape[:2]
    x0, y0, x1, y1 = box
    crop = Image.fromarray(image).crop((x0 * width, y0 * height, x1 * width, y1 * height))
    if not crop.width or not crop.height:
        return None
    vector = clip.embed_images([np.asarray(crop)])[0]
    texts = clip.embed_texts([phrase, *(f"a {value} object" for value in values)])
    cosines = texts @ vector
    return float(cosines[0]), values[int(np.argmax(cosines[1:]))] == wanted


def mean_of_means(pictures: Sequence[Sequence[float]]) -> float:
    """The mean over pictures of each one's mean; pictures without a value do not count."""
    means = [float(np.mean(values)) for values in pictures if len(values)]
    return float(np.mean(means)) if means else 0.0


def coco_precision(pictures: Sequence[Mapping[str, Any]], kind: str) -> Precision:
    """COCO's averages over verdicts of pictures, see `coco_rows`."""
    names = {name: k for k, name in enumerate(sorted({row[0] for one in pictures for row in one["asked"]}), 1)}
    truth, found = coco_rows(pictures, kind, names)
    return score_detections([one["side"] for one in pictures], truth, found, kind, list(names))


def coco_rows(
    pictures: Sequence[Mapping[str, Any]], kind: str, names: Mapping[str, int]
) -> tuple[list[dict], list[dict]]:
    """What was asked for and what was found as COCO's rows; pictures are numbered from 1.

    Args:
        pictures: each with "side", "asked" (category, box, RLE or None, whether it is a crowd) and "found" (category,
            score, box, RLE or None); boxes are x, y, width, height in pixels.
        kind: "bbox" or "segm".
        names: category to number; detections of others are left out.
    """
    truth: list[dict] = []
    found: list[dict] = []
    for number, one in enumerate(pictures, 1):
        for category, box, rle, crowd in one["asked"]:
            if kind == "segm" and rle is None:
                continue
            area = float(coco_mask.area(rle)) if kind == "segm" else box[2] * box[3]
            row = {"image_id": number, "category_id": names[category], "bbox": box, "segmentation": rle}
            truth.append(row | {"area": area, "iscrowd": int(crowd)})
        for category, score, box, rle in one["found"]:
            if category in names and (kind == "bbox" or rle is not None):
                row = {"image_id": number, "category_id": names[category], "score": score, "bbox": box}
                found.append(row | {"segmentation": rle, "area": box[2] * box[3], "iscrowd": 0})
    return truth, found
