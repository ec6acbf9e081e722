"""Label Studio's JSON export: tasks with results in percent of the image (https://labelstud.io/guide/export)."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlparse

import numpy as np

from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import json_files, read_json
from instdiff_jax.geometry.checks import plain_integer, read_numbers, read_text
from instdiff_jax.geometry.masks import encode_mask

_MAX_PIXELS = 1 << 28


def read(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads a file, or the JSON files of a folder. Images are looked for by name in `--images`, else in the folder."""
    root = options.images or (folder if folder.is_dir() else folder.parent)
    for path in [folder] if folder.is_file() else json_files(folder):
        tasks = read_json(path)
        if not isinstance(tasks, list):
            raise InputError(f"{path}: expected a list of tasks, as Label Studio exports it")
        for i, task in enumerate(tasks):
            where = f"{path}: [{i}]"
            try:
                image, results = _image(task, where, root), _results(task, where)
            except InputError as error:
                report.skip("image", options.split, f"{path.name} [{i}]", str(error))
                continue
            sides = (
                (plain_integer(one.get("original_width")), plain_integer(one.get("original_height")))
                for _, one in results
            )
            size = next(((w, h) for w, h in sides if w and h), None)

            def items(width: int, height: int, results: list = results) -> list:
                captions = {str(one.get("id")): text for _, one in results if (text := _text(one, of_region=True))}
                return [
                    attempt(_item, one, place, width, height, captions)
                    for place, one in results
                    if one.get("type") not in ("textarea", "choices", "relation", "rating")
                ]

            captions = tuple(text for _, one in results if (text := _text(one, of_region=False)))
            yield options.split, Scene(image, image.relative_to(root).as_posix(), size, items, captions)


def _image(task: Any, where: str, root: Path) -> Path:
    """The image of a task: its address ends with the file's path, sometimes behind an upload's own prefix."""
    data = task.get("data") if isinstance(task, dict) else None
    if not isinstance(data, dict):
        raise InputError(f"{where}.data: expected an object that names an image")
    addresses = [
        text for key, text in data.items() if isinstance(text, str) and (key in ("image", "img", "ocr") or "/" in text)
    ]
    for address in addresses:
        parsed = urlparse(address)
        path = Path(unquote(parse_qs(parsed.query).get("d", [parsed.path])[0]))
        parts = [part for part in path.parts if part not in ("/", "..", "")]
        for start in range(len(parts)):
            found = root.joinpath(*parts[start:])
            if found.is_file():
                return found
        stripped = parts[-1].partition("-")[2] if parts else ""  # 8 signs that an upload got
        if stripped and (root / stripped).is_file():
            return root / stripped
    raise InputError(f"{where}.data: no file of {short(addresses)} in {root}")


def _results(task: dict[str, Any], where: str) -> list[tuple[str, dict[str, Any]]]:
    """The results of the last annotation that was not cancelled."""
    annotations = task.get("annotations") or task.get("completions") or []
    kept = [
        (i, one)
        for i, one in enumerate(annotations if isinstance(annotations, list) else [])
        if isinstance(one, dict) and not one.get("was_cancelled") and isinstance(one.get("result"), list)
    ]
    if not kept:
        raise InputError(f"{where}.annotations: expected an annotation with a result that was not cancelled")
    number, last = kept[-1]
    places = ((f"{where}.annotations[{number}].result[{k}]", one) for k, one in enumerate(last["result"]))
    return [(place, one) for place, one in places if isinstance(one, dict)]


def _text(result: dict[str, Any], of_region: bool) -> str:
    """The text that somebody typed for a region, which has the region's id and place, or for the whole image."""
    value = result.get("value")
    if result.get("type") != "textarea" or not isinstance(value, dict) or not isinstance(value.get("text"), list):
        return ""
    return " ".join(map(str, value["text"])) if of_region == ("x" in value or "points" in value) else ""


def _item(result: dict[str, Any], where: str, width: int, height: int, captions: dict[str, str]) -> Item:
    value = result.get("value")
    if not isinstance(value, dict):
        raise InputError(f"{where}.value: expected an object")
    kind = str(result.get("type"))
    labels = value.get(kind) or next((value[key] for key in value if key.endswith("labels")), None)
    if not isinstance(labels, list) or not labels:
        raise InputError(f"{where}.value.{kind}: expected a list with a label")
    label = read_text(labels[0], f"{where}.value.{kind}[0]")
    caption = captions.get(str(result.get("id")), "")
    if "rle" in value:
        mask = decode_brush(value["rle"], width, height, f"{where}.value.rle")
        return Item(where, label, None, encode_mask(mask), caption)
    if "points" in value:
        points = [read_numbers(point, 2, f"{where}.value.points", "[x, y]") for point in list(value["points"] or [])]
        return Item(where, label, None, [[v for x, y in points for v in (x * width / 100, y * height / 100)]], caption)
    x, y, w, h = read_numbers(
        [value.get(key) for key in ("x", "y", "width", "height")], 4, where, "x, y, width, height"
    )
    if value.get("rotation"):
        raise InputError(f"{where}.value.rotation: expected a box that is not rotated, got {short(value['rotation'])}")
    return Item(where, label, (x * width / 100, y * height / 100, w * width / 100, h * height / 100), None, caption)


def decode_brush(values: Any, width: int, height: int, where: str) -> np.ndarray:
    """A brush's mask: the alpha of an RGBA image in Label Studio's runs of bits.

    The bits are: 32 for the number of values; 5 for the bits of a value, less 1; four times 4 for the bits of a run's
    length, less 1. Then a run each: a bit that says whether one value repeats; 2 bits that choose the length's bits;
    the length, less 1; the value, or that many values.
    """
    if not isinstance(values, list) or not all(isinstance(one, int) and 0 <= one < 256 for one in values):
        raise InputError(f"{where}: expected a list of bytes")
    bits, at = np.unpackbits(np.array(values, np.uint8)), 0

    def take(count: int) -> int:
        nonlocal at
        if at + count > bits.size:
            raise InputError(f"{where}: ends too early")
        at += count
        return int("".join(map(str, bits[at - count : at])), 2)

    number, word = take(32), take(5) + 1
    sizes = [take(4) + 1 for _ in range(4)]
    if number != 4 * width * height or number > _MAX_PIXELS:
        raise InputError(f"{where}: expected {4 * width * height} values for {width}x{height} pixels, got {number}")
    out, done = np.zeros(number, np.uint8), 0
    while done < number:
        repeats = take(1)
        end = min(done + take(sizes[take(2)]) + 1, number)
        out[done:end] = take(word) if repeats else [take(word) for _ in range(end - done)]
        done = end
    return out.reshape(height, width, 4)[..., 3] > 0
