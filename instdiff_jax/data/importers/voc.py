"""Pascal VOC: one XML file an image, boxes in pixels that count from 1.

http://host.robots.ox.ac.uk/pascal/VOC/voc2012/htmldoc/devkit_doc.html.
"""

import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt, images_by_stem, item_of_corners, number
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.paths import read_file

_VOID = 255  # the edge between objects in VOC's masks


def read(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads Annotations/*.xml, or XML files beside images; splits from ImageSets/Main if it is there."""
    notes = folder / "Annotations" if (folder / "Annotations").is_dir() else folder
    pictures = options.images or (folder / "JPEGImages" if (folder / "JPEGImages").is_dir() else folder)
    images = images_by_stem(pictures)
    files = sorted(path for path in notes.rglob("*.xml") if not path.name.startswith("."))
    if not files:
        raise InputError(f"{notes}: expected annotations *.xml, found none")
    splits = _splits(folder)
    for path in files:
        split = splits.get(path.stem, options.split) if splits else options.split
        try:
            root = _parse(path)
            image = _image(root, path, notes, pictures, images)
            size = (_side(root, "width", path), _side(root, "height", path))
        except InputError as error:
            report.skip("file", split, path.name, str(error))
            continue

        def items(width: int, height: int, root=root, path: Path = path) -> list:
            masks = _masks(folder, path.stem, width, height)
            things = enumerate(root.findall("object"), 1)
            return [attempt(_item, thing, f"{path}: object {i}", masks.get(i)) for i, thing in things]

        yield split, Scene(image, image.relative_to(pictures).as_posix(), size if all(size) else None, items)


def _parse(path: Path) -> ElementTree.Element:
    data = read_file(path)
    if b"<!DOCTYPE" in data or b"<!ENTITY" in data:
        raise InputError(f"{path}: expected XML without a document type of its own")
    try:
        return ElementTree.fromstring(data)
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: expected XML: {error}") from error


def _image(root: ElementTree.Element, path: Path, notes: Path, pictures: Path, images: dict[str, Path]) -> Path:
    """The image that the file names, else the one of the XML file's name; exporters often write another's path."""
    named = Path((root.findtext("filename") or "").strip().replace("\\", "/")).name
    inner = path.relative_to(notes).with_suffix("")
    for stem in (inner.parent / Path(named).stem, Path(Path(named).stem), inner, Path(inner.name)):
        if stem.as_posix() in images:
            return images[stem.as_posix()]
    raise InputError(f"{path}: filename: no image {short(named or path.stem)} in {pictures}")


def _side(root: ElementTree.Element, name: str, path: Path) -> int:
    """A side of the image in pixels; 0 if the file does not say it."""
    text = root.findtext(f"size/{name}")
    return int(number(text, f"{path}: size.{name}")) if text and text.strip() else 0


def _item(thing: ElementTree.Element, where: str, mask: dict | None) -> Item:
    box = thing.find("bndbox")
    if box is None:
        raise InputError(f"{where}: expected a bndbox")
    x0, y0, x1, y1 = (number(box.findtext(name), f"{where}.bndbox.{name}") for name in ("xmin", "ymin", "xmax", "ymax"))
    # Both corners are pixels inside the box, and the first pixel is 1; some exporters count from 0.
    corners = [max(0, min(x0, x1) - 1), max(0, min(y0, y1) - 1), max(x0, x1), max(y0, y1)]
    return item_of_corners(where, thing.findtext("name") or "", corners)._replace(mask=mask)


def _masks(folder: Path, stem: str, width: int, height: int) -> dict[int, dict]:
    """Masks by an object's number, where SegmentationObject has them."""
    path = folder / "SegmentationObject" / f"{stem}.png"
    if not path.is_file():
        return {}
    try:
        with Image.open(path) as image:
            numbers = np.asarray(image)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: expected a PNG image: {error}") from error
    if numbers.shape != (height, width):
        raise InputError(f"{path}: expected {width}x{height} pixels with an object's number each, got {numbers.shape}")
    return {int(i): encode_mask(numbers == i) for i in np.unique(numbers) if i not in (0, _VOID)}


def _splits(folder: Path) -> dict[str, str]:
    """An image's split, from ImageSets/Main (or Segmentation)."""
    for kind in ("Main", "Segmentation"):
        found: dict[str, str] = {}
        for name in ("train", "val", "test"):
            path = folder / "ImageSets" / kind / f"{name}.txt"
            lines = read_file(path).decode(errors="replace").split("\n") if path.is_file() else []
            found |= {line.split()[0]: name for line in lines if line.strip()}
        if found:
            return found
    return {}
