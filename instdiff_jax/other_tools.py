"""Layout files of other tools, as objects of the official JSON: Ideogram's prompts, LabelMe, rows of LayoutSAM."""

import ast
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from instdiff_jax.errors import InputError, short

_IDEOGRAM_CANVAS = 512  # its prompts have no size; their boxes are in thousandths of the canvas
_TEXT = 200_000  # the longest list as text
_DEEP = re.compile(r"[\[({+\-]{20}")  # deeper than any list there, which would take the parser's stack
_CIRCLE = 32  # corners of a polygon that stands for a circle


def to_official(values: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """The official object of a known tool's; others as they are, for the reader of layouts to judge.

    Raises:
        InputError: for a known tool's object that is not as the tool writes it.
    """
    if "annos" in values:
        return values
    for key, read in (("compositional_deconstruction", _ideogram), ("shapes", _labelme), ("bbox_list", _layoutsam)):
        if key in values:
            return read(values, where)
    return values


def read_list(value: Any, where: str) -> list[Any]:
    """A list, or the text of one in Python's notation: tables on the hub hold them so. No code is run.

    Raises:
        InputError: for anything else, and for text that is too long or too deep for a table's.
    """
    found, expected = value, "a list"
    if isinstance(value, str):
        expected = "a list in Python's notation"
        try:
            found = ast.literal_eval(value) if len(value) <= _TEXT and not _DEEP.search(value) else None
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            found = None
    if not isinstance(found, list | tuple):
        raise InputError(f"{where}: expected {expected}, got {short(value)}")
    return list(found)


def circle_polygon(center: Sequence[float], edge: Sequence[float]) -> list[float]:
    """The polygon x1, y1, x2, y2, ... that stands for a circle, from its middle and a point on its edge."""
    (x, y), radius = center, math.dist(center, edge)
    turns = (2 * math.pi * i / _CIRCLE for i in range(_CIRCLE))
    return [value for turn in turns for value in (x + radius * math.cos(turn), y + radius * math.sin(turn))]


def _numbers(value: Any, count: int, where: str) -> list[float]:
    if (
        not isinstance(value, list | tuple)
        or len(value) != count
        or any(type(one) not in (int, float) for one in value)
    ):
        raise InputError(f"{where}: expected {count} numbers, got {short(value)}")
    return [float(one) for one in value]


def _ideogram(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Boxes are [y0, x0, y1, x1] from 0 to 1000. Elements without one say nothing of a place, and are left out."""
    parts = values["compositional_deconstruction"]
    if not isinstance(parts, Mapping):
        raise InputError(f"{where}: compositional_deconstruction: expected an object, got {short(parts)}")
    sides = [values.get(side, _IDEOGRAM_CANVAS) for side in ("width", "height")]
    scale = [side / 1000 if type(side) is int else 1.0 for side in sides]
    annos = []
    for i, element in enumerate(read_list(parts.get("elements"), f"{where}: compositional_deconstruction.elements")):
        place = f"{where}: compositional_deconstruction.elements[{i}]"
        if not isinstance(element, Mapping):
            raise InputError(f"{place}: expected an object, got {short(element)}")
        if element.get("bbox") is None:
            continue
        y0, x0, y1, x1 = _numbers(element["bbox"], 4, f"{place}.bbox")
        box = [x0 * scale[0], y0 * scale[1], (x1 - x0) * scale[0], (y1 - y0) * scale[1]]
        words = [f'the text "{element["text"]}"'] if element.get("type") == "text" and element.get("text") else []
        words += [element["desc"]] if isinstance(element.get("desc"), str) and element["desc"].strip() else []
        annos.append({"caption": ", ".join(words), "bbox": box})
    captions = [values.get("high_level_description"), parts.get("background")]
    caption = next((text for text in captions if isinstance(text, str) and text.strip()), "")
    return {"caption": caption, "width": sides[0], "height": sides[1], "annos": annos}


def _labelme(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Rectangles are boxes; polygons and circles masks; points points; lines scribbles."""
    annos = []
    for i, shape in enumerate(read_list(values.get("shapes"), f"{where}: shapes")):
        place = f"{where}: shapes[{i}]"
        if not isinstance(shape, Mapping):
            raise InputError(f"{place}: expected an object, got {short(shape)}")
        pairs = read_list(shape.get("points"), f"{place}.points")
        points = [_numbers(pair, 2, f"{place}.points[{k}]") for k, pair in enumerate(pairs)]
        text = shape.get("description") or shape.get("label")
        annos.append({"caption": text, "category_name": shape.get("label"), **_labelme_place(shape, points, place)})
    caption = values.get("caption")
    if caption is None:
        labels = [str(anno["category_name"]) for anno in annos]
        caption = ", ".join(dict.fromkeys(labels))
    return {"caption": caption, "width": values.get("imageWidth"), "height": values.get("imageHeight"), "annos": annos}


def _labelme_place(shape: Mapping[str, Any], points: list[list[float]], where: str) -> dict[str, Any]:
    kind = shape.get("shape_type", "polygon")
    flat = [value for pair in points for value in pair]
    least = {"rectangle": 2, "circle": 2, "polygon": 3, "point": 1, "line": 2, "linestrip": 2}
    if kind not in least:
        raise InputError(f"{where}.shape_type: expected one of {', '.join(least)}, got {short(kind)}")
    if len(points) < least[kind]:
        raise InputError(f"{where}.points: expected at least {least[kind]}, got {len(points)}")
    if kind == "rectangle":
        low, high = ([pick(pair[axis] for pair in points) for axis in (0, 1)] for pick in (min, max))
        return {"bbox": [*low, high[0] - low[0], high[1] - low[1]]}
    if kind == "circle":
        return {"mask": [circle_polygon(*points[:2])]}
    return {{"polygon": "mask", "point": "point"}.get(kind, "scribble"): [flat] if kind == "polygon" else flat}


def _layoutsam(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Boxes are [x0, y0, x1, y1] in pixels, with a long or a short caption each."""
    boxes = read_list(values.get("bbox_list"), f"{where}: bbox_list")
    key = "detail_region_captions" if values.get("detail_region_captions") else "region_captions"
    captions = read_list(values.get(key), f"{where}: {key}")
    if len(captions) != len(boxes):
        raise InputError(f"{where}: {key}: expected one for each of {len(boxes)} boxes, got {len(captions)}")
    annos = []
    for i, (box, caption) in enumerate(zip(boxes, captions, strict=True)):
        x0, y0, x1, y1 = _numbers(box, 4, f"{where}: bbox_list[{i}]")
        annos.append({"caption": caption, "bbox": [x0, y0, x1 - x0, y1 - y0]})
    sides = {name: _side(values.get(name)) for name in ("width", "height")}
    return {"caption": values.get("global_caption"), **sides, "annos": annos}


def _side(value: Any) -> Any:
    """A side as the tables have it: a number, also as text."""
    return int(value) if isinstance(value, str) and len(value) < 6 and value.isdigit() else value
