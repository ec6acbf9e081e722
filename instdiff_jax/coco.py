"""COCO annotation files: the one reader of them, for layouts, training data and evaluation.

A file is read and indexed once. Errors of the file as a whole, such as ids that are not numbers, are raised at once.
Images and annotations are checked when they are read: a caller that builds a dataset catches the error and reports it;
others let it through.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import read_integer, read_text, read_xywh

# The largest side of a JPEG file.
MAX_IMAGE_SIDE = 65_535


class SplitFiles(NamedTuple):
    """Where a split of a COCO folder is. The files need not exist."""

    instances: Path
    captions: Path
    images: Path


def split_files(coco_dir: Path, name: str) -> SplitFiles:
    """The files of a split: annotations/instances_NAME.json, annotations/captions_NAME.json, NAME/ or images/NAME/."""
    notes, folders = coco_dir / "annotations", (coco_dir / name, coco_dir / "images" / name)
    images = next((folder for folder in folders if folder.is_dir()), folders[0])
    return SplitFiles(notes / f"instances_{name}.json", notes / f"captions_{name}.json", images)


def count_names(names: Iterable[str]) -> str:
    """What an image holds, as a caption: "2 dog, 1 cat"."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """An image of the file; `file_name` is None where the file has none, and sides are in pixels."""

    id: int
    width: int
    height: int
    file_name: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class CocoAnnotation:
    """An annotation of a known category.

    Attributes:
        where: the file and the row in it, for error messages.
        values: the file's object.
        category: name of its category.
    """

    where: str
    values: Mapping[str, Any]
    category: str

    @property
    def number(self) -> int:
        """Its id; -1 where it has none."""
        return self.values["id"] if type(self.values.get("id")) is int else -1

    @property
    def is_crowd(self) -> bool:
        return bool(self.values.get("iscrowd"))

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x, y, width, height in pixels; InputError for anything else."""
        return read_xywh(self.values.get("bbox"), f"{self.where}.bbox")

    @property
    def caption(self) -> str:
        """Its own caption; its category without one. InputError for what is not text."""
        own = self.values.get("caption")
        if own is None or isinstance(own, str) and not own.strip():
            return self.category
        return read_text(own, f"{self.where}.caption")


class Unused(NamedTuple):
    """A row that cannot be used: its kind (image, annotation or caption), its name and the reason."""

    kind: str
    name: str
    reason: str


class Coco:
    """A COCO annotation file and perhaps its captions, indexed.

    Attributes:
        path: of the annotation file.
        categories: id to name.
        captions: image id to captions, in one line each.
        unused: images with the id of another, annotations and captions of no image, and captions without text.
    """

    def __init__(self, path: str | Path, captions_file: str | Path | None = None):
        """Reads the files.

        Raises:
            InputError: for files that cannot be read or are not COCO annotations.
        """
        self.path, self.captions_file = Path(path), captions_file
        data = read_json(path)
        self.unused: list[Unused] = []
        self._images: dict[int, tuple[str, Mapping]] = {}
        for i, row in enumerate(_table(data, "images", path)):
            where = f"images[{i}]"
            image_id = read_integer(row.get("id"), f"{path}: {where}.id", 0, 2**63 - 1)
            if image_id in self._images:
                reason = f"{where}: another image has the id {image_id}"
                self.unused.append(Unused("image", str(row.get("file_name")), reason))
            else:
                self._images[image_id] = (where, row)
        self.categories = _read_categories(_table(data, "categories", path), path)
        self._annotations: dict[int, list[tuple[str, Mapping]]] = {image_id: [] for image_id in self._images}
        for i, row in enumerate(_table(data, "annotations", path)):
            where, image_id = f"annotations[{i}]", row.get("image_id")
            if type(image_id) is int and image_id in self._images:
                self._annotations[image_id].append((where, row))
            else:
                reason = f"{where}.image_id: no image has the id {short(image_id)}"
                self.unused.append(Unused("annotation", f"annotation {short(row.get('id'))}", reason))
        self.captions = {} if captions_file is None else self._read_captions(captions_file)

    @property
    def image_ids(self) -> list[int]:
        """The images' ids, in the file's order."""
        return list(self._images)

    def image(self, image_id: int) -> CocoImage:
        """An image.

        Raises:
            InputError: if there is no such image, or its size or file name is not valid.
        """
        place, row = self._find(image_id)
        where = f"{self.path}: {place}"
        width, height = (
            read_integer(row.get(side), f"{where}.{side}", 1, MAX_IMAGE_SIDE, "whole pixels")
            for side in ("width", "height")
        )
        file_name = row.get("file_name")
        if file_name is not None and not isinstance(file_name, str):
            raise InputError(f"{where}.file_name: expected text, got {short(file_name)}")
        return CocoImage(image_id, width, height, file_name)

    def annotations(self, image_id: int) -> list[CocoAnnotation]:
        """An image's annotations, in the file's order.

        Raises:
            InputError: if there is no such image, or an annotation's category does not exist.
        """
        self._find(image_id)
        annotations = []
        for place, row in self._annotations[image_id]:
            where, category_id = f"{self.path}: {place}", row.get("category_id")
            if type(category_id) is not int or category_id not in self.categories:
                raise InputError(f"{where}.category_id: no category has the id {short(category_id)}")
            annotations.append(CocoAnnotation(where, row, self.categories[category_id]))
        return annotations

    def caption(self, image_id: int) -> str:
        """An image's first caption; InputError if it has none."""
        self._find(image_id)
        if image_id not in self.captions:
            raise InputError(f"{self.captions_file}: annotations: no caption for image {image_id}")
        return self.captions[image_id][0]

    def file_name(self, image_id: int) -> str:
        """An image's file name as text, whatever the file has; for reports."""
        return str(self._find(image_id)[1].get("file_name"))

    def _find(self, image_id: int) -> tuple[str, Mapping]:
        if image_id not in self._images:
            raise InputError(f"{self.path}: images: no image has the id {short(image_id)}")
        return self._images[image_id]

    def _read_captions(self, path: str | Path) -> dict[int, list[str]]:
        captions: dict[int, list[str]] = {}
        for i, row in enumerate(_table(read_json(path), "annotations", path)):
            text, image_id = row.get("caption"), row.get("image_id")
            if type(image_id) is int and image_id in self._images and isinstance(text, str) and text.strip():
                captions.setdefault(image_id, []).append(" ".join(text.split()))
            else:
                reason = f"annotations[{i}]: empty, or of no image"
                self.unused.append(Unused("caption", f"caption {short(row.get('id'))}", reason))
        return captions


def _table(data: Any, key: str, path: str | Path) -> list[Mapping[str, Any]]:
    rows = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(rows, list) or not all(isinstance(row, Mapping) for row in rows):
        raise InputError(f"{path}: {key}: expected a list of objects, as in a COCO annotation file")
    return rows


def _read_categories(rows: list[Mapping[str, Any]], path: str | Path) -> dict[int, str]:
    names: dict[int, str] = {}
    for i, row in enumerate(rows):
        where, number, name = f"{path}: categories[{i}]", row.get("id"), row.get("name")
        if type(number) is not int or not isinstance(name, str) or not name.strip():
            raise InputError(f"{where}: expected a whole number id and a name, got {short(dict(row))}")
        if number in names:
            raise InputError(f"{where}.id: another category has the id {number}")
        names[number] = name
    return names
