"""COCO annotation files: the one reader of them, for layouts, training data and evaluation.

A file is read and indexed once. Errors of the file as a whole, such as one id for two images, are raised at once.
Rows that no one can use are left out and listed. Images and annotations are checked when they are read: a caller that
builds a dataset catches the error and reports it; others let it through.
"""

import contextlib
import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import (
    NORMALISED,
    are_normalised,
    plain_integer,
    read_flag,
    read_integer,
    read_text,
    read_xywh,
)
from instdiff_jax.paths import inside

_logger = logging.getLogger(__name__)

# The largest side of a JPEG file.
MAX_IMAGE_SIDE = 65_535


class SplitFiles(NamedTuple):
    """Where a split of a COCO folder is. The files need not exist.

    Attributes:
        instances, captions: the annotation files.
        images: the folder of the images.
        outside: whether a `file_name` may lead out of that folder.
    """

    instances: Path
    captions: Path
    images: Path
    outside: bool = False

    def image(self, file_name: str, where: str = "") -> Path:
        """The path of an image; InputError, which names the field `where`, if it leads out and may not."""
        return self.images / file_name if self.outside else inside(self.images, file_name, where)


def split_files(coco_dir: Path, name: str, outside: bool = False) -> SplitFiles:
    """The files of a split: annotations/instances_NAME.json, annotations/captions_NAME.json, NAME/ or images/NAME/."""
    notes, folders = coco_dir / "annotations", (coco_dir / name, coco_dir / "images" / name)
    images = next((folder for folder in folders if folder.is_dir()), folders[0])
    return SplitFiles(notes / f"instances_{name}.json", notes / f"captions_{name}.json", images, outside)


def count_names(names: Iterable[str]) -> str:
    """What an image holds, as a caption: "2 dog, 1 cat"."""
    return ", ".join(f"{count} {name}" for name, count in Counter(names).items())


@dataclasses.dataclass(frozen=True)
class CocoImage:
    """An image of the file; sides are in pixels, `file_name` is None where there is no `coco_url` either."""

    id: int
    width: int
    height: int
    file_name: str | None


@dataclasses.dataclass(frozen=True, eq=False)
class CocoAnnotation:
    """An annotation. Its fields are checked when they are asked for: InputError for one that is not valid.

    Attributes:
        where: the file and the row in it, for error messages.
        values: the file's object.
        categories: id to name, of the whole file.
    """

    where: str
    values: Mapping[str, Any]
    categories: Mapping[int, str]

    @property
    def number(self) -> int:
        """Its id; -1 where it has none."""
        number = plain_integer(self.values.get("id"))
        return -1 if number is None else number

    @property
    def category_id(self) -> int:
        number = plain_integer(self.values.get("category_id"))
        if number is None or number not in self.categories:
            given = short(self.values.get("category_id"))
            raise InputError(f"{self.where}.category_id: no category has the id {given}")
        return number

    @property
    def category(self) -> str:
        """Name of its category."""
        return self.categories[self.category_id]

    @property
    def is_crowd(self) -> bool:
        return read_flag(self.values.get("iscrowd"), f"{self.where}.iscrowd")

    @property
    def box(self) -> tuple[float, float, float, float]:
        """x, y, width, height in pixels."""
        return read_xywh(self.values.get("bbox"), f"{self.where}.bbox")

    @property
    def caption(self) -> str:
        """Its own caption; its category without one."""
        return self.own_caption or self.category

    @property
    def own_caption(self) -> str:
        """Its own caption; "" without one."""
        own = self.values.get("caption")
        return "" if own is None else read_text(own, f"{self.where}.caption", empty=True).strip() and own


class Unused(NamedTuple):
    """A row that cannot be used: its kind (image, category, annotation or caption), its name and the reason."""

    kind: str
    name: str
    reason: str


class Coco:
    """A COCO annotation file and perhaps its captions, indexed.

    Attributes:
        path: of the annotation file.
        categories: id to name.
        category_rows: id to the file's object.
        captions: image id to captions, in one line each.
        unused: rows that cannot be used, such as images without an id and annotations of no image.
        notes: what is used but may not be meant, such as numbers written as text; they are logged as well.
    """

    def __init__(self, path: str | Path, captions_file: str | Path | None = None):
        """Reads the files.

        Raises:
            InputError: for files that cannot be read or are not COCO annotations, two rows with one id, a category
                without a name, and files without one good image or category.
        """
        self.path, self.captions_file = Path(path), captions_file
        data = read_json(path)
        self.unused: list[Unused] = []
        self._notes: dict[str, tuple[str, int]] = {}
        images = self._by_id(data, "images", "image", "file_name")
        self._images = {number: (f"images[{i}]", row) for number, (i, row) in images.items()}
        self.category_rows: dict[int, Mapping] = {}
        self.categories = self._read_categories(data)
        self._annotations: dict[int, list[tuple[str, Mapping]]] = {image_id: [] for image_id in self._images}
        self._read_annotations(data)
        self.captions = {} if captions_file is None else self._read_captions(captions_file)
        self.notes = [f"{text}; {count} in all" for text, count in self._notes.values()]
        for note in self.notes:
            _logger.warning("%s: %s", path, note)

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
        if file_name is not None:
            read_text(file_name, f"{where}.file_name")
        elif isinstance(address := row.get("coco_url"), str):
            # LVIS names images so: http://images.cocodataset.org/train2017/000000391895.jpg.
            file_name = "/".join(address.split("/")[-2:])
        return CocoImage(image_id, width, height, file_name)

    def annotations(self, image_id: int) -> list[CocoAnnotation]:
        """An image's annotations, in the file's order; InputError if there is no such image."""
        self._find(image_id)
        rows = self._annotations[image_id]
        return [CocoAnnotation(f"{self.path}: {place}", row, self.categories) for place, row in rows]

    def image_row(self, image_id: int) -> Mapping[str, Any]:
        """The file's object of an image, unchecked; InputError if there is no such image."""
        return self._find(image_id)[1]

    def caption(self, image_id: int) -> str:
        """An image's first caption; InputError if it has none."""
        self._find(image_id)
        if image_id not in self.captions:
            raise InputError(f"{self.captions_file}: annotations: no caption for image {image_id}")
        return self.captions[image_id][0]

    def file_name(self, image_id: int) -> str:
        """An image's file name as text, whatever the file has; for reports."""
        name = self._find(image_id)[1].get("file_name")
        return name if isinstance(name, str) and name.isprintable() else short(name)

    def _find(self, image_id: int) -> tuple[str, Mapping]:
        if image_id not in self._images:
            raise InputError(f"{self.path}: images: no image has the id {short(image_id)}")
        return self._images[image_id]

    def _note(self, kind: str, text: str) -> None:
        """Notes something once for all rows that share it; `text` names the first."""
        first, count = self._notes.get(kind, (text, 0))
        self._notes[kind] = first, count + 1

    def _integer(self, row: Mapping, table: str, i: int, key: str) -> int | None:
        value = row.get(key)
        number = plain_integer(value)
        if number is not None and type(value) is not int:
            self._note(f"{table} {key}", f"{table}[{i}].{key}: {short(value)} is taken as the number {number}")
        return number

    def _by_id(self, data: Any, table: str, kind: str, label: str) -> dict[int, tuple[int, Mapping]]:
        """The index and row of every id; rows without a whole number are unused."""
        found: dict[int, tuple[int, Mapping]] = {}
        rows, first = _table(data, table, self.path), ""
        for i, row in enumerate(rows):
            if not isinstance(row, Mapping):
                reason = f"{table}[{i}]: expected an object, got {short(row)}"
            elif (number := self._integer(row, table, i, "id")) is not None:
                if number in found:
                    both = f"{table}[{found[number][0]}] and {table}[{i}]"
                    names = f"{short(found[number][1].get(label))} and {short(row.get(label))}"
                    raise InputError(f"{self.path}: {both}: two have the id {number} ({label} {names})")
                found[number] = (i, row)
                continue
            else:
                reason = f"{table}[{i}].id: expected a whole number from 0 to {2**63 - 1}, got {short(row.get('id'))}"
            first = first or reason
            name = short(row.get(label)) if isinstance(row, Mapping) else f"{table}[{i}]"
            self.unused.append(Unused(kind, name, reason))
        if rows and not found:
            raise InputError(f"{self.path}: {first}")
        return found

    def _read_categories(self, data: Any) -> dict[int, str]:
        names: dict[int, str] = {}
        for number, (i, row) in self._by_id(data, "categories", "category", "name").items():
            where, name = f"categories[{i}].name", row.get("name")
            if isinstance(name, str) and not name.strip():
                raise InputError(f"{self.path}: {where}: empty, expected the name of category {number}")
            try:
                names[number] = read_text(name, where)
                self.category_rows[number] = row
            except InputError as error:
                self.unused.append(Unused("category", f"category {number}", str(error)))
        if data["categories"] and not names:
            raise InputError(f"{self.path}: {self.unused[-1].reason}")
        return names

    def _read_annotations(self, data: Any) -> None:
        places: dict[int, int] = {}
        rows = _table(data, "annotations", self.path)
        for i, row in enumerate(rows):
            where = f"annotations[{i}]"
            if not isinstance(row, Mapping):
                self.unused.append(Unused("annotation", where, f"{where}: expected an object, got {short(row)}"))
                continue
            number = self._integer(row, "annotations", i, "id")
            if number is not None and places.setdefault(number, i) != i:
                raise InputError(f"{self.path}: annotations[{places[number]}] and {where}: two have the id {number}")
            image_id = self._integer(row, "annotations", i, "image_id")
            self._integer(row, "annotations", i, "category_id")
            self._look_at(row, where)
            if image_id in self._images:
                self._annotations[image_id].append((where, row))
            else:
                reason = f"{where}.image_id: no image has the id {short(row.get('image_id'))}"
                self.unused.append(Unused("annotation", f"annotation {short(row.get('id'))}", reason))
        if are_normalised(row.get("bbox") for row in rows if isinstance(row, Mapping)):
            self._notes["normalised"] = (f"annotations[].bbox: {NORMALISED}", len(rows))

    def _look_at(self, row: Mapping, where: str) -> None:
        """Notes values that are used, but may not be meant so."""
        crowd = row.get("iscrowd")
        if crowd is not None and not isinstance(crowd, int):
            with contextlib.suppress(InputError):
                meaning = int(read_flag(crowd, where))
                self._note("iscrowd", f"{where}.iscrowd: {short(crowd)} is taken as {meaning}")
        attributes = row.get("attributes")
        angle = attributes.get("rotation") if isinstance(attributes, Mapping) else None
        if isinstance(angle, int | float) and angle:
            self._note("rotation", f"{where}.attributes.rotation: {short(angle)}; the box is used as if not rotated")

    def _read_captions(self, path: str | Path) -> dict[int, list[str]]:
        captions: dict[int, list[str]] = {}
        for i, row in enumerate(_table(read_json(path), "annotations", path)):
            where, row = f"annotations[{i}]", row if isinstance(row, Mapping) else {}
            image_id = self._integer(row, "captions", i, "image_id")
            try:
                text = read_text(row.get("caption"), f"{where}.caption")
                if image_id not in self._images:
                    raise InputError(f"{where}.image_id: no image has the id {short(row.get('image_id'))}")
                captions.setdefault(image_id, []).append(" ".join(text.split()))
            except InputError as error:
                self.unused.append(Unused("caption", f"caption {short(row.get('id'))}", str(error)))
        return captions


def _table(data: Any, key: str, path: str | Path) -> list[Any]:
    rows = data.get(key) if isinstance(data, Mapping) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: {key}: expected a list of objects, as in a COCO annotation file")
    return rows
