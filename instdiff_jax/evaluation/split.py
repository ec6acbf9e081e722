"""The ground truth: a split of a COCO folder, every image and annotation on the canvas that pictures are made on."""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, UInt8
from pycocotools import mask as coco_mask

from instdiff_jax.data.images import Crop, load_image
from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.masks import decode_mask, encode_mask
from instdiff_jax.geometry.points import SCRIBBLE_POINTS, order_by_origin, sample_scribble
from instdiff_jax.layout import MAX_INSTANCES, MAX_SIDE, read_json

# Side of the canvas in pixels where the split's images do not say one themselves: the released model's.
DEFAULT_SIZE = 512
# The points that layouts give are drawn with this and the image's id: the same for every --seed.
_POINTS_SEED = 2402
_ATTRIBUTES_SEED = 3290
# What attribute binding is measured with (paper, section 4): an instance's caption is one of these and its category.
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
        asked: False for a crowd, what is too small, and what goes beyond 30: measures ignore it, as COCO's a crowd.
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
    """One image of a split: what a picture of it should show.

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
        """The real image on the canvas; InputError where its file is missing, broken or of another size."""
        try:
            image = load_image(self.file.read_bytes())
        except OSError as error:
            raise InputError(f"{self.file}: the image cannot be read: {error.strerror or error}") from error
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
) -> Split:
    """Reads annotations/instances_NAME.json and, where it exists, annotations/captions_NAME.json.

    Args:
        coco_dir: the COCO folder.
        name: of the split; its images lie in NAME/ or images/NAME/.
        size: side of the square canvas in pixels, onto which images are resized and cropped as in training. None: the
            images' own side where all are squares of one size, else 512.
        count: take the first so many scenes.
        min_area: share of the canvas that an instance's box must cover to be asked for (as in training).
        attributes: a kind of ATTRIBUTES: every instance gets one of its values, drawn by the image's id, in place of
            the attributes and the caption that its annotation may have.

    Raises:
        InputError: for files that are no COCO annotations, broken annotations, and no scenes.
    """
    coco_dir = Path(coco_dir)
    path = coco_dir / "annotations" / f"instances_{name}.json"
    data = read_json(path)
    images, annotations = _rows(data, "images", path), _rows(data, "annotations", path)
    if not images:
        raise InputError(f"{path}: images: empty, expected at least one")
    for i, image in enumerate(images):
        _check_image(image, f"{path}: images[{i}]")
    ids = [image["id"] for image in images]
    if len(set(ids)) < len(ids):
        raise InputError(f"{path}: images: two have the id {Counter(ids).most_common(1)[0][0]}")
    categories = _categories(_rows(data, "categories", path), path)
    of_image: dict[int, list[tuple[str, dict]]] = {image_id: [] for image_id in ids}
    for i, row in enumerate(annotations):
        where = f"{path}: annotations[{i}]"
        category_id = row.get("category_id")
        if type(category_id) is not int or category_id not in categories:
            raise InputError(f"{where}.category_id: no category has the id {short(category_id)}")
        if type(row.get("image_id")) is not int or row["image_id"] not in of_image:
            raise InputError(f"{where}.image_id: no image has the id {short(row.get('image_id'))}")
        of_image[row["image_id"]].append((where, row))
    if size is None:
        sides = {side for image in images for side in (image["width"], image["height"])}
        size = sides.pop() if len(sides) == 1 else DEFAULT_SIZE
    captions, caption_file = {}, coco_dir / "annotations" / f"captions_{name}.json"
    if caption_file.exists():
        for row in _rows(read_json(caption_file), "annotations", caption_file):
            if isinstance(row.get("caption"), str) and row["caption"].strip():
                captions.setdefault(row.get("image_id"), " ".join(row["caption"].split()))
    folders = [coco_dir / name, coco_dir / "images" / name]
    folder = next((folder for folder in folders if folder.is_dir()), folders[0])

    scenes, left_out = [], 0
    for image in images:
        if len(scenes) == count:
            break
        targets = _targets(image, of_image[image["id"]], categories, size, min_area)
        if attributes is not None:
            targets = _with_attributes(targets, attributes, image["id"])
        labels = [target.category for target in targets if target.asked]
        if not labels:
            left_out += 1
            continue
        counted = ", ".join(f"{number} {label}" for label, number in Counter(labels).items())
        width, height = image["width"], image["height"]
        caption = captions.get(image["id"], counted)
        scenes.append(Scene(image["id"], folder / image["file_name"], width, height, size, caption, targets))
    if not scenes:
        raise InputError(f"{path}: expected an image with an instance of {min_area:.0%} of the canvas, found none")
    digest = hashlib.sha256(path.read_bytes())
    if caption_file.exists():
        digest.update(caption_file.read_bytes())
    if attributes is not None:
        digest.update(attributes.encode())
    return Split(tuple(scenes), categories, frozenset(ids), size, digest.hexdigest()[:32], folder, left_out)


def _targets(
    image: Mapping[str, Any],
    annotations: Sequence[tuple[str, Mapping[str, Any]]],
    categories: Mapping[int, str],
    size: int,
    min_area: float,
) -> tuple[Target, ...]:
    """An image's instances on the canvas, in the file's order; those of which nothing is left are left out."""
    width, height = image["width"], image["height"]
    crop = Crop(width, height, size)
    rows, columns = crop.grid(size)
    boxes = [_box(row.get("bbox"), f"{where}.bbox") for where, row in annotations]
    corners, areas = crop.boxes(np.array(boxes, np.float64))
    crowd = np.array([bool(row.get("iscrowd")) for _, row in annotations], bool)
    able = ~crowd & (areas > 0) & (areas >= min_area * size * size)
    largest = [i for i in np.argsort(-areas, kind="stable") if able[i]][:MAX_INSTANCES]
    targets = []
    for i, (where, row) in enumerate(annotations):
        if areas[i] <= 0:
            continue
        mask = None
        if row.get("segmentation"):
            mask = decode_mask(row["segmentation"], height, width, f"{where}.segmentation")[np.ix_(rows, columns)]
        has_mask = mask is not None and mask.any()
        place = mask if has_mask else _filled(corners[i], size)
        rng = np.random.default_rng([_POINTS_SEED, image["id"], i])
        ys, xs = np.nonzero(place)
        k = rng.integers(len(xs))
        category = categories[row["category_id"]]
        caption = row.get("caption")
        attributes = row.get("attributes") if isinstance(row.get("attributes"), Mapping) else {}
        targets.append(
            Target(
                category=category,
                caption=caption if isinstance(caption, str) and caption.strip() else category,
                box=tuple(float(edge) for edge in corners[i]),
                rle=encode_mask(mask) if has_mask else None,
                point=(float(xs[k]), float(ys[k])),
                scribble=order_by_origin(sample_scribble(place, rng)).astype(np.float64),
                attributes={key: value for key, value in attributes.items() if isinstance(value, str)},
                asked=i in largest,
            )
        )
    assert all(target.scribble.shape == (SCRIBBLE_POINTS, 2) for target in targets)
    return tuple(targets)


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


def _box(box: Any, where: str) -> list[float]:
    is_box = isinstance(box, list) and len(box) == 4 and all(type(v) in (int, float) and abs(v) < 1e9 for v in box)
    if not is_box or min(box[2:]) < 0:
        raise InputError(f"{where}: expected [x, y, width, height] in pixels, got {short(box)}")
    return box


def _check_image(image: Mapping[str, Any], where: str) -> None:
    if type(image.get("id")) is not int or image["id"] < 0:
        raise InputError(f"{where}.id: expected a whole number that is not negative, got {short(image.get('id'))}")
    for side in ("width", "height"):
        if type(image.get(side)) is not int or not 1 <= image[side] <= MAX_SIDE:
            raise InputError(
                f"{where}.{side}: expected whole pixels from 1 to {MAX_SIDE}, got {short(image.get(side))}"
            )
    if not isinstance(image.get("file_name"), str):
        raise InputError(f"{where}.file_name: expected text, got {short(image.get('file_name'))}")


def _categories(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[int, str]:
    for i, row in enumerate(rows):
        if type(row.get("id")) is not int or not isinstance(row.get("name"), str) or not row["name"].strip():
            raise InputError(f"{path}: categories[{i}]: expected a whole number id and a name, got {short(row)}")
    names = {row["id"]: row["name"] for row in rows}
    if len(set(names.values())) < len(rows):
        raise InputError(f"{path}: categories: expected ids and names that differ")
    return names


def _rows(data: Any, key: str, path: Path) -> list[dict[str, Any]]:
    rows = data.get(key) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: {key}: expected a list of objects, as in a COCO annotation file")
    return rows


def crop_box(image: UInt8[np.ndarray, "H W 3"], box: Sequence[float]) -> UInt8[np.ndarray, "h w 3"]:
    """The pixels that a box (x0, y0, x1, y1) touches, at least one."""
    x0, y0 = (min(max(math.floor(edge), 0), side - 1) for edge, side in zip(box[:2], image.shape[1::-1]))
    return image[y0 : max(math.ceil(box[3]), y0 + 1), x0 : max(math.ceil(box[2]), x0 + 1)]
