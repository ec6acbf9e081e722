"""The images of an evaluation. A folder holds images of one set of settings."""

import io
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError, short
from instdiff_jax.evaluation.split import Scene
from instdiff_jax.files import read_json, with_defaults, write_file, write_json
from instdiff_jax.paths import output_path, read_file


def image_path(folder: Path, scene: Scene) -> Path:
    """The file of a scene's image in an evaluation's folder."""
    return output_path(folder, "images", f"{scene.image_id}.png")


def write_image(path: Path, pixels: UInt8[np.ndarray, "H W 3"]) -> None:
    """Writes a PNG, whole or not at all."""
    write_file(path, lambda file: file.write(encode_image(pixels)), sync=False)


def encode_image(pixels: UInt8[np.ndarray, "H W 3"], **options: Any) -> bytes:
    """The bytes of an image file, PNG by default; `options` are Pillow's."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def claim_folder(folder: Path, settings: Mapping[str, Any], flag: str = "--output") -> None:
    """Writes settings.json with what the images of a folder are made with, or checks the one that is there.

    Args:
        folder: the evaluation's.
        settings: all that decides what the images look like.
        flag: the flag that names the folder, for messages.

    Raises:
        InputError: if the folder has images made with other settings, names the first that differs; if it has images
            but no settings.json; or if it cannot be written.
    """
    path = output_path(folder, "settings.json")
    settings = json.loads(json.dumps(settings))
    if not path.exists():
        if any((folder / "images").glob("*.png")):
            raise InputError(f"{folder / 'images'}: expected no images without {path}; use another {flag}")
        write_json(path, settings, indent=2)
        return
    there = read_json(path)
    if not isinstance(there, dict):
        raise InputError(f"{path}: expected an object with the settings of this folder's images")
    for name, old, new in _differences(with_defaults(there, {"sampling": SamplingConfig().to_dict()}), settings):
        raise InputError(
            f"{path}: {name}: the images there were made with {short(old)}, got {short(new)}; use another {flag}"
        )


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], start: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name in [*new, *(name for name in old if name not in new)]:
        a, b = old.get(name), new.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differences(a, b, f"{start}{name}.")
        elif a != b:
            yield f"{start}{name}", a, b


def read_image(path: Path, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """An image of the evaluation; InputError if it is missing, broken or of another size."""
    try:
        if not path.exists():
            raise InputError(f"{path}: missing; run again without --shard to generate it")
        with Image.open(io.BytesIO(read_file(path))) as image:
            pixels = np.asarray(image.convert("RGB"))
    except InputError:
        raise
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{path}: cannot be read as an image; delete it and run again ({error})") from error
    if pixels.shape != (size, size, 3):
        found = f"{pixels.shape[1]}x{pixels.shape[0]}"
        raise InputError(f"{path}: expected {size}x{size} pixels, got {found}; delete it and run again")
    return pixels
