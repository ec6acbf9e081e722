"""Opening image files: upright, as 8-bit RGB, or as a mask. Every image of a user is opened here."""

import io
import os
import zlib
from pathlib import Path

import numpy as np
from jaxtyping import Bool
from PIL import Image, ImageOps, UnidentifiedImageError

from instdiff_jax.errors import InputError
from instdiff_jax.paths import read_file

_ORIENTATION = 0x0112  # EXIF tag
_PNG_START = b"\x89PNG\r\n\x1a\n"
# Differences of the channels up to this are JPEG's rounding, not colour.
_GRAY = 24


def open_image(source: str | os.PathLike | bytes, size: tuple[int, int] | None = None) -> Image.Image:
    """Opens an image file: upright, 8-bit RGB.

    The EXIF orientation is applied. Gray images of more than 8 bits are scaled from the range of their type to 0..255.

    Args:
        source: a path, or the content of a file.
        size: width and height in pixels that annotations expect. An image that has them only before its orientation is
            applied stays as it is stored.

    Raises:
        ValueError: with the reason, for a file that is not an image, ends too early, or has values of no known range.
    """
    image = _open(source)
    if size is None or not fits_stored_only(image, size):
        image = ImageOps.exif_transpose(image)
    image = _eight_bits(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def orientation_note(source: bytes, size: tuple[int, int]) -> str:
    """What `open_image` did to an image with an EXIF orientation, for reports; "" for one without."""
    with Image.open(io.BytesIO(source)) as image:
        number = _orientation(image)
        if number == 1:
            return ""
        stored = f"{image.width}x{image.height}"
        upright = f"{image.height}x{image.width}" if number >= 5 else stored
        if fits_stored_only(image, size):
            return f"EXIF orientation {number}: annotated as stored, {stored} pixels, and used so; upright {upright}"
        return f"EXIF orientation {number}: stored as {stored}, used upright, {upright} pixels"


def fits_stored_only(image: Image.Image, size: tuple[int, int]) -> bool:
    """Whether an image has this width and height as it is stored, and not upright."""
    return _orientation(image) >= 5 and image.size == tuple(size) and image.size[::-1] != tuple(size)


def open_mask(path: str | os.PathLike) -> Bool[np.ndarray, "H W"]:
    """Opens a mask: True where the image is white, or where its shape is.

    Read as meant: black and white; values 0 and 1; one colour on black; one white shape on a transparent ground.

    Raises:
        ValueError: with the reason, for what is not an image, or can be read in two ways.
    """
    image = ImageOps.exif_transpose(_open(path))
    if "transparency" in image.info or image.mode in ("LA", "RGBA", "PA"):
        image = image.convert("RGBA")
        alpha = np.asarray(image.getchannel("A"))
        gray = _gray(np.asarray(image.convert("RGB"))[alpha >= 128])
        if alpha.min() == 255:
            pass  # opaque: the colours are the mask
        elif gray is None or ((gray > _GRAY) & (gray < 255 - _GRAY)).any():
            raise ValueError("its shape is in the alpha channel, and its colours are no mask; expected black and white")
        elif not (gray >= 128).any():
            raise ValueError("black on a transparent ground can be meant either way; expected black and white")
        else:
            return (alpha >= 128) & (np.asarray(image.convert("L")) >= 128)
    if image.mode in ("F", "I") or image.mode.startswith("I;"):
        values = np.asarray(image, np.float64)
        if set(np.unique(values)) <= {0, 1}:
            return values == 1
        if values.max() == 255:
            return values >= 128
        return np.asarray(_eight_bits(image)) >= 128
    pixels = np.asarray(image.convert("RGB"))
    gray = _gray(pixels)
    if gray is not None:
        return gray == 1 if gray.max() == 1 else gray >= 128
    colours = np.unique(pixels.reshape(-1, 3), axis=0)
    if len(colours) != 2 or colours.any(axis=1).all():
        raise ValueError("it has colours; expected black and white, or one colour on black")
    return pixels.any(axis=-1)


def read_repaint_mask(path: Path, flag: str) -> Bool[np.ndarray, "H W"]:
    """The mask of a flag; InputError if it cannot be read, or has nothing to repaint or nothing to keep."""
    try:
        mask = open_mask(path)
    except ValueError as error:
        raise InputError(f"--{flag}: {path}: expected an image that is white where to repaint: {error}") from error
    if not mask.any():
        raise InputError(f"--{flag}: {path}: nothing to repaint, expected an image that is white there")
    if mask.all():
        raise InputError(f"--{flag}: {path}: all is white, nothing is kept; mark only what to repaint")
    return mask


def _open(source: str | os.PathLike | bytes) -> Image.Image:
    data = source if isinstance(source, bytes) else read_file(source)
    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        if image.format == "PNG":
            _check_png(data)
        return image
    except InputError:
        raise
    except UnidentifiedImageError as error:  # its text has the address of an object
        raise ValueError("cannot be read as an image: of no form that Pillow knows") from error
    except Exception as error:  # Pillow raises errors of many kinds for a damaged file
        raise ValueError(f"cannot be read as an image: {error}") from error


def _check_png(data: bytes) -> None:
    """Raises ValueError if a chunk of a PNG does not match its checksum; Pillow does not compare that of the pixels."""
    start = len(_PNG_START)
    while start + 8 <= len(data):
        length, kind = int.from_bytes(data[start : start + 4], "big"), data[start + 4 : start + 8]
        end = start + 8 + length
        if zlib.crc32(data[start + 4 : end]) != int.from_bytes(data[end : end + 4], "big"):
            raise ValueError(f"damaged: the checksum of its chunk {kind!r} does not match")
        if kind == b"IEND":
            return
        start = end + 4


def _orientation(image: Image.Image) -> int:
    try:
        number = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # damaged EXIF data; the pixels are good
        return 1
    return number if number in range(1, 9) else 1


def _gray(pixels: np.ndarray) -> np.ndarray | None:
    """The gray values of RGB pixels; None if they have colours."""
    if pixels.size and (pixels.max(axis=-1).astype(int) - pixels.min(axis=-1)).max() > _GRAY:
        return None
    return pixels.max(axis=-1)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A gray image of more than 8 bits, scaled by the range of its type; others as they are."""
    if image.mode not in ("F", "I") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image, np.float64)
    low, high = float(values.min()), float(values.max())
    if not low >= 0 or not high < np.inf:
        raise ValueError(f"values from {low:g} to {high:g}; expected none below 0, and finite ones")
    if image.mode == "F":
        scales, expected = {1: 255.0, 255: 1.0, 65535: 255 / 65535}, "0 to 1, 0 to 255 or 0 to 65535"
    else:
        # Values up to 255 in a file of 16 bits may be 8-bit ones, or nearly black.
        scales, expected = {65535: 255 / 65535}, "0 to 65535, with some over 255"
        if 0 < high <= 255:
            raise ValueError(f"values up to {high:g} in more than 8 bits; expected {expected}, or an 8-bit image")
    scale = next((scale for limit, scale in scales.items() if high <= limit), None)
    if scale is None:
        raise ValueError(f"values up to {high:g}; expected {expected}")
    return Image.fromarray(np.rint(values * scale).astype(np.uint8))
