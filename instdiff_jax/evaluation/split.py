"""The ground truth: a split of a COCO folder, with images and annotations on the canvas of the generated images."""

import dataclasses
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from pycocotools import mask as coco_mask

from instdiff_jax.coco import Coco, CocoAnnotation, CocoImage, count_names, split_files
from instdiff_jax.data.images import Crop
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.checks import MAX_SIDE
from instdiff_jax.geometry.masks import decode_mask, encode_mask
from instdiff_jax.geometry.points import sample_scribble
from instdiff_jax.images import open_image
from instdiff_jax.layout import MAX_INSTANCES
from instdiff_jax.paths import read_file

# Side of the canvas in pixels if the split's images have no common one: the released model's.
DEFAULT_SIZE = 512
# Random points of layouts depend on this and the image's id, so that they are the same for every --seed.
_POINTS_SEED = 2402
_ATTRIBUTES_SEED = 3290
# Attribute binding (paper, section 4): an instance's caption is one of these and its category.
ATTRIBUTES = {
    "colour": ("black", "white", "red", "green", "yellow", "blue", "pink", "purple"),
    "texture": ("rubber", "fluffy", "metallic", "wooden", "plastic", "fabric", "leather", "glass"),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """An instance of the ground truth; coordinates are pixels of the canvas.

    Attributes:
        category: name of its COCO category.
        caption: the annotation's own, else the category.
        box: x0, y0, x1, y1.
        rle: its mask as compressed RLE; None for an annotation without one.
        point: a random pixel of its mask (of its box without one), x and y.
        scribble: 20 random pixels, in order of their distance to (0, 0).
        attributes: kind to value, {"colour": "red"}.
        asked: False for crowds, small instances and those beyond 30: metrics ignore them, like COCO's crowds.
    """

    category: str
    caption: str
    box: tuple[float, float, float, float]
    rle: dict[str, Any] | None
    point: tuple[float, float]
    scribble: Float[np.ndarray, "20 2"]
    attributes: Mapping[str, str]
    asked: bool

    @property
    def mask(self) -> Bool[np.ndarray, "H W"] | None:
        return None if self.rle is None else coco_mask.decode(self.rle).astype(bool)

    @property
    def xywh(self) -> list[float]:
        x0, y0, x1, y1 = self.box
        return [x0, y0, x1 - x0, y1 - y0]


@dataclasses.dataclass(frozen=True, eq=False)
class Scene:
    """One image of a split: what a generated image should show.

    Attributes:
        image_id: COCO's.
        file: of the real image.
        width, height: of the real image in pixels.
        size: side of the canvas in pixels.
        caption: the image's first caption; without captions, its categories counted ("2 dog, 1 cat").
        targets: all instances; at least one is asked for.
    """

    image_id: int
    file: Path
    width: int
    height: int
    size: int
    caption: str
    targets: tuple[Target, ...]

    @property
    def asked(self) -> list[Target]:
        return [target for target in self.targets if target.asked]

    def real_image(self) -> UInt8[np.ndarray, "size size 3"]:
        """The real image on the canvas; InputError if its file is missing, broken or of another size."""
        try:
            image = open_image(read_file(self.file), (self.width, self.height))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{self.file}: {error}") from error
        if image.size != (self.width, self.height):
            found = f"{image.width}x{image.height}"
            raise InputError(f"{self.file}: expected {self.width}x{self.height} pixels as annotated, got {found}")
        return Crop(self.width, self.height, self.size).image(image)


@dataclasses.dataclass(frozen=True)
class Split:
    """The scenes to measure on.

    Attributes:
        scenes: in the file's order.
        categories: id to name.
        image_ids: of all images of the split.
        size: side of the canvas in pixels.
        fingerprint: of the annotation and caption files.
        folder: of the real images; it may be absent.
        left_out: images without an instance that can be asked for.
    """

    scenes: tuple[Scene, ...]
    categories: Mapping[int, str]
    image_ids: frozenset[int]
    size: int
    fingerprint: str
    folder: Path
    left_out: int


def read_split(
    coco_dir: str | Path,
    name: str,
    size: int | None = None,
    count: int | None = None,
    min_area: float = 0.01,
    attributes: str | None = None,
    outside: bool = False,
) -> Split:
    """Reads annotations/instances_NAME.json and, where it exists, annotations/captions_NAME.json.

    Args:
        coco_dir: the COCO folder.
        name: of the split; its images are in NAME/ or images/NAME/.
        size: side of the square canvas in pixels, to which images are resized and cropped as in training. None: the
            images' own side if all are squares of one size, else 512.
        count: take only the first scenes.
        min_area: share of the canvas that an instance's box must cover to be asked for (as in training).
        attributes: a key of ATTRIBUTES. Each instance gets one of its values, drawn by the image's id, which replaces
            the annotation's own attributes and caption.
        outside: images may be anywhere: a `file_name` may be absolute or lead out of its folder.

    Raises:
        InputError: for files that are not COCO annotations, broken annotations, or no scenes.
    """
    files = split_files(Path(coco_dir), name, outside)
    coco = Coco(files.instances, files.captions if files.captions.exists() else None)
    images = _read_images(coco)
    size = _canvas_side(images) if size is None else size
    scenes, left_out = [], 0
    for image in images:
        if len(scenes) == count:
            break
        targets = _targets(image, coco.annotations(image.id), size, min_area)
        if attributes is not None:
            targets = _with_attributes(targets, attributes, image.id)
        labels = [target.category for target in targets if target.asked]
        if not labels:
            left_out += 1
            continue
        caption = coco.captions.get(image.id, [count_names(labels)])[0]
        file = files.image(image.file_name, f"{coco.path}: image {image.id}: file_name")
        scenes.append(Scene(image.id, file, image.width, image.height, size, caption, targets))
    if not scenes:
        expected = f"expected an image with an instance of {min_area:.0%} of the canvas"
        raise InputError(f"{coco.path}: {expected}, found none")
    fingerprint = _fingerprint(coco, attributes)
    ids = frozenset(coco.image_ids)
    return Split(tuple(scenes), coco.categories, ids, size, fingerprint, files.images, left_out)


def _read_images(coco: Coco) -> list[CocoImage]:
    """All images of the file; InputError for what evaluation cannot use, anywhere in the file."""
    if not coco.image_ids:
        raise InputError(f"{coco.path}: images: empty, expected at least one")
    for item in coco.unused:
        if item.kind != "caption":
            raise InputError(f"{coco.path}: {item.reason}")
    if len(set(coco.categories.values())) < len(coco.categories):
        raise InputError(f"{coco.path}: categories: expected names that differ")
    images = [coco.image(image_id) for image_id in coco.image_ids]
    for image in images:
        for annotation in coco.annotations(image.id):
            annotation.category_id, annotation.is_crowd  # InputError for a bad one
        if image.file_name is None:
            raise InputError(f"{coco.path}: image {image.id}: file_name: expected text, got nothing")
    return images


def _canvas_side(images: Sequence[CocoImage]) -> int:
    """The images' own side if all are squares of one size, else 512."""
    sides = {side for image in images for side in (image.width, image.height)}
    return sides.pop() if len(sides) == 1 and max(sides) <= MAX_SIDE else DEFAULT_SIZE


def _fingerprint(coco: Coco, attributes: str | None) -> str:
    digest = hashlib.sha256(read_file(coco.path))
    if coco.captions_file is not None:
        digest.update(read_file(coco.captions_file))
    if attributes is not None:
        digest.update(attributes.encode())
    return digest.hexdigest()[:32]


def _targets(image: CocoImage, annotations: Sequence[CocoAnnotation], size: int, min_area: float) -> tuple[Target, ...]:
    """An image's instances on the canvas, in the file's order, without those outside the crop."""
    crop = Crop(image.width, image.height, size)
    corners, areas = crop.boxes(np.array([annotation.box for annotation in annotations], np.float64).reshape(-1, 4))
    crowd = np.array([annotation.is_crowd for annotation in annotations], bool)
    able = ~crowd & (areas > 0) & (areas >= min_area * size * size)
    largest = [i for i in np.argsort(-areas, kind="stable") if able[i]][:MAX_INSTANCES]
    return tuple(
        _target(image, annotation, crop, corners[i], i, i in largest)
        for i, annotation in enumerate(annotations)
        if areas[i] > 0
    )


def _target(
    image: CocoImage,
    annotation: CocoAnnotation,
    crop: Crop,
    corners: Float[np.ndarray, "4"],
    number: int,
    asked: bool,
) -> Target:
    """One instance on the canvas; `number` is its index in the image and seeds its random points."""
    mask, segmentation = None, annotation.values.get("segmentation")
    if segmentation:
        where = f"{annotation.where}.segmentation"
        mask = decode_mask(segmentation, image.height, image.width, where)[np.ix_(*crop.grid(crop.size))]
    has_mask = mask is not None and mask.any()
    place = mask if has_mask else _filled(corners, crop.size)
    rng = np.random.default_rng([_POINTS_SEED, image.id, number])
    ys, xs = np.nonzero(place)
    k = rng.integers(len(xs))
    attributes = annotation.values.get("attributes")
    attributes = attributes if isinstance(attributes, Mapping) else {}
    return Target(
        category=annotation.category,
        caption=annotation.caption,
        box=tuple(float(edge) for edge in corners),
        rle=encode_mask(mask) if has_mask else None,
        point=(float(xs[k]), float(ys[k])),
        scribble=sample_scribble(place, rng).astype(np.float64),
        attributes={key: value for key, value in attributes.items() if isinstance(value, str)},
        asked=asked,
    )


def _with_attributes(targets: Sequence[Target], kind: str, image_id: int) -> tuple[Target, ...]:
    chosen = np.random.default_rng([_ATTRIBUTES_SEED, image_id]).choice(ATTRIBUTES[kind], len(targets))
    return tuple(
        dataclasses.replace(target, caption=f"{value} {target.category}", attributes={kind: str(value)})
        for target, value in zip(targets, chosen, strict=True)
    )


def _filled(corners: Float[np.ndarray, "4"], size: int) -> Bool[np.ndarray, "size size"]:
    """A box as a mask: every pixel that it touches."""
    x0, y0, x1, y1 = corners
    mask = np.zeros((size, size), bool)
    mask[math.floor(y0) : math.ceil(y1), math.floor(x0) : math.ceil(x1)] = True
    return mask


def crop_box(image: UInt8[np.ndarray, "H W 3"], box: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels that a box (x0, y0, x1, y1) touches, at least one."""
    x0, y0 = (min(max(math.floor(edge), 0), side - 1) for edge, side in zip(box[:2], image.shape[1::-1]))
    return image[y0 : max(math.ceil(box[3]), y0 + 1), x0 : max(math.ceil(box[2]), x0 + 1)]
