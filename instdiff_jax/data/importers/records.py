"""One JSON object an image: webdataset tars, phrase grounding as in GRIT, and Hugging Face's image folders.

https://huggingface.co/datasets/zzliang/GRIT; https://huggingface.co/docs/datasets/image_dataset.
"""

import csv
import io
import json
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt, is_image, item_of_corners
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.checks import is_list, plain_integer, read_flag, read_numbers, read_text
from instdiff_jax.paths import inside, read_file

_CAPTIONS = ("caption", "text", "txt", "prompt")
_LARGEST = 1 << 30  # bytes of a member of a tar


def read_tars(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads *.tar: members with one name before the first dot are one sample, an image with .json or .txt."""
    files = [folder] if folder.is_file() else sorted(folder.rglob("*.tar"))
    if not files:
        raise InputError(f"{folder}: expected files *.tar, found none")
    for path in files:
        for key, parts in _samples(path):
            suffix = next((suffix for suffix in parts if is_image(Path(f"a.{suffix}"))), None)
            where, name = f"{path}: {key}", f"{path.stem}/{key}"
            if suffix is None:
                report.skip("image", options.split, name, f"{where}: expected an image, got {', '.join(parts)}")
                continue
            try:
                values = _parse(parts["json"], f"{where}.json") if "json" in parts else {}
                captions = _captions(values, where)
                if not captions and "txt" in parts:
                    captions = (" ".join(parts["txt"].decode(errors="replace").split()),)
            except InputError as error:
                report.skip("image", options.split, name, str(error))
                continue
            yield options.split, scene_of_values(parts[suffix], f"{name}.{suffix}", values, captions, where, options)


def read_folder(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads metadata.jsonl or metadata.csv beside images, for each split's folder; `objects` has boxes x, y, w, h."""
    files = sorted([*folder.rglob("metadata.jsonl"), *folder.rglob("metadata.csv")])
    if not files:
        raise InputError(f"{folder}: expected metadata.jsonl or metadata.csv, found neither")
    for path in files:
        split = path.parent.name if path.parent != folder else options.split
        for i, text in enumerate(_lines(path), 1):
            where = f"{path}:{i}"
            try:
                values = text if isinstance(text, dict) else _parse(text.encode(), where)
                name = read_text(values.get("file_name"), f"{where}: file_name")
                captions = _captions(values, where)
                image = inside(path.parent, name, f"{where}: file_name")
            except InputError as error:
                report.skip("image", split, f"{path.name}:{i}", str(error))
                continue
            yield split, scene_of_values(image, name, values, captions, where, options)


def _lines(path: Path) -> Iterator[str | dict]:
    text = read_file(path).decode("utf-8-sig", "replace")
    if path.suffix == ".csv":
        try:
            yield from csv.DictReader(io.StringIO(text))
        except csv.Error as error:
            raise InputError(f"{path}: expected CSV: {error}") from error
    else:
        yield from (line for line in text.splitlines() if line.strip())


def _samples(path: Path) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Samples of a tar, in order; nothing is unpacked to a disk."""
    last, parts = "", dict[str, bytes]()
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                if not member.isfile() or member.size > _LARGEST or Path(member.name).name.startswith("."):
                    continue
                folder, _, name = member.name.rpartition("/")
                key, _, suffix = name.partition(".")
                key = f"{folder}/{key}".strip("./")
                if key != last and parts:
                    yield last, parts
                    parts = {}
                last = key
                parts[suffix.lower()] = tar.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path}: expected a tar file: {str(error).splitlines()[0]}") from error
    if parts:
        yield last, parts


def _parse(data: bytes, where: str) -> dict[str, Any]:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: expected JSON: {short(str(error))}") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: expected an object, got {short(values)}")
    return values


def _captions(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    given = next((values[name] for name in _CAPTIONS if values.get(name)), ())
    texts = [given] if isinstance(given, str) else given
    if not is_list(texts):
        raise InputError(f"{where}: caption: expected text or a list of texts, got {short(given)}")
    return tuple(" ".join(read_text(text, f"{where}: caption").split()) for text in texts)


def scene_of_values(
    image: Path | bytes, name: str, values: Mapping[str, Any], captions: tuple[str, ...], where: str, options: Options
) -> Scene:
    sides = (plain_integer(values.get("width")), plain_integer(values.get("height")))

    def items(width: int, height: int) -> list:
        if is_list(values.get("ref_exps")) or is_list(values.get("noun_chunks")):
            return _phrases(values, where, width, height)
        if is_list(values.get("annotations")):
            return [
                attempt(_annotation, one, f"{where}: annotations[{i}]", options)
                for i, one in enumerate(values["annotations"])
            ]
        return _objects(values.get("objects"), f"{where}: objects", options)

    # GRIT's sizes are those of the pictures on the web; downloaders shrink them. Its boxes are parts of the sides.
    grit = "ref_exps" in values or "noun_chunks" in values
    return Scene(image, name, sides if all(sides) and not grit else None, items, captions)  # type: ignore[arg-type]


def _phrases(values: Mapping[str, Any], where: str, width: int, height: int) -> list:
    """GRIT: [start, end, x0, y0, x1, y1, score]; the phrase is the caption's text from start to end."""
    table = "ref_exps" if values.get("ref_exps") else "noun_chunks"

    def make(row: Any, place: str) -> Item:
        start, end, x0, y0, x1, y1 = read_numbers(
            row[:6] if is_list(row) else row, 6, place, "[start, end, x0, y0, x1, y1]"
        )
        text = read_text(values.get("caption"), f"{where}: caption")[int(start) : int(end)].strip()
        if not text:
            raise InputError(f"{place}: expected the place of a phrase in the caption, got {int(start)} to {int(end)}")
        item = item_of_corners(place, text, [x0 * width, y0 * height, x1 * width, y1 * height], text)
        return item

    return [attempt(make, row, f"{where}: {table}[{i}]") for i, row in enumerate(values[table])]


def _category(value: Any, where: str, options: Options) -> str:
    index = plain_integer(value) if not isinstance(value, str) else None
    if index is None:
        return read_text(value, where)
    if index >= len(options.names):
        raise InputError(f"{where}: {index} has no name; pass --names with the names in order, one a line")
    return options.names[index]


def _annotation(one: Any, where: str, options: Options) -> Item:
    """As in COCO, with the category's name or number."""
    if not isinstance(one, Mapping):
        raise InputError(f"{where}: expected an object, got {short(one)}")
    given = next((one[key] for key in ("category", "label", "category_name", "category_id") if key in one), None)
    caption = read_text(one.get("caption") or "", f"{where}.caption", empty=True)
    category, crowd = _category(given, f"{where}.category", options), read_flag(one.get("iscrowd"), f"{where}.iscrowd")
    return Item(where, category, one.get("bbox"), one.get("segmentation"), caption, crowd)


def _objects(objects: Any, where: str, options: Options) -> list:
    """Hugging Face's form: lists side by side, or a list of objects."""
    if isinstance(objects, str) and objects.strip():  # a CSV file's
        objects = _parse(objects.encode(), where)
    if not objects:
        return []
    if is_list(objects):
        return [attempt(_annotation, one, f"{where}[{i}]", options) for i, one in enumerate(objects)]
    table = objects if isinstance(objects, Mapping) else {}
    keys = [key for key in ("categories", "category", "label", "labels") if key in table]
    boxes, names = table.get("bbox"), table[keys[0]] if keys else None
    if boxes is None or names is None or not is_list(boxes) or not is_list(names) or len(boxes) != len(names):
        return [InputError(f"{where}: expected bbox and categories, lists of one length")]
    rows = [{"bbox": box, "category": name} for box, name in zip(boxes, names, strict=True)]
    return [attempt(_annotation, row, f"{where}.bbox[{i}]", options) for i, row in enumerate(rows)]
