"""Makes training examples from records: selects instances, formats, caption and phrases; builds the grounding.

Follows the released training data code (paper, "Training").
"""

import dataclasses
from collections.abc import Collection, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float, Int, UInt32

from instdiff_jax.coco import count_names
from instdiff_jax.config import Settings
from instdiff_jax.data.dataset import AnnotatedInstance, Record
from instdiff_jax.data.images import Crop
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask, decode_mask
from instdiff_jax.geometry.points import mask_points, sample_scribble
from instdiff_jax.grounding import FORMATS, Grounding, fill_slot, null_grounding, set_has_map
from instdiff_jax.layout import MAX_INSTANCES


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """How records become examples; the defaults are the released training's (its configs and README).

    `image_size` is the side of the square canvas in pixels, `map_size` that of the maps. The
    `max_instances` largest instances of an image are kept, and batches have that many slots. Probabilities: `flip`;
    `keep_caption` (else the caption is empty); `instance_caption`, that an instance's phrase is its own caption instead
    of its category; `drop_*` and `only_*`, see `draw_formats`; `null_grounding`, that a sample has no grounding.
    `point` is the "center" of the instance's box, as released, or a random pixel of its "mask", like a user's click.
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
    max_instances: int = MAX_INSTANCES

    def validate(self, where: str = "data") -> None:
        """Raises InputError for a value out of its range."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if type(value) is float and not 0 <= value <= 1:
                raise InputError(f"{where}.{field.name}: expected a number from 0 to 1, got {value!r}")
            if type(value) is int and value < 1:
                raise InputError(f"{where}.{field.name}: expected a positive whole number, got {value!r}")
        if self.max_instances > MAX_INSTANCES:
            raise InputError(f"{where}.max_instances: expected at most {MAX_INSTANCES}, got {self.max_instances}")

    def without_chance(self) -> "DataConfig":
        """The config for validation: drops and flips nothing. Captions and scribbles are still random."""
        never = dict(flip=0.0, keep_caption=1.0, instance_caption=0.0, null_grounding=0.0)
        formats = ("drop_box", "drop_point", "drop_scribble", "drop_mask", "only_point", "only_mask", "only_scribble")
        return dataclasses.replace(self, **never, **dict.fromkeys(formats, 0.0))


def select_instances(
    record: Record, crop: Crop, config: DataConfig
) -> list[tuple[AnnotatedInstance, Float[np.ndarray, "4"]]]:
    """Selects the instances to train on, largest first, with their boxes in canvas pixels.

    An instance needs `min_area` of the canvas after clipping; crowds are left out unless `use_crowds`.
    """
    instances = [item for item in record.instances if config.use_crowds or not item.crowd]
    boxes, areas = crop.boxes(np.array([item.box for item in instances], np.float64).reshape(-1, 4))
    # The official code sorts float32 areas.
    order = np.argsort(-areas.astype(np.float32), kind="stable")
    large = (areas > 0) & (areas / (crop.size * crop.size) >= config.min_area)
    return [(instances[i], boxes[i]) for i in order if large[i]][: config.max_instances]


def draw_formats(config: DataConfig, rng: np.random.Generator) -> frozenset[str]:
    """Draws which formats a sample keeps, with the released probabilities and precedence (paper, "Training").

    Box, point, scribble and mask (its points and its map) are dropped independently. Then a kept mask keeps box and
    point, and a kept box keeps the point. With probability `only_point` only the point stays; then, if the mask
    survived, with probability `only_mask` all but the scribble stay. If nothing is left, the box is kept. At the end,
    with probability `only_scribble` (the released code has none), only the scribble stays. The released code draws
    once for a batch; see `DataConfig.dropout_per`.
    """
    draws = rng.random(7)
    box = draws[0] >= config.drop_box
    point = draws[1] >= config.drop_point
    scribble = draws[2] >= config.drop_scribble
    mask = draws[3] >= config.drop_mask
    if mask:
        box = True
    if box:
        point = True
    if draws[4] < config.only_point:
        box, point, scribble, mask = False, True, False, False
    if mask and draws[5] < config.only_mask:
        box, point, scribble = True, True, False
    if not (box or point or scribble or mask):
        box = True
    if draws[6] < config.only_scribble:
        box, point, scribble, mask = False, False, True, False
    kept = {"box": box, "point": point, "scribble": scribble, "mask": mask}
    return frozenset(name for name in FORMATS if kept[name])


def locate(
    chosen: Sequence[tuple[AnnotatedInstance, Float[np.ndarray, "4"]]],
    record: Record,
    crop: Crop,
    map_size: int,
    rng: np.random.Generator,
    point: Literal["center", "mask"] = "center",
    used: Collection[str] = FORMATS,
) -> Grounding:
    """The grounding of up to 30 instances, without phrase embeddings.

    Args:
        chosen: instances and their boxes on the canvas in pixels.
        record: the image's record.
        crop: from the image to the canvas.
        map_size: side of the maps in pixels.
        rng: draws the scribbles, the mask points of masks under 128 pixels, and points on masks.
        point: an instance's point, see DataConfig; without a mask on the canvas it is the box's center.
        used: the formats that are not dropped, see `draw_formats`. Scribbles and mask points are only made if they
            are used; boxes, points and maps are always made.

    Raises:
        InputError: for a mask that does not fit its image.
    """
    grounding = null_grounding(map_size, 0)
    rows, columns = crop.grid(map_size)
    for slot, (instance, box) in enumerate(chosen):
        coordinates = {
            "box": np.float32(box) / np.float32(crop.size),
            "point": np.float32((box[:2] + box[2:]) / 2) / np.float32(crop.size),
        }
        if instance.mask:
            where = f"{record.file_name}: annotation {instance.annotation_id}"
            rle = {"size": [record.height, record.width], "counts": instance.mask}
            mask = decode_mask(rle, record.height, record.width, where)
            for name, sample in (("scribble", sample_scribble), ("mask", mask_points)):
                if name in used:
                    coordinates[name] = np.float32(crop.points(sample(mask, rng))) / np.float32(crop.size)
            _paint(grounding["maps"], mask, rows, columns, slot)
            pixels = np.argwhere(grounding["maps"] >> np.uint32(slot) & 1) if point == "mask" else ()
            if len(pixels):
                coordinates["point"] = np.float32(pixels[rng.integers(len(pixels)), ::-1]) / np.float32(map_size)
        fill_slot(grounding, slot, coordinates, used)
    set_has_map(grounding)
    return grounding


def _paint(
    maps: UInt32[np.ndarray, "S S"],
    mask: np.ndarray,
    rows: Int[np.ndarray, " S"],
    columns: Int[np.ndarray, " S"],
    slot: int,
) -> None:
    """Sets bit `slot` of the maps inside the mask. Reads only the mask's box."""
    box = box_from_mask(mask)
    if box is None:
        return
    x0, y0, x1, y1 = box.astype(int)
    across = np.flatnonzero((columns >= x0) & (columns < x1))
    down = np.flatnonzero((rows >= y0) & (rows < y1))
    if len(across) and len(down):
        # Decoded masks are column-major in memory, so columns are indexed first.
        part = mask.T[columns[across]][:, rows[down]].T
        maps[down[0] : down[-1] + 1, across[0] : across[-1] + 1] |= part.astype(np.uint32) << np.uint32(slot)


def write_caption(record: Record, categories: Sequence[str], config: DataConfig, rng: np.random.Generator) -> str:
    """The training caption. For detection data it starts with counted categories: "2 dog, 1 cat. a caption".

    Args:
        record: one of its captions is drawn.
        categories: names of the chosen instances, largest first.
        config: `keep_caption`, `count_categories`.
        rng: random generator.

    Returns:
        The caption; "" if it is dropped or there is none.
    """
    kept = rng.random() < config.keep_caption
    caption = record.captions[rng.integers(len(record.captions))] if record.captions else ""
    if not kept:
        return ""
    if record.detection and config.count_categories and categories:
        counted = count_names(categories)
        return f"{counted}. {caption}" if caption else counted
    return caption


def choose_phrases(
    instances: Sequence[AnnotatedInstance], config: DataConfig, rng: np.random.Generator
) -> Int[np.ndarray, "30"]:
    """Each slot's phrase as its number in phrases.json: the category or its own caption; -1 for empty slots."""
    numbers = np.full(MAX_INSTANCES, -1, np.int64)
    draws = rng.random(MAX_INSTANCES)
    for slot, instance in enumerate(instances):
        own = instance.caption_phrase >= 0 and draws[slot] < config.instance_caption
        numbers[slot] = instance.caption_phrase if own else instance.phrase
    return numbers
