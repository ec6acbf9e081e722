"""Layouts: a caption, a canvas and instances, read from the official JSON or from COCO and checked once, here."""

import dataclasses
import json
import logging
import numbers
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from jaxtyping import Bool, Float

from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.masks import decode_mask, encode_mask

_logger = logging.getLogger(__name__)

MAX_INSTANCES = 30
MAX_SIDE = 8192
_MAX_SCRIBBLE_POINTS = 10_000
# Boxes are kept to this fraction of a pixel: then x0 + (x1 - x0) is exact, and xywh files round-trip.
_BOX_GRID = 2.0**24

WhenTooMany = Literal["error", "largest"]


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """A caption and where it belongs, in one or more formats; all coordinates are pixels of the canvas.

    Attributes:
        caption: the phrase that describes the instance.
        box: x0, y0, x1, y1.
        point: x, y.
        scribble: points along a path, at least two.
        mask: which pixels of the canvas the instance covers.
        category_name: a label that is carried along and not used.
    """

    caption: str
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    scribble: Float[np.ndarray, "n 2"] | None = None
    mask: Bool[np.ndarray, "H W"] | None = None
    category_name: str = ""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Instance):
            return NotImplemented
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)]
        return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)

    @property
    def area(self) -> float:
        """Area in pixels²: of the mask, else the box, else the scribble's extent; a point has none."""
        if self.mask is not None:
            return float(self.mask.sum())
        if self.box is not None:
            return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])
        return float(np.ptp(self.scribble, axis=0).prod()) if self.scribble is not None else 0.0


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a user asks for: a caption, a canvas in pixels, and 1 to 30 instances.

    Boxes that stick out of the canvas are clipped to it. `name` labels outputs and does not count in comparisons.

    Raises:
        InputError: on construction, naming the instance and field, for anything that is not valid: NaN, wrong types,
            places outside the canvas, empty boxes and masks, masks of another size, no or too many instances.
    """

    caption: str
    width: int
    height: int
    instances: tuple[Instance, ...]
    name: str = dataclasses.field(default="layout", compare=False)
    max_instances: dataclasses.InitVar[WhenTooMany] = "error"
    where: dataclasses.InitVar[str | None] = None

    def __post_init__(self, max_instances: WhenTooMany, where: str | None):
        """`where` is the file, for messages in the words of its JSON; without it they use the words of this class."""
        source = self.name if where is None else where
        listed, box_key = ("instances", "box") if where is None else ("annos", "bbox")
        _text(self.caption, f"{source}: caption", empty=True)
        for side in ("width", "height"):
            value = getattr(self, side)
            if not _is_integer(value) or not 1 <= value <= MAX_SIDE:
                raise InputError(f"{source}: {side}: expected whole pixels from 1 to {MAX_SIDE}, got {short(value)}")
            object.__setattr__(self, side, int(value))
        if not isinstance(self.instances, (list, tuple)):
            raise InputError(f"{source}: {listed}: expected a list of instances, got {short(self.instances)}")
        instances = []
        for i, instance in enumerate(self.instances):
            start = f"{source}: {listed}[{i}]"
            if instance is None and where is not None:
                _logger.warning("%s: left out: its box has no size and lies off the canvas", start)
                continue
            if not isinstance(instance, Instance):
                raise InputError(f"{start}: expected an Instance, got {type(instance).__name__}")
            instances.append(_checked(instance, self.width, self.height, start, box_key))
        if not instances:
            raise InputError(f"{source}: {listed}: expected at least one instance with a location")
        if max_instances not in ("error", "largest"):
            raise InputError(f"{source}: max_instances: expected error or largest, got {short(max_instances)}")
        if len(instances) > MAX_INSTANCES:
            if max_instances == "error":
                raise InputError(f"{source}: {listed}: expected at most {MAX_INSTANCES}, got {len(instances)}")
            largest = sorted(range(len(instances)), key=lambda i: -instances[i].area)[:MAX_INSTANCES]
            instances = [instances[i] for i in sorted(largest)]
        object.__setattr__(self, "instances", tuple(instances))

    @classmethod
    def from_json(cls, path: str | Path, max_instances: WhenTooMany = "error") -> Self:
        """Reads a layout file in the official format; `name` becomes the file's stem.

        Raises:
            InputError: for a file that cannot be read, or is not a valid layout.
        """
        return cls.from_dict(read_json(path), str(path), Path(path).stem, max_instances)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        where: str = "layout",
        name: str = "layout",
        max_instances: WhenTooMany = "error",
    ) -> Self:
        """Builds a layout from the official JSON's object.

        `{"caption", "width", "height", "annos": [{"caption", "category_name", "bbox": [x, y, w, h], "mask": COCO RLE or
        polygons, "point": [x, y], "scribble": [x1, y1, x2, y2, ...] or pairs}]}`, all in pixels. A location that is
        missing, null or [] is absent; keys that are not listed here are ignored. An instance without a caption takes
        its category_name. An instance whose only location is a box of zero width and height off the canvas, as one
        official demo has it, is left out with a warning.

        Args:
            values: the object.
            where: the file, for error messages.
            name: label for outputs.
            max_instances: what to do with more than 30: an error, or keep the largest.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: expected an object with caption, width, height and annos, got {_kind(values)}")
        for key in ("caption", "width", "height", "annos"):
            if key not in values:
                raise InputError(f"{where}: {key}: missing")
        annos = values["annos"]
        if not isinstance(annos, (list, tuple)):
            raise InputError(f"{where}: annos: expected a list of instances, got {_kind(annos)}")
        size = values["height"], values["width"]
        instances = [_read_anno(anno, size, f"{where}: annos[{i}]") for i, anno in enumerate(annos)]
        return cls(values["caption"], values["width"], values["height"], tuple(instances), name, max_instances, where)

    @classmethod
    def from_coco(
        cls,
        annotation_file: str | Path,
        image_id: int,
        captions_file: str | Path | None = None,
        max_instances: WhenTooMany = "error",
    ) -> Self:
        """Makes a layout of one image of a COCO annotation file; crowd regions are left out.

        An instance's caption is the annotation's `caption` if it has one, else its category's name. The global caption
        is the image's first one in `captions_file`; without that file it counts the categories ("2 dog, 1 cat").

        Raises:
            InputError: for files that cannot be read or do not know the image, or an invalid annotation.
        """
        where = str(annotation_file)
        data = read_json(annotation_file)
        image = next((image for image in _records(data, "images", where) if image.get("id") == image_id), None)
        if image is None:
            raise InputError(f"{where}: images: no image has the id {short(image_id)}")
        names = {short(category.get("id")): category.get("name") for category in _records(data, "categories", where)}
        annos, labels, places = [], [], []
        for i, annotation in enumerate(_records(data, "annotations", where)):
            if annotation.get("image_id") != image_id or annotation.get("iscrowd"):
                continue
            category_id = short(annotation.get("category_id"))
            if category_id not in names:
                raise InputError(f"{where}: annotations[{i}].category_id: no category has the id {category_id}")
            category = names[category_id]
            anno = {key: annotation[key] for key in ("bbox", "point", "scribble") if key in annotation}
            caption = annotation.get("caption") or category
            annos.append(anno | {"caption": caption, "category_name": category, "mask": annotation.get("segmentation")})
            labels.append(str(category))
            places.append(i)
        caption = ", ".join(f"{count} {label}" for label, count in Counter(labels).items())
        if captions_file is not None:
            captions = _records(read_json(captions_file), "annotations", str(captions_file))
            caption = next((item.get("caption") for item in captions if item.get("image_id") == image_id), None)
            if caption is None:
                raise InputError(f"{captions_file}: annotations: no caption for image {short(image_id)}")
        values = {"caption": caption, "width": image.get("width"), "height": image.get("height"), "annos": annos}
        try:
            return cls.from_dict(values, f"{where}: image {image_id}", str(image_id), max_instances)
        except InputError as error:
            # The file has no list of this image alone.
            named = re.sub(r"\bannos\[(\d+)\]", lambda found: f"annotations[{places[int(found[1])]}]", str(error))
            raise InputError(named) from error

    def to_dict(self) -> dict[str, Any]:
        """The official JSON's object; `from_dict` gives an equal layout back."""
        annos = []
        for instance in self.instances:
            anno: dict[str, Any] = {"caption": instance.caption, "category_name": instance.category_name}
            if instance.box is not None:
                x0, y0, x1, y1 = instance.box
                anno["bbox"] = [_plain(value) for value in (x0, y0, x1 - x0, y1 - y0)]
            if instance.point is not None:
                anno["point"] = [_plain(value) for value in instance.point]
            if instance.scribble is not None:
                anno["scribble"] = [_plain(value) for value in instance.scribble.ravel().tolist()]
            if instance.mask is not None:
                anno["mask"] = encode_mask(instance.mask)
            annos.append(anno)
        return {"caption": self.caption, "width": self.width, "height": self.height, "annos": annos}

    def to_json(self) -> str:
        """The layout as the text of an official JSON file."""
        return json.dumps(self.to_dict(), ensure_ascii=False)


def read_json(path: str | Path) -> Any:
    """Parses a JSON file; InputError in one line where it cannot be read."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from error


def _read_anno(anno: Any, size: tuple[Any, Any], start: str) -> Instance | None:
    """One entry of annos in pixels, not yet checked against the canvas; None for an instance that is nowhere."""
    if not isinstance(anno, Mapping):
        raise InputError(f"{start}: expected an object, got {_kind(anno)}")
    given = {}
    for key in ("bbox", "point", "scribble", "mask"):
        value = anno.get(key)
        given[key] = None if isinstance(value, (list, tuple)) and not len(value) else value
    category = anno.get("category_name")
    category = "" if category is None else category
    caption = anno.get("caption")
    box, scribble, mask = given["bbox"], given["scribble"], given["mask"]
    has_size = all(_is_integer(side) and 1 <= side <= MAX_SIDE for side in size)
    if box is not None:
        x, y, w, h = _numbers(box, 4, f"{start}.bbox", "[x, y, width, height]")
        if w < 0 or h < 0:
            raise InputError(f"{start}.bbox: expected a width and height that are not negative, got {short(box)}")
        alone = all(given[key] is None for key in ("point", "scribble", "mask"))
        if w == h == 0 and alone and has_size and (x >= size[1] or y >= size[0]):
            return None
        box = (x, y, x + w, y + h)
    if isinstance(scribble, (list, tuple)) and not isinstance(scribble[0], (list, tuple)):
        flat = _numbers(scribble, None, f"{start}.scribble", "[x1, y1, x2, y2, ...]")
        if len(flat) % 2:
            raise InputError(f"{start}.scribble: expected pairs of x and y, got {len(flat)} numbers")
        scribble = [flat[k : k + 2] for k in range(0, len(flat), 2)]
    if mask is not None and has_size:
        mask = decode_mask(mask, *size, f"{start}.mask")
    return Instance(category if caption is None else caption, box, given["point"], scribble, mask, category)


def _checked(instance: Instance, width: int, height: int, start: str, box_key: str) -> Instance:
    """The instance with plain types and its box clipped; InputError for what the canvas cannot hold."""
    _text(instance.caption, f"{start}.caption")
    _text(instance.category_name, f"{start}.category_name", empty=True)
    box, point, scribble, mask = instance.box, instance.point, instance.scribble, instance.mask
    if box is None and point is None and scribble is None and mask is None:
        raise InputError(f"{start}: expected a location: a {box_key}, point, scribble or mask")
    if box is not None:
        where = f"{start}.{box_key}"
        x0, y0, x1, y1 = _numbers(box, 4, where, "[x0, y0, x1, y1]")
        if x1 < x0 or y1 < y0:
            raise InputError(f"{where}: expected x0 <= x1 and y0 <= y1, got {short(box)}")
        limits = (width, height, width, height)
        edges = (round(edge * _BOX_GRID) / _BOX_GRID for edge in (x0, y0, x1, y1))
        box = tuple(min(max(edge, 0.0), float(limit)) for edge, limit in zip(edges, limits))
        if box[0] >= box[2] or box[1] >= box[3]:
            raise InputError(f"{where}: expected some area on the canvas of {width}x{height} pixels, got none")
    if point is not None:
        point = tuple(_numbers(point, 2, f"{start}.point", "[x, y]"))
        _on_canvas([point], width, height, f"{start}.point")
    if scribble is not None:
        scribble = _checked_scribble(scribble, width, height, f"{start}.scribble")
    if mask is not None:
        mask = _checked_mask(mask, width, height, f"{start}.mask")
    return Instance(instance.caption, box, point, scribble, mask, instance.category_name)


def _checked_scribble(scribble: Any, width: int, height: int, where: str) -> Float[np.ndarray, "n 2"]:
    if not _is_list(scribble):
        raise InputError(f"{where}: expected a list of points, got {_kind(scribble)}")
    if not 2 <= len(scribble) <= _MAX_SCRIBBLE_POINTS:
        raise InputError(f"{where}: expected 2 to {_MAX_SCRIBBLE_POINTS} points, got {len(scribble)}")
    pairs = [_numbers(pair, 2, f"{where}[{k}]", "[x, y]") for k, pair in enumerate(scribble)]
    _on_canvas(pairs, width, height, where)
    return np.array(pairs, np.float64)


def _checked_mask(mask: Any, width: int, height: int, where: str) -> Bool[np.ndarray, "H W"]:
    if not isinstance(mask, np.ndarray) or mask.dtype.kind not in "biu":
        raise InputError(f"{where}: expected an array of booleans, got {_kind(mask)}")
    if mask.shape != (height, width):
        raise InputError(f"{where}: expected the canvas' shape [{height}, {width}], got {list(mask.shape)}")
    if mask.dtype != bool and not ((mask == 0) | (mask == 1)).all():
        raise InputError(f"{where}: expected values 0 and 1")
    if not mask.any():
        raise InputError(f"{where}: expected at least one pixel, the mask is empty")
    return mask.astype(bool)


def _numbers(values: Any, count: int | None, where: str, expected: str) -> list[float]:
    """Finite floats from a list, tuple or array of numbers; booleans are not numbers."""
    if not _is_list(values) or count is not None and len(values) != count:
        raise InputError(f"{where}: expected {expected}, got {short(values)}")
    for value in values:
        # The comparison also refuses NaN, infinities and integers too large for a float.
        if not isinstance(value, numbers.Real) or isinstance(value, bool) or not -1e9 <= value <= 1e9:
            raise InputError(f"{where}: expected {expected}, finite numbers, got {short(value)}")
    return [float(value) for value in values]


def _on_canvas(points: Sequence[Sequence[float]], width: int, height: int, where: str) -> None:
    for x, y in points:
        if not (0 <= x <= width and 0 <= y <= height):
            raise InputError(f"{where}: expected points on the canvas of {width}x{height} pixels, got [{x:g}, {y:g}]")


def _text(value: Any, where: str, empty: bool = False) -> None:
    if not isinstance(value, str):
        raise InputError(f"{where}: expected text, got {_kind(value)}")
    if not empty and not value.strip():
        raise InputError(f"{where}: expected text that is not empty")
    if any(0xD800 <= ord(letter) <= 0xDFFF for letter in value):
        raise InputError(f"{where}: expected valid Unicode, got half a surrogate pair")


def _records(data: Any, key: str, where: str) -> list[Mapping]:
    """A list of objects of a COCO file."""
    records = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(records, list) or not all(isinstance(record, Mapping) for record in records):
        raise InputError(f"{where}: {key}: expected a list of objects, as in a COCO annotation file")
    return records


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or isinstance(value, np.ndarray) and value.ndim > 0


def _is_integer(value: Any) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def _plain(value: float) -> int | float:
    """Whole numbers as int, which is how the official files write them."""
    return int(value) if value == int(value) else float(value)


def _kind(value: Any) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {short(value)}"
