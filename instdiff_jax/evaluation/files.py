"""Files of an evaluation: written whole or not at all, and never mixed with those of other settings."""

import io
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.split import Scene
from instdiff_jax.files import read_json


def write_file(path: Path, data: bytes) -> None:
    """Writes beside and moves into place: a file is whole or not there.

    Raises:
        InputError: where nothing can be written.
    """
    # A name of its own: shards on several machines, where processes may have one number, write one settings.json.
    beside = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(data)
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from error


def picture_path(folder: Path, scene: Scene) -> Path:
    """Where an evaluation's picture of a scene lies."""
    return folder / "images" / f"{scene.image_id}.png"


def write_picture(path: Path, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG, whole or not at all."""
    write_file(path, encode_picture(pixels))


def encode_picture(pixels: UInt8[np.ndarray, "H W 3"], **options: Any) -> bytes:
    """The bytes of an image file, PNG by default; `options` go to Pillow."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def claim_folder(folder: Path, settings: Mapping[str, Any], flag: str = "--output") -> None:
    """Notes in settings.json what a folder's pictures are made with.

    Args:
        folder: an evaluation's.
        settings: all that decides what the pictures look like.
        flag: by which a user names another folder.

    Raises:
        InputError: where its pictures were made with other settings, naming the first that differs, or by somebody
            else, or where nothing can be written.
    """
    path = folder / "settings.json"
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if any(_names(folder / "images")):
            raise InputError(f"{folder / 'images'}: expected no pictures without {path}; use another {flag}")
        write_file(path, json.dumps(settings, indent=2).encode())
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise InputError(f"{path}: expected an object with the settings of this folder's pictures")
    for name, old, new in _differences(there, settings):
        raise InputError(
            f"{path}: {name}: the pictures there were made with {short(old)}, got {short(new)}; use another {flag}"
        )


def _names(folder: Path) -> Iterator[Path]:
    return folder.glob("*.png") if folder.is_dir() else iter(())


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in [*new, *(name for name in old if name not in new)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{start}{name}.")
        elif a != b:
            yield f"{start}{name}", a, b


def read_picture(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """A picture of the evaluation; InputError where it is missing, broken or of another size."""
    try:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: missing; run again without --shard to make it") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as an image; delete it and run again ({error})") from error
    if pixels.shape != (size, size, 3):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise InputError(f"{path}: expected {size}x{size} pixels, got {found}; delete it and run again")
    return pixels
