"""LabelMe: one JSON file an image, with shapes in pixels (https://github.com/wkentaro/labelme)."""

import base64
import binascii
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import json_files, read_json
from instdiff_jax.geometry.checks import plain_integer, read_numbers, read_text
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.other_tools import circle_polygon
from instdiff_jax.paths import inside


def read(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads the JSON files of a folder and below it; shapes with one label and one group_id are one instance."""
    for path in json_files(folder, inner=True):
        try:
            data = read_json(path)
            if not isinstance(data, dict) or not isinstance(data.get("shapes"), list):
                raise InputError(f"{path}: expected an object with a list of shapes")
            image = _image(data, path, options)
        except InputError as error:
            report.skip("file", options.split, path.name, str(error))
            continue
        size = (plain_integer(data.get("imageWidth")) or 0, plain_integer(data.get("imageHeight")) or 0)

        def items(width: int, height: int, shapes: list = data["shapes"], path: Path = path) -> list:
            return [attempt(_item, group, width, height) for group in _groups(shapes, path)]

        name = path.relative_to(folder).with_suffix(_suffix(data)).as_posix()
        yield options.split, Scene(image, name, size if all(size) else None, items)


def _suffix(data: dict[str, Any]) -> str:
    return Path(str(data.get("imagePath") or "").replace("\\", "/")).suffix or ".jpg"


def _image(data: dict[str, Any], path: Path, options: Options) -> Path | bytes:
    """The file at imagePath, from the JSON file's folder; else the content inside the JSON."""
    named = str(data.get("imagePath") or "").replace("\\", "/")
    folder = options.images or path.parent
    for name in (named, Path(named).name, path.with_suffix(_suffix(data)).name):
        # `..` is usual here, but only to a folder beside; nothing else outside is read.
        inner = name.removeprefix("../")
        for root in (folder, folder.parent) if inner != name else (folder,):
            if inner and not Path(inner).is_absolute() and ".." not in Path(inner).parts:
                if (found := inside(root, inner)).is_file():
                    return found
    if not data.get("imageData"):
        raise InputError(f"{path}: imagePath: no file {short(named)} in {folder}, and no imageData")
    return _decode(data["imageData"], f"{path}: imageData")


def _decode(text: Any, where: str) -> bytes:
    try:
        return base64.b64decode(read_text(text, where), validate=True)
    except (binascii.Error, ValueError) as error:
        raise error if isinstance(error, InputError) else InputError(f"{where}: expected base64: {error}") from error


def _groups(shapes: list[Any], path: Path) -> list[list[tuple[str, Any]]]:
    """Shapes of one instance together, each with its place."""
    groups: dict[Any, list[tuple[str, Any]]] = {}
    for i, shape in enumerate(shapes):
        number = plain_integer(shape.get("group_id")) if isinstance(shape, dict) else None
        key = i if number is None else (str(shape.get("label")), number)
        groups.setdefault(key, []).append((f"{path}: shapes[{i}]", shape))
    return list(groups.values())


def _item(group: list[tuple[str, Any]], width: int, height: int) -> Item:
    """One instance; if a part of it is a mask, all parts are drawn into one mask."""
    where, first = group[0]
    if not isinstance(first, dict):
        raise InputError(f"{where}: expected an object, got {short(first)}")
    label = read_text(first.get("label"), f"{where}.label")
    caption = read_text(first.get("description") or "", f"{where}.description", empty=True)
    parts = [_polygon(shape, place) for place, shape in group if shape.get("shape_type") != "mask"]
    masks = [_mask(shape, place, width, height) for place, shape in group if shape.get("shape_type") == "mask"]
    if not masks:
        rectangle = len(group) == 1 and first.get("shape_type") == "rectangle"
        return Item(where, label, _bounds(parts) if rectangle else None, None if rectangle else parts, caption)
    if parts:
        raise InputError(f"{where}: expected a group of masks alone or of polygons alone")
    return Item(where, label, None, encode_mask(np.logical_or.reduce(masks)), caption)


def _bounds(parts: list[list[float]]) -> tuple[float, float, float, float]:
    xs, ys = parts[0][::2], parts[0][1::2]
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def _polygon(shape: dict[str, Any], where: str) -> list[float]:
    """A shape as one polygon x1 y1 x2 y2 ..."""
    points, kind = shape.get("points"), shape.get("shape_type") or "polygon"
    if not isinstance(points, list):
        raise InputError(f"{where}.points: expected a list of [x, y]")
    flat = [
        value for i, point in enumerate(points) for value in read_numbers(point, 2, f"{where}.points[{i}]", "[x, y]")
    ]
    if kind == "rectangle" and len(flat) == 4:
        x0, y0, x1, y1 = flat
        return [x0, y0, x1, y0, x1, y1, x0, y1]
    if kind == "circle" and len(flat) == 4:
        return circle_polygon(flat[:2], flat[2:])
    if kind in ("polygon", "rectangle", "oriented_rectangle") and len(flat) >= 6:
        return flat
    raise InputError(f"{where}: expected a polygon, rectangle, circle or mask with an area, got {short(kind)}")


def _mask(shape: dict[str, Any], where: str, width: int, height: int) -> np.ndarray:
    """A mask is a PNG image of the part of the canvas between its two points."""
    points = shape.get("points")
    if not isinstance(points, list) or len(points) != 2:
        raise InputError(f"{where}.points: expected two points of a mask, got {short(points)}")
    (x0, y0), (x1, y1) = (map(round, read_numbers(point, 2, f"{where}.points", "[x, y]")) for point in points)
    try:
        with Image.open(io.BytesIO(_decode(shape.get("mask"), f"{where}.mask"))) as image:
            part = np.asarray(image.convert("L")) > 0
    except (OSError, SyntaxError) as error:
        raise InputError(f"{where}.mask: expected a PNG image: {error}") from error
    if part.shape != (y1 - y0 + 1, x1 - x0 + 1) or not 0 <= x0 <= x1 < width or not 0 <= y0 <= y1 < height:
        raise InputError(f"{where}.mask: expected the size of its points' box, on the canvas of {width}x{height}")
    whole = np.zeros((height, width), bool)
    whole[y0 : y1 + 1, x0 : x1 + 1] = part
    return whole
