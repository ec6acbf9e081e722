"""What every importer yields: scenes, each an image with what is on it."""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.checks import read_numbers


class Item(NamedTuple):
    """One thing on an image. It is checked when the COCO folder is written.

    Attributes:
        where: names it in messages: the file, and the line or field in it.
        category: its name.
        box: x, y, width, height in pixels; None to take the mask's.
        mask: polygons or run lengths in COCO's forms, or None.
        caption: of this thing alone, or "".
        crowd: whether it is a group, as COCO's `iscrowd`.
    """

    where: str
    category: str
    box: Any
    mask: Any = None
    caption: str = ""
    crowd: bool = False


class Scene(NamedTuple):
    """An image with its things.

    Attributes:
        image: its file, or the file's content.
        name: its path in the folder of the split's images.
        size: width and height in pixels that its annotations were made for; None for the image's own, upright.
        items: makes its things, given width and height; an error in the place of one that cannot be read.
        captions: of the whole image.
    """

    image: Path | bytes
    name: str
    size: tuple[int, int] | None
    items: Callable[[int, int], Sequence[Item | InputError]]
    captions: tuple[str, ...] = ()


def attempt(make: Callable[..., Item], *args: Any) -> Item | InputError:
    """An item, or the error of one that cannot be read: it alone is left out."""
    try:
        return make(*args)
    except InputError as error:
        return error


class Importer(Protocol):
    """Reads a dataset: yields each scene with its split's name; what cannot be read goes to the report.

    Args:
        folder: the dataset.
        options: what the user says beside it.
        report: told of files that are left out.
    """

    def __call__(self, folder: Path, options: "Options", report: Report) -> Iterator[tuple[str, Scene]]: ...


class Options(NamedTuple):
    """What files of a dataset do not tell.

    Attributes:
        images: a folder of the images, where they are not in the dataset.
        split: the name of the split, where the dataset has none.
        names: names of categories by number.
    """

    images: Path | None = None
    split: str = "train"
    names: tuple[str, ...] = ()


def item_of_corners(where: str, category: str, corners: Any, caption: str = "", crowd: bool = False) -> Item:
    """An item with the box x0, y0, x1, y1; the corners may come in any order."""
    x0, y0, x1, y1 = read_numbers(corners, 4, where, "[x0, y0, x1, y1]")
    x0, x1, y0, y1 = min(x0, x1), max(x0, x1), min(y0, y1), max(y0, y1)
    return Item(where, category, (x0, y0, x1 - x0, y1 - y0), None, caption, crowd)


def number(text: str | None, where: str) -> float:
    """A number as text files write it."""
    try:
        return read_numbers([float(text or "")], 1, where, "a number")[0]
    except ValueError as error:  # an InputError is one too
        raise (
            error if isinstance(error, InputError) else InputError(f"{where}: expected a number, got {text!r}")
        ) from error


def images_by_stem(folder: Path) -> dict[str, Path]:
    """The images below a folder by their path in it without the suffix, for formats that name no suffix."""
    found: dict[str, Path] = {}
    for path in sorted(folder.rglob("*")):
        if is_image(path):
            found.setdefault(path.relative_to(folder).with_suffix("").as_posix(), path)
    return found


_IMAGES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}


def is_image(path: Path) -> bool:
    """Whether a name is that of an image that is not hidden."""
    hidden = any(part.startswith(".") for part in path.parts[-2:])
    return path.suffix.lower() in _IMAGES and not hidden and "__MACOSX" not in path.parts
