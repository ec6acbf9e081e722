"""Pictures of a shape that the small model does not know, and a detector that finds it without a network.

    python -m projects.shapes.arrows --output arrows

writes arrows/pictures, 60 pictures of one to three arrows without labels, and arrows/coco, 40 others with labels to
measure on. docs/own_data.md teaches the arrows to the small model with them.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from scipy.ndimage import label

from instdiff_jax.config import Settings
from instdiff_jax.data.vision import Found
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.evaluation.detect import Detection, xywh_of_mask
from instdiff_jax.geometry.masks import box_from_mask
from projects.common.coco_folder import Picture, Row, World, write_split
from projects.shapes.drawing import (
    BACKGROUND_KINDS,
    BACKGROUNDS,
    COLOURS,
    NEW_OUTLINES,
    SHAPES,
    draw_background,
    draw_shift,
    make_stamp,
    paint,
)

SIDE = 64
# A pixel has the nearest of the colours and backgrounds, if it is at most this far in RGB; a blob has at least so many.
_FAR, _LEAST = 90, 24


@dataclasses.dataclass(frozen=True)
class ArrowSettings(Settings):
    """There is nothing to set."""


def render(seed: int, index: int, size: int, settings: Settings | None = None) -> Picture:
    """Picture `index` of a seed: one to three plain arrows that do not touch, on a background of the shapes."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    names = [list(BACKGROUNDS)[i] for i in rng.choice(len(BACKGROUNDS), 2, replace=False)]
    image = draw_background(BACKGROUND_KINDS[rng.integers(len(BACKGROUND_KINDS))], (names[0], names[1]), size, rng)
    taken, rows = np.zeros((size, size), bool), []
    for _ in range(30):
        side, turn = rng.uniform(0.3, 0.55) * size, rng.uniform(-10, 10)
        stamp = make_stamp("arrow", "plain", side, turn, rng.uniform(1.0, 1.2), 9, tuple(rng.random(2)))
        height, width = stamp.mask.shape
        if len(rows) == 3 or max(height, width) >= size:
            continue
        x, y = (int(rng.integers(0, size - edge)) for edge in (width, height))
        window = np.s_[max(y - 1, 0) : y + height + 1, max(x - 1, 0) : x + width + 1]
        if taken[window].any() or (rows and rng.random() < 0.3):
            continue
        colour = str(rng.choice(list(COLOURS)))
        paint(image, stamp, (x, y), colour, draw_shift(rng))
        mask = np.zeros((size, size), bool)
        mask[y : y + height, x : x + width] = stamp.mask
        taken |= mask
        x0, y0, x1, y1 = (int(edge) for edge in box_from_mask(mask))
        rows.append(Row("arrow", f"a {colour} arrow", (x0, y0, x1 - x0, y1 - y0), mask, {"colour": colour}))
    caption = " and ".join(row.caption for row in rows)
    return Picture(image, names[0], rows, (caption,))


WORLD = World("arrows", "shape", ("arrow",), render)


class Blob(NamedTuple):
    """A connected part of a picture in one colour, the shape that fits it best, and how well as IoU."""

    colour: str
    shape: str
    score: float
    mask: Bool[np.ndarray, "H W"]


def find_blobs(image: UInt8[np.ndarray, "H W 3"]) -> list[Blob]:
    """The blobs of a picture in the colours of the world of shapes, best first."""
    tones = [base for base, _ in COLOURS.values()] + list(BACKGROUNDS.values())
    distances = np.linalg.norm(image[:, :, None].astype(float) - np.array(tones, float), axis=-1)
    nearest = np.where(distances.min(-1) <= _FAR, distances.argmin(-1), len(tones))
    found = []
    for number, colour in enumerate(COLOURS):
        parts, count = label(nearest == number)
        for part in range(1, count + 1):
            mask = parts == part
            if mask.sum() >= _LEAST:
                found.append(Blob(colour, *best_shape(mask), mask))
    return sorted(found, key=lambda blob: -blob.score)


def best_shape(mask: Bool[np.ndarray, "H W"]) -> tuple[str, float]:
    """The shape whose outline, stretched to the mask's box, has the highest IoU with it."""
    x0, y0, x1, y1 = box_from_mask(mask).astype(int)
    crop, scores = mask[y0:y1, x0:x1], {}
    for shape in (*SHAPES, *NEW_OUTLINES):
        outline = np.asarray(Image.fromarray(_outline(shape)).resize(crop.shape[::-1], Image.Resampling.NEAREST))
        scores[shape] = float((crop & outline).sum() / (crop | outline).sum())
    best = max(scores, key=lambda shape: scores[shape])
    return best, scores[best]


@functools.cache
def _outline(shape: str) -> Bool[np.ndarray, "h w"]:
    return make_stamp(shape, "plain", 48, 0.0, 1.0, 9, (0.5, 0.5)).mask


class Finder:
    """In place of Grounding DINO, SAM and BLIP for annotate, and of YOLO for evaluate."""

    def ground(self, image: UInt8[np.ndarray, "H W 3"], phrase: str) -> Found:
        """Boxes of the shape that a phrase ends with."""
        blobs = [blob for blob in find_blobs(image) if blob.shape == phrase.split()[-1]]
        boxes = [box_from_mask(blob.mask) for blob in blobs]
        return Found(np.array(boxes, float).reshape(-1, 4), np.array([blob.score for blob in blobs]))

    def segment(self, image: UInt8[np.ndarray, "H W 3"], box: Sequence[float]) -> Bool[np.ndarray, "H W"]:
        """The blob with this box; nothing if there is none."""
        masks = [blob.mask for blob in find_blobs(image) if np.allclose(box_from_mask(blob.mask), box, atol=0.6)]
        return masks[0] if masks else np.zeros(image.shape[:2], bool)

    def caption(self, image: UInt8[np.ndarray, "H W 3"]) -> str:
        """The blobs, from left to right."""
        blobs = sorted(find_blobs(image), key=lambda blob: np.nonzero(blob.mask)[1].mean())
        return " and ".join(f"a {blob.colour} {blob.shape}" for blob in blobs)

    def detect(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[list[Detection]]:
        """All blobs of some pictures."""
        return [
            [
                Detection(blob.shape, blob.score, xywh_of_mask(blob.mask), blob.mask, {"colour": blob.colour})
                for blob in find_blobs(image)
            ]
            for image in images
        ]


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = ArgumentParser(prog="python -m projects.shapes.arrows", description="Pictures of arrows")
    parser.add_argument("--output", type=Path, required=True, help="folder to write to: pictures/ and coco/")
    parser.add_argument("--count", type=int, default=60, help="pictures without labels (default 60)")
    parser.add_argument("--held_out", type=int, default=40, help="pictures with labels (default 40)")
    args = parser.parse_args(argv)
    if args.count < 1:
        raise InputError(f"--count: expected a whole number of at least 1, got {args.count}")
    (args.output / "pictures").mkdir(parents=True, exist_ok=True)
    for index in range(args.count):
        Image.fromarray(render(41, index, SIDE).image).save(args.output / "pictures" / f"{index:03}.png")
    write_split(args.output / "coco", "val", WORLD, (args.held_out, 42, SIDE), ArrowSettings())
    print(f"written: {args.output}, {args.count} pictures without labels and {args.held_out} with labels")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
