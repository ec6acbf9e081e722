"""YOLO: one text file an image; a line is a class and a box or a polygon in parts of the image's sides.

https://docs.ultralytics.com/datasets/detect and /segment.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt, images_by_stem, number
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.paths import read_file


def read(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads a folder with data.yaml, or one with images/, labels/ and classes.txt."""
    config, base = _config(folder)
    names = options.names or _names(config, base)
    splits = {name: config[name] for name in ("train", "val", "test") if config.get(name)}
    for split, places in (splits or {options.split: "images" if (base / "images").is_dir() else "."}).items():
        for root, image in _images(base, places if isinstance(places, list) else [places], split, report):
            label = _label_path(image, root)
            if not label.is_file():
                report.note("image", split, image.name, f"no label file {label.name}: an image without instances")
            lines = _lines(label) if label.is_file() else []
            name = image.relative_to(root).as_posix() if image.is_relative_to(root) else image.name

            def items(width: int, height: int, lines: Any = lines, label: Path = label) -> list:
                return [attempt(item, line, f"{label}:{i}", names, width, height) for i, line in lines]

            yield split, Scene(image, name, None, items)


def item(line: str, where: str, names: tuple[str, ...], width: int, height: int) -> Item:
    """One line: "class x y w h" (the box's middle), with a confidence after it, or "class x1 y1 x2 y2 x3 y3 ..."."""
    first, *rest = line.split()
    values = [number(text, where) for text in rest]
    if not first.isascii() or not first.isdigit() or int(first) >= len(names):
        raise InputError(f"{where}: expected a class from 0 to {len(names) - 1}, got {short(first)}")
    category = names[int(first)]
    if len(values) < 4 or (len(values) > 5 and len(values) % 2):
        raise InputError(f"{where}: expected 4 numbers of a box, or pairs of a polygon, got {len(values)} numbers")
    # Half a percent over the edge is rounding; more is another unit.
    if not all(-0.005 <= value <= 1.005 for value in values[:4] if len(values) < 6) or any(
        abs(v) > 1.5 for v in values
    ):
        raise InputError(f"{where}: expected parts of the image's sides, from 0 to 1, got {short(line)}")
    if len(values) < 6:
        x, y, w, h = values[:4]
        return Item(where, category, ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    scale = (width, height)
    return Item(where, category, None, [[min(max(v, 0), 1) * scale[i % 2] for i, v in enumerate(values)]])


def _config(folder: Path) -> tuple[dict[str, Any], Path]:
    """data.yaml (or a .yaml that is given itself), and the folder that its paths start from."""
    files = [folder] if folder.is_file() else sorted(folder.glob("*.yaml")) + sorted(folder.glob("*.yml"))
    path = next((file for file in files if file.stem == "data"), files[0] if files else None)
    if path is None:
        return {}, folder
    try:
        values = yaml.safe_load(read_file(path))
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise InputError(f"{path}: expected YAML: {short(str(error))}") from error
    if not isinstance(values, dict):
        raise InputError(f"{path}: expected an object with names and train")
    base = path.parent / str(values.get("path") or "")
    return values, base if base.is_dir() else path.parent


def _names(config: dict[str, Any], base: Path) -> tuple[str, ...]:
    names = config.get("names")
    if isinstance(names, dict):
        try:
            numbers = {int(key): name for key, name in names.items()}
        except (TypeError, ValueError) as error:
            raise InputError(f"{base}: names: expected numbers of classes, got {short(list(names))}") from error
        names = [numbers.get(i, f"class {i}") for i in range(max(numbers, default=-1) + 1)]
    for file in (base / "classes.txt", base / "labels" / "classes.txt", base / "obj.names"):
        if names is None and file.is_file():
            names = [line.strip() for line in read_file(file).decode(errors="replace").splitlines() if line.strip()]
    if not isinstance(names, list) or not names:
        raise InputError(f"{base}: expected names of classes in data.yaml or classes.txt, or --names")
    return tuple(str(name) for name in names)


def _images(base: Path, places: list[Any], split: str, report: Report) -> Iterator[tuple[Path, Path]]:
    """The images of a split with the folder that their names start from."""
    for place in map(str, places):
        # Exporters write ../train/images beside a data.yaml that lies in the dataset's own folder.
        found = [base / place, base / place.removeprefix("../"), base / place.removeprefix("./")]
        path = next((one for one in found if one.exists()), None)
        if path is None:
            report.skip("folder", split, place, f"{base / place}: missing")
        elif path.is_file():
            lines = read_file(path).decode(errors="replace").split("\n")
            for line in (line.strip() for line in lines if line.strip()):
                yield base / "images", base / line.removeprefix("./")
        else:
            yield from ((path, image) for image in images_by_stem(path).values())


def _label_path(image: Path, root: Path) -> Path:
    """The last folder named images becomes labels; else the label lies beside the image."""
    parts = list(image.parts)
    for i in reversed(range(len(parts) - 1)):
        if parts[i] == "images":
            parts[i] = "labels"
            return Path(*parts).with_suffix(".txt")
    beside = image.with_suffix(".txt")
    return beside if beside.is_file() or not (root / "labels").is_dir() else root / "labels" / beside.name


def _lines(path: Path) -> list[tuple[int, str]]:
    """Lines with their numbers, each once: some exporters write a box twice."""
    seen: dict[str, int] = {}
    for i, line in enumerate(read_file(path).decode("utf-8-sig", "replace").splitlines(), 1):
        if line.strip():
            seen.setdefault(line.strip(), i)
    return [(i, line) for line, i in seen.items()]
