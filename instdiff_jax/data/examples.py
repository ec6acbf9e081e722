"""A record becomes a training example: one geometric transform for the image and for every location.

Follows the released training data code, which resizes, crops and flips an image and its boxes, points, scribbles,
mask points and maps (paper section 3, "training details"). Where that code rescales maps twice, ours does it once.
"""

import dataclasses
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt8, UInt32
from PIL import Image

from instdiff_jax.config import Settings
from instdiff_jax.data.dataset import AnnotatedInstance, Record
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask, decode_mask
from instdiff_jax.geometry.points import mask_points, sample_scribble

NUM_SLOTS = 30
# Of each format: how many numbers a slot holds.
COORDINATES = {"boxes": 4, "points": 2, "scribbles": 40, "mask_points": 512}
# What is sampled from a mask: the array, the format that shows it, and how.
_MASK_SAMPLES = (("scribbles", "scribble", sample_scribble), ("mask_points", "mask_points", mask_points))


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """How records become examples; the defaults are the released training's (its configs and README).

    `image_size` is the side of the square canvas in pixels, `map_size` that of the maps. Of an image the
    `max_instances` largest instances are kept; below 30, batches carry no more slots than that. Probabilities: `flip`;
    `keep_caption` (else the caption is empty); `instance_caption`, that an instance's phrase is its own caption instead
    of its category; `drop_*` and `only_*`, see `dropout.draw_formats`; `null_grounding`, that a sample has none.
    `point` is the "center" of the instance's box, as released, or a random pixel of its "mask", as a user's click is
    (in a ring, the center of the box is not).
    """

    image_size: int = 512
    map_size: int = 512
    min_area: float = 0.01
    flip: float = 0.5
    keep_caption: float = 0.5
    count_categories: bool = True
    instance_caption: float = 0.5
    drop_box: float = 0.1
    drop_point: float = 0.1
    drop_scribble: float = 0.1
    drop_mask: float = 0.1
    only_point: float = 0.1
    only_mask: float = 0.1
    only_scribble: float = 0.0
    null_grounding: float = 0.1
    dropout_per: Literal["sample", "batch"] = "sample"
    point: Literal["center", "mask"] = "center"
    use_crowds: bool = False
    max_instances: int = NUM_SLOTS

    def validate(self, where: str = "data") -> None:
        """Raises InputError for a value out of its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is float and not 0 <= value <= 1:
                raise InputError(f"{where}.{field.name}: expected a number from 0 to 1, got {value!r}")
            if type(value) is int and value < 1:
                raise InputError(f"{where}.{field.name}: expected a positive whole number, got {value!r}")
        if self.max_instances > NUM_SLOTS:
            raise InputError(f"{where}.max_instances: expected at most {NUM_SLOTS}, got {self.max_instances}")

    def without_chance(self) -> "DataConfig":
        """The same data for validation: nothing is dropped or flipped; captions and scribbles are still drawn."""
        never = dict(flip=0.0, keep_caption=1.0, instance_caption=0.0, null_grounding=0.0)
        formats = ("drop_box", "drop_point", "drop_scribble", "drop_mask", "only_point", "only_mask", "only_scribble")
        return dataclasses.replace(self, **never, **dict.fromkeys(formats, 0.0))


def load_image(data: bytes) -> Image.Image:
    """Decodes a whole image file to RGB.

    Raises:
        ValueError: with the reason, for a file that is not an image or ends too early.
    """
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image if image.mode == "RGB" else image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot be read as an image: {error}") from error


@dataclasses.dataclass(frozen=True)
class Crop:
    """Short side to `size`, centre crop, perhaps a flip: from pixels of an image to pixels of a square canvas.

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

    @cached_property
    def halvings(self) -> list[tuple[int, int]]:
        """Sizes on the way down: halved while the short side is at least twice the canvas."""
        sizes, side = [], (self.width, self.height)
        while min(side) >= 2 * self.size:
            side = (side[0] // 2, side[1] // 2)
            sizes.append(side)
        return sizes

    @cached_property
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
        if image.size != self.resized:
            image = image.resize(self.resized, Image.Resampling.BICUBIC)
        x, y = self.corner
        canvas = np.asarray(image)[y : y + self.size, x : x + self.size]
        return np.ascontiguousarray(canvas[:, ::-1] if self.flip else canvas)

    def boxes(self, boxes: Float[np.ndarray, "n 4"]) -> tuple[Float[np.ndarray, "n 4"], Float[np.ndarray, " n"]]:
        """Boxes on the canvas, clipped.

        Args:
            boxes: x, y, width, height in pixels of the original image.

        Returns:
            x0, y0, x1, y1 in pixels of the canvas, and each box's area in pixels; an area of 0 where nothing is left.
        """
        boxes = np.asarray(boxes, np.float64).reshape(-1, 4)
        corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], axis=1)
        corners = np.clip(corners * self.scale - np.tile(self.corner, 2), 0, self.size)
        area = (corners[:, 2] - corners[:, 0]) * (corners[:, 3] - corners[:, 1])
        if self.flip:
            corners[:, [0, 2]] = self.size - corners[:, [2, 0]]
        return corners, area

    def points(self, points: Float[np.ndarray, "n 2"]) -> Float[np.ndarray, "n 2"]:
        """Points x, y in pixels of the original image as pixels of the canvas, moved to its edge from outside."""
        points = np.clip(np.asarray(points, np.float64) * self.scale - self.corner, 0, self.size)
        if self.flip:
            points[:, 0] = self.size - points[:, 0]
        return points

    def grid(self, map_size: int) -> tuple[Int[np.ndarray, "map_size"], Int[np.ndarray, "map_size"]]:
        """Which row and column of the original image each row and column of a map shows.

        The canvas takes its nearest original pixel, as PIL's NEAREST does, and a map of another size than the canvas
        takes canvas pixel floor(i * size / map_size), as PyTorch's nearest interpolation inside UniFusion does.
        """
        (x, y), (width, height) = self.corner, self.resized
        columns = _nearest(self.width, width)[x : x + self.size]
        rows = _nearest(self.height, height)[y : y + self.size]
        if self.flip:
            columns = columns[::-1]
        if map_size != self.size:
            take = np.arange(map_size) * self.size // map_size
            columns, rows = columns[take], rows[take]
        return rows, columns


def _nearest(source: int, target: int) -> Int[np.ndarray, " target"]:
    """The source index of every target index; PIL itself makes the table, so that ties fall as they do there."""
    line = Image.fromarray(np.arange(source, dtype=np.int32)[None])
    return np.asarray(line.resize((target, 1), Image.Resampling.NEAREST))[0]


def select_instances(
    record: Record, crop: Crop, config: DataConfig
) -> list[tuple[AnnotatedInstance, Float[np.ndarray, "4"]]]:
    """The instances to train on with their boxes on the canvas in pixels: large enough, the largest first.

    An instance needs `min_area` of the canvas after clipping; crowds are left out unless the config takes them.
    """
    instances = [item for item in record.instances if config.use_crowds or not item.crowd]
    boxes, areas = crop.boxes(np.array([item.box for item in instances], np.float64))
    # Torch sorts float32 areas there.
    order = np.argsort(-areas.astype(np.float32), kind="stable")
    large = (areas > 0) & (areas / (crop.size * crop.size) >= config.min_area)
    return [(instances[i], boxes[i]) for i in order if large[i]][: config.max_instances]


def locate(
    chosen: Sequence[tuple[AnnotatedInstance, Float[np.ndarray, "4"]]],
    record: Record,
    crop: Crop,
    map_size: int,
    rng: np.random.Generator,
    point: Literal["center", "mask"] = "center",
    kept: Mapping[str, bool] | None = None,
) -> dict[str, np.ndarray]:
    """Every format of up to 30 instances, in fractions of the canvas.

    Args:
        chosen: instances and their boxes on the canvas in pixels.
        record: whose instances they are.
        crop: from the image to the canvas.
        map_size: side of the maps in pixels.
        rng: draws the scribbles, mask points of masks under 128 pixels, and points on masks.
        point: where an instance's point lies, see DataConfig; without a mask on the canvas it is the box's center.
        kept: see `dropout.draw_formats`: scribbles and mask points that nothing will see are left out, zeros. All of
            them by default.

    Returns:
        boxes [30, 4], points [30, 2] (see DataConfig), scribbles [30, 40], mask_points [30, 512] and valid [30],
        float32; maps [map_size, map_size], uint32, bit i for slot i. An instance without a mask has zeros.

    Raises:
        InputError: for a mask that does not fit its image.
    """
    arrays = {name: np.zeros((NUM_SLOTS, count), np.float32) for name, count in COORDINATES.items()}
    arrays["maps"] = np.zeros((map_size, map_size), np.uint32)
    arrays["valid"] = np.zeros(NUM_SLOTS, np.float32)
    rows, columns = crop.grid(map_size)
    for slot, (instance, box) in enumerate(chosen):
        arrays["valid"][slot] = 1
        arrays["boxes"][slot] = np.float32(box) / np.float32(crop.size)
        arrays["points"][slot] = np.float32((box[:2] + box[2:]) / 2) / np.float32(crop.size)
        if not instance.mask:
            continue
        where = f"{record.file_name}: annotation {instance.annotation_id}"
        rle = {"size": [record.height, record.width], "counts": instance.mask}
        mask = decode_mask(rle, record.height, record.width, where)
        for name, format_name, sample in _MASK_SAMPLES:
            if kept is None or kept[format_name]:
                points = sample(mask, rng)
                arrays[name][slot] = np.float32(crop.points(points)).reshape(-1) / np.float32(crop.size)
        _paint(arrays["maps"], mask, rows, columns, slot)
        if point == "mask":
            pixels = np.argwhere(arrays["maps"] >> np.uint32(slot) & 1)
            if len(pixels):
                arrays["points"][slot] = np.float32(pixels[rng.integers(len(pixels)), ::-1]) / np.float32(map_size)
    return arrays


def _paint(
    maps: UInt32[np.ndarray, "S S"],
    mask: np.ndarray,
    rows: Int[np.ndarray, " S"],
    columns: Int[np.ndarray, " S"],
    slot: int,
) -> None:
    """Sets bit `slot` of the maps where the mask lies; only the mask's own box is touched."""
    box = box_from_mask(mask)
    if box is None:
        return
    x0, y0, x1, y1 = box.astype(int)
    across = np.flatnonzero((columns >= x0) & (columns < x1))
    down = np.flatnonzero((rows >= y0) & (rows < y1))
    if len(across) and len(down):
        # Decoded masks lie in memory column by column, so columns are taken first.
        part = mask.T[columns[across]][:, rows[down]].T
        maps[down[0] : down[-1] + 1, across[0] : across[-1] + 1] |= part.astype(np.uint32) << np.uint32(slot)


def write_caption(record: Record, categories: Sequence[str], config: DataConfig, rng: np.random.Generator) -> str:
    """The caption to train with: with detections it begins with what there is, "2 dog, 1 cat. a caption".

    Args:
        record: where it has several captions, one of them is drawn.
        categories: names of the chosen instances, the largest first.
        config: `keep_caption`, `count_categories`.
        rng: decides.

    Returns:
        The caption; "" where it is dropped or there is nothing to say.
    """
    kept = rng.random() < config.keep_caption
    caption = record.captions[rng.integers(len(record.captions))] if record.captions else ""
    if not kept:
        return ""
    if record.detection and config.count_categories and categories:
        counted = ", ".join(f"{count} {name}" for name, count in Counter(categories).items())
        return f"{counted}. {caption}" if caption else counted
    return caption


def choose_phrases(
    instances: Sequence[AnnotatedInstance], config: DataConfig, rng: np.random.Generator
) -> Int[np.ndarray, "30"]:
    """The number of each slot's phrase in phrases.json: its category's or its own caption's; -1 for empty slots."""
    numbers = np.full(NUM_SLOTS, -1, np.int64)
    draws = rng.random(NUM_SLOTS)
    for slot, instance in enumerate(instances):
        own = instance.caption_phrase >= 0 and draws[slot] < config.instance_caption
        numbers[slot] = instance.caption_phrase if own else instance.phrase
    return numbers
