"""Layouts: a caption, a canvas and instances, read from the official JSON or from COCO and checked once, here."""

import dataclasses
import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import numpy as np
from jaxtyping import Float

from instdiff_jax.coco import Coco, count_names
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json, write_text
from instdiff_jax.geometry.checks import (
    MAX_SIDE,
    NORMALISED,
    are_normalised,
    describe,
    pair_up,
    read_box,
    read_integer,
    read_mask,
    read_point,
    read_scribble,
    read_text,
    read_xywh,
)
from instdiff_jax.geometry.masks import RLE, CompactMask
from instdiff_jax.other_tools import to_official

_logger = logging.getLogger(__name__)

MAX_INSTANCES = 30

WhenTooMany = Literal["error", "largest"]


@dataclasses.dataclass(frozen=True, eq=False)
class Instance:
    """A caption and its location in one or more formats; all coordinates are pixels of the canvas.

    Attributes:
        caption: the phrase that describes the instance.
        box: x0, y0, x1, y1.
        point: x, y.
        scribble: points along a path, at least two.
        mask: the pixels of the canvas that the instance covers. A layout keeps masks as run lengths.
        category_name: a label that is kept and not used.
    """

    caption: str
    box: tuple[float, float, float, float] | None = None
    point: tuple[float, float] | None = None
    scribble: Float[np.ndarray, "n 2"] | None = None
    mask: CompactMask = CompactMask()  # of type Bool[np.ndarray, "H W"] | None
    category_name: str = ""

    @property
    def rle(self) -> RLE | None:
        """The mask as run lengths, without decoding it where a layout holds the instance."""
        mask = vars(self)["mask"]
        return mask if mask is None or isinstance(mask, RLE) else RLE.from_mask(mask)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Instance):
            return NotImplemented
        pairs = [(getattr(self, field.name), getattr(other, field.name)) for field in dataclasses.fields(self)]
        return all((a is None) == (b is None) and (a is None or np.array_equal(a, b)) for a, b in pairs)

    @property
    def area(self) -> float:
        """Area in pixels²: of the mask, else of the box, else of the scribble's extent; 0 for a point."""
        if (rle := self.rle) is not None:
            return float(rle.area)
        if self.box is not None:
            return (self.box[2] - self.box[0]) * (self.box[3] - self.box[1])
        return float(np.ptp(self.scribble, axis=0).prod()) if self.scribble is not None else 0.0


class _Names(NamedTuple):
    """How a source names the instances and two of their fields, for error messages."""

    instances: str = "instances"
    box: str = "box"
    mask: str = "mask"


_LAYOUT_KEYS = ("caption", "width", "height", "annos")
_PYTHON, _OFFICIAL, _COCO = _Names(), _Names("annos", "bbox"), _Names("annotations", "bbox", "segmentation")


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a user asks for: a caption, a canvas in pixels, and 1 to 30 instances.

    Boxes that stick out of the canvas are clipped to it. `name` labels outputs and does not count in comparisons.
    `negative_prompt` is what guidance leads away from; None leaves it to the sampling settings.

    Raises:
        InputError: on construction, naming the instance and field, for anything that is not valid: NaN, wrong types,
            locations outside the canvas, empty boxes and masks, masks of another size, no or too many instances.
    """

    caption: str
    width: int
    height: int
    instances: tuple[Instance, ...]
    name: str = dataclasses.field(default="layout", compare=False)
    negative_prompt: str | None = None

    def __post_init__(self):
        where = f"{self.name}: instances"
        width, height = _check_canvas(self.caption, self.width, self.height, self.name)
        if self.negative_prompt is not None:
            read_text(self.negative_prompt, f"{self.name}: negative_prompt", empty=True)
        if not isinstance(self.instances, (list, tuple)):
            raise InputError(f"{where}: expected a list of instances, got {short(self.instances)}")
        for i, instance in enumerate(self.instances):
            if not isinstance(instance, Instance):
                raise InputError(f"{where}[{i}]: expected an Instance, got {type(instance).__name__}")
        instances = [_checked(one, width, height, f"{where}[{i}]", _PYTHON) for i, one in enumerate(self.instances)]
        vars(self).update(width=width, height=height, instances=_limited(instances, "error", where))

    @classmethod
    def from_json(cls, path: str | Path, *, name: str | None = None, max_instances: WhenTooMany = "error") -> Self:
        """Reads a layout file in the official format; `name` is the file's stem by default. See `from_dict`.

        Raises:
            InputError: for a file that cannot be read, or is not a valid layout.
        """
        name = Path(path).stem if name is None else name
        return cls.from_dict(read_json(path), str(path), name=name, max_instances=max_instances)

    @classmethod
    def from_dict(
        cls,
        values: Mapping[str, Any],
        where: str = "layout",
        *,
        name: str = "layout",
        max_instances: WhenTooMany = "error",
    ) -> Self:
        """Builds a layout from the official JSON's object.

        `{"caption", "width", "height", "annos": [{"caption", "category_name", "bbox": [x, y, w, h], "mask": COCO RLE or
        polygons, "point": [x, y], "scribble": [x1, y1, x2, y2, ...] or pairs}]}`, all in pixels. A location may be
        missing, null or []; other keys are ignored, but for our own `negative_prompt`. An instance without a caption
        takes its category_name. An instance with no location but a box of no size off the canvas, as in one official
        demo, is left out with a warning. Objects of Ideogram, LabelMe and LayoutSAM are read too, see `other_tools`.

        Args:
            values: the object.
            where: the file, for error messages.
            name: label for outputs.
            max_instances: with more than 30 instances, raise an error or keep the largest.

        Raises:
            InputError: for an object that is not a valid layout.
        """
        if not isinstance(values, Mapping):
            raise InputError(f"{where}: expected an object, a layout, got {describe(values)}")
        values = to_official(values, where)
        _check_spelling(values, (*_LAYOUT_KEYS, "negative_prompt"), where)
        for key in _LAYOUT_KEYS:
            if key not in values:
                raise InputError(f"{where}: {key}: missing")
        caption, annos = values["caption"], values["annos"]
        width, height = _check_canvas(caption, values["width"], values["height"], where)
        if not isinstance(annos, (list, tuple)):
            raise InputError(f"{where}: annos: expected a list of instances, got {describe(annos)}")
        if are_normalised(anno.get("bbox") for anno in annos if isinstance(anno, Mapping)):
            _logger.warning("%s: annos[].bbox: %s", where, NORMALISED)
        found = [_read_instance(anno, width, height, f"{where}: annos[{i}]", _OFFICIAL) for i, anno in enumerate(annos)]
        negative = values.get("negative_prompt")
        if negative is not None:
            read_text(negative, f"{where}: negative_prompt", empty=True)
        return cls(caption, width, height, _limited(found, max_instances, f"{where}: annos"), name, negative)

    @classmethod
    def from_coco(
        cls,
        path: str | Path | Coco,
        image_id: int,
        captions_file: str | Path | None = None,
        *,
        name: str | None = None,
        max_instances: WhenTooMany = "error",
    ) -> Self:
        """Makes a layout of one image of a COCO annotation file; crowd regions are left out.

        An instance's caption is the annotation's `caption` if it has one, else its category's name. The global caption
        is the image's first one in the captions file; without that file it counts the categories ("2 dog, 1 cat").

        Args:
            path: the annotation file. For many images of a file pass one `Coco`, which reads it once.
            image_id: of the image.
            captions_file: COCO captions; of a `Coco`, its own.
            name: label for outputs; the image's id by default.
            max_instances: with more than 30 instances, raise an error or keep the largest.

        Raises:
            InputError: for files that cannot be read or do not have the image, or an invalid annotation.
        """
        coco = path if isinstance(path, Coco) else Coco(path, captions_file)
        annotations = [one for one in coco.annotations(image_id) if not one.is_crowd]
        if coco.captions_file is None:
            caption = count_names(one.category for one in annotations)
        else:
            caption = coco.caption(image_id)
        image = coco.image(image_id)
        where = f"{coco.path}: image {image_id}"
        width, height = _check_canvas(caption, image.width, image.height, where)
        found = []
        for one in annotations:
            given = {key: one.values.get(key) for key in ("bbox", "point", "scribble", "segmentation")}
            given |= {"caption": one.caption, "category_name": one.category}
            found.append(_read_instance(given, width, height, one.where, _COCO))
        instances = _limited(found, max_instances, f"{where}: annotations")
        return cls(caption, width, height, instances, str(image_id) if name is None else name)

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
            if (rle := instance.rle) is not None:
                anno["mask"] = rle.to_dict()
            annos.append(anno)
        values = {"caption": self.caption, "width": self.width, "height": self.height, "annos": annos}
        return values if self.negative_prompt is None else values | {"negative_prompt": self.negative_prompt}

    def to_json(self, path: str | Path | None = None) -> str:
        """The layout as the text of an official JSON file, also written to `path` if given.

        Raises:
            InputError: if the file cannot be written.
        """
        text = json.dumps(self.to_dict(), ensure_ascii=False)
        if path is not None:
            write_text(path, text + "\n")
        return text


def _check_spelling(values: Mapping, known: Sequence[str], where: str) -> None:
    """InputError for a key that is a known one but for case and spaces: it would be ignored, and with it a location."""
    for key in values:
        plain = key.strip().lower() if isinstance(key, str) else key
        if plain in known and plain not in values:
            raise InputError(f"{where}.{plain}: expected this key, got {short(key)}")


def _check_canvas(caption: Any, width: Any, height: Any, where: str) -> tuple[int, int]:
    read_text(caption, f"{where}: caption", empty=True)
    width = read_integer(width, f"{where}: width", 1, MAX_SIDE, "whole pixels")
    return width, read_integer(height, f"{where}: height", 1, MAX_SIDE, "whole pixels")


def _read_instance(values: Any, width: int, height: int, where: str, names: _Names) -> Instance | None:
    """One instance of a file, checked; None for one whose only location is a box without size off the canvas."""
    if not isinstance(values, Mapping):
        raise InputError(f"{where}: expected an object, got {describe(values)}")
    _check_spelling(values, (names.box, "point", "scribble", names.mask, "caption", "category_name"), where)
    given = {}
    for key in (names.box, "point", "scribble", names.mask):
        value = values.get(key)
        given[key] = None if isinstance(value, (list, tuple, Mapping)) and not len(value) else value
    box, point, scribble, mask = given.values()
    if box is not None:
        x, y, w, h = read_xywh(box, f"{where}.{names.box}")
        box = (x, y, x + w, y + h)
        if w == h == 0 and point is scribble is mask is None and (x >= width or y >= height):
            _logger.warning("%s: left out: its box has no size and is off the canvas", where)
            return None
    if mask is not None:
        mask = RLE.from_coco(mask, height, width, f"{where}.{names.mask}")
    scribble = pair_up(scribble, f"{where}.scribble")
    category = "" if values.get("category_name") is None else values["category_name"]
    caption = category if values.get("caption") is None else values["caption"]
    return _checked(Instance(caption, box, point, scribble, mask, category), width, height, where, names)


def _checked(instance: Instance, width: int, height: int, where: str, names: _Names) -> Instance:
    """The instance with plain types and its box clipped; InputError for a location that is not on the canvas."""
    caption = read_text(instance.caption, f"{where}.caption")
    category = read_text(instance.category_name, f"{where}.category_name", empty=True)
    box, point, scribble, mask = instance.box, instance.point, instance.scribble, vars(instance)["mask"]
    if box is None and point is None and scribble is None and mask is None:
        raise InputError(f"{where}: expected a location: a {names.box}, point, scribble or {names.mask}")
    if box is not None:
        box = read_box(box, width, height, f"{where}.{names.box}")
    if point is not None:
        point = read_point(point, width, height, f"{where}.point")
    if scribble is not None:
        scribble = read_scribble(scribble, width, height, f"{where}.scribble")
    if mask is not None:
        mask = read_mask(mask, width, height, f"{where}.{names.mask}")
    return Instance(caption, box, point, scribble, mask, category)


def _limited(found: Sequence[Instance | None], max_instances: str, where: str) -> tuple[Instance, ...]:
    """The instances without those left out: 1 to 30, in order."""
    instances = [instance for instance in found if instance is not None]
    if not instances:
        raise InputError(f"{where}: expected at least one instance with a location")
    if max_instances not in ("error", "largest"):
        raise InputError(f"{where}: max_instances: expected error or largest, got {short(max_instances)}")
    if len(instances) > MAX_INSTANCES:
        if max_instances == "error":
            raise InputError(f"{where}: expected at most {MAX_INSTANCES}, got {len(instances)}")
        largest = sorted(range(len(instances)), key=lambda i: -instances[i].area)[:MAX_INSTANCES]
        instances = [instances[i] for i in sorted(largest)]
    return tuple(instances)


def _plain(value: float) -> int | float:
    """Whole numbers as int, as the official files have them."""
    return int(value) if value == int(value) else float(value)
