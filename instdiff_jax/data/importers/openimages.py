"""Open Images: boxes in CSV files, in parts of the image's sides (https://storage.googleapis.com/openimages/web/download_v7.html)."""

import csv
import io
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt, images_by_stem, number
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.paths import inside, read_file

_SPLITS = {"train": "train", "validation": "val", "val": "val", "test": "test"}


def read(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads *annotations-bbox.csv with a class-descriptions file; masks from *object-segmentation.csv and masks/."""
    names = _class_names(folder)
    files = sorted(folder.rglob("*annotations-bbox.csv"))
    if not files:
        raise InputError(f"{folder}: expected files *annotations-bbox.csv, found none")
    for path in files:
        split = next((ours for theirs, ours in _SPLITS.items() if theirs in path.name), options.split)
        root = options.images or folder
        images = {
            Path(stem).name: file for stem, file in images_by_stem(root).items() if "masks" not in Path(stem).parts
        }
        boxes: dict[str, list] = defaultdict(list)
        for line, row in _rows(path, ("ImageID", "LabelName", "XMin", "XMax", "YMin", "YMax")):
            boxes[row["ImageID"]].append((f"{path}:{line}", row))
        masks = _mask_rows(path)
        for image_id, rows in boxes.items():
            if image_id not in images:
                report.skip("image", split, image_id, f"{root}: no image of this name")
                continue

            def items(width: int, height: int, rows: list = rows, masks: Mapping = masks) -> list:
                return [attempt(_item, where, row, width, height, names, masks) for where, row in rows]

            file = images[image_id]
            yield split, Scene(file, file.name, None, items)


def _item(where: str, row: Mapping[str, str], width: int, height: int, names: Mapping, masks: Mapping) -> Item:
    x0, x1, y0, y1 = (number(row[side], f"{where}: {side}") for side in ("XMin", "XMax", "YMin", "YMax"))
    if row["LabelName"] not in names:
        raise InputError(f"{where}: LabelName: {short(row['LabelName'])} is not in the class descriptions")
    box = (x0 * width, y0 * height, (x1 - x0) * width, (y1 - y0) * height)
    key = (row["ImageID"], row["LabelName"], *(round(value, 3) for value in (x0, x1, y0, y1)))
    mask = _read_mask(masks[key], width, height) if key in masks else None
    return Item(where, names[row["LabelName"]], box, mask, crowd=row.get("IsGroupOf") == "1")


def _rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, dict[str, str]]]:
    reader = csv.DictReader(io.StringIO(read_file(path).decode("utf-8-sig", "replace")))
    try:
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise InputError(f"{path}: expected the columns {', '.join(columns)}; {missing[0]} is missing")
        for row in reader:
            if all(row[name] for name in columns):
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}: expected CSV: {error}") from error


def _class_names(folder: Path) -> dict[str, str]:
    files = sorted(folder.rglob("*class-descriptions*.csv"))
    if not files:
        raise InputError(f"{folder}: expected class-descriptions-boxable.csv, which names the classes")
    try:
        rows = list(csv.reader(io.StringIO(read_file(files[0]).decode("utf-8-sig", "replace"))))
    except csv.Error as error:
        raise InputError(f"{files[0]}: expected CSV: {error}") from error
    return {row[0]: row[1] for row in rows if len(row) > 1}


def _mask_rows(boxes: Path) -> dict[tuple, Path]:
    """A mask's file by its image, class and box; that is all that ties the two CSV files."""
    found = {}
    for path in sorted(boxes.parent.glob(boxes.name.replace("annotations-bbox", "annotations-object-segmentation"))):
        for line, row in _rows(path, ("MaskPath", "ImageID", "LabelName", "BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax")):
            where = f"{path}:{line}"
            sides = [number(row[name], f"{where}: {name}") for name in ("BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax")]
            file = next((one for one in _mask_places(boxes.parent, row["MaskPath"], where) if one.is_file()), None)
            if file is not None:
                found[(row["ImageID"], row["LabelName"], *(round(value, 3) for value in sides))] = file
    return found


def _mask_places(folder: Path, name: str, where: str) -> Iterator[Path]:
    yield inside(folder / "masks", name, f"{where}: MaskPath")
    yield inside(folder, name, f"{where}: MaskPath")


def _read_mask(path: Path, width: int, height: int) -> dict:
    """Masks have a size of their own: nearest pixels are taken."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("L").resize((width, height), Image.Resampling.NEAREST))
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: expected a PNG image: {error}") from error
    return encode_mask(pixels > 0)
