"""What a picture was drawn from, as text inside its PNG, and how to draw it again.

Two text chunks: `instdiff`, JSON with the layout and every setting; and `parameters`, the one line of A1111's web UI,
which other tools read.
"""

import dataclasses
import io
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, PngImagePlugin

from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.checks import MAX_SIDE, read_integer
from instdiff_jax.grounding import FORMAT_CHOICES
from instdiff_jax.layout import MAX_INSTANCES, Layout
from instdiff_jax.paths import read_file

if TYPE_CHECKING:
    from instdiff_jax.sampling.results import Result  # imports jax

CHUNK, OTHER_TOOLS = "instdiff", "parameters"
PNG_START = b"\x89PNG\r\n\x1a\n"
# What a picture notes of its run, beside layout and seed: keys of a run's record.
NOTED = ("fingerprint", "sampling", "format", "width", "height", "strength", "dtype")
NO_INPUTS = ("", "{}")
_MOST = 64 * 1024 * 1024  # bytes of a file that is read for its text


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a picture was drawn from.

    Attributes:
        layout: what it shows.
        seed: of its noise.
        sampling: all settings.
        format: which locations counted.
        width, height: of the picture, where they were not the layout's.
        strength: of the start image; None if it was not given.
        fingerprint: of the checkpoint.
        inputs: fingerprint of start image, mask, noise, LoRAs and embeddings; "" without any.
        batch: see `Result.batch`.
    """

    layout: Layout
    seed: int
    sampling: SamplingConfig
    format: str = "auto"
    width: int | None = None
    height: int | None = None
    strength: float | None = None
    fingerprint: str = ""
    inputs: str = ""
    batch: tuple[tuple[int, ...], int] = ((1,), 0)


def version() -> str:
    """The package's."""
    return sys.modules[__name__.partition(".")[0]].__version__


def png_text(result: "Result", about: Mapping[str, Any], inputs: str = "") -> PngImagePlugin.PngInfo:
    """The text chunks of a picture.

    Args:
        result: that was drawn.
        about: a run's record, of which `NOTED` is kept.
        inputs: see `Origin.inputs`.
    """
    layout, seed = result.layout, result.seed
    noted = {name: about[name] for name in NOTED if about.get(name) is not None}
    values = {"version": version(), "seed": seed, "layout": layout.to_dict(), **noted}
    if len(result.batch[0]) > 1:
        values["batch"] = result.batch
    text = PngImagePlugin.PngInfo()
    text.add_text(CHUNK, json.dumps(values | ({"inputs": inputs} if inputs not in NO_INPUTS else {})))
    text.add_text(OTHER_TOOLS, _parameters(layout, seed, about))
    return text


def _parameters(layout: Layout, seed: int, about: Mapping[str, Any]) -> str:
    sampling = about["sampling"]
    width, height = about.get("width") or layout.width, about.get("height") or layout.height
    lines = [layout.caption]
    if sampling["negative_prompt"]:
        lines.append(f"Negative prompt: {sampling['negative_prompt']}")
    facts = {
        "Steps": sampling["steps"],
        "Sampler": sampling["sampler"],
        "CFG scale": sampling["guidance_scale"],
        "Seed": seed,
        "Size": f"{width}x{height}",
        "Model hash": (about.get("fingerprint") or "")[:10],
        "Version": f"instdiff {version()}",
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in facts.items() if value != "")])


def is_png(data: bytes) -> bool:
    return data.startswith(PNG_START)


def read_origin(source: Path | bytes, where: str = "picture") -> Origin:
    """Reads what a PNG was drawn from; no pixel is decoded.

    Raises:
        InputError: for a file that is no PNG, is not ours, or was changed.
    """
    where = where if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else read_file(source)
    if len(data) > _MOST:
        raise InputError(f"{where}: expected a PNG of at most {_MOST} bytes")
    values = _read_chunk(data, where)
    for name in ("layout", "seed", "sampling"):
        if name not in values:
            raise InputError(f"{where}: {CHUNK}.{name}: missing")
    name = "picture" if isinstance(source, bytes) else source.stem
    layout = Layout.from_dict(values["layout"], f"{where}: {CHUNK}.layout", name=name)
    sides = {}
    for side in ("width", "height"):
        if values.get(side) is not None:
            sides[side] = read_integer(values[side], f"{where}: {CHUNK}.{side}", 1, MAX_SIDE, "whole pixels")
    format, strength = values.get("format", "auto"), values.get("strength")
    if format not in FORMAT_CHOICES:
        raise InputError(f"{where}: {CHUNK}.format: expected one of {', '.join(FORMAT_CHOICES)}, got {short(format)}")
    if strength is not None and (not isinstance(strength, int | float) or isinstance(strength, bool)):
        raise InputError(f"{where}: {CHUNK}.strength: expected a number, got {short(strength)}")
    texts = {name: values.get(name, "") for name in ("fingerprint", "inputs")}
    for name, text in texts.items():
        if not isinstance(text, str):
            raise InputError(f"{where}: {CHUNK}.{name}: expected text, got {short(text)}")
    if not isinstance(values["sampling"], dict):
        raise InputError(f"{where}: {CHUNK}.sampling: expected an object, got {short(values['sampling'])}")
    sampling = SamplingConfig.from_dict(values["sampling"], f"{where}: {CHUNK}.sampling")
    seed = read_integer(values["seed"], f"{where}: {CHUNK}.seed", 0, 2**128)
    return Origin(layout, seed, sampling, format, strength=strength, batch=_read_batch(values, where), **sides, **texts)


def _read_batch(values: Mapping[str, Any], where: str) -> tuple[tuple[int, ...], int]:
    """The rows of the images of a batch, and the picture's place."""
    batch = values.get("batch", [[1], 0])
    where = f"{where}: {CHUNK}.batch"
    if (
        not isinstance(batch, list)
        or len(batch) != 2
        or not isinstance(batch[0], list)
        or not 0 < len(batch[0]) < 10_000
    ):
        raise InputError(f"{where}: expected rows and a place, got {short(batch)}")
    rows = tuple(read_integer(count, where, 1, MAX_INSTANCES + 1) for count in batch[0])
    return rows, read_integer(batch[1], where, 0, len(rows) - 1)


def _read_chunk(data: bytes, where: str) -> dict[str, Any]:
    if not is_png(data):
        raise InputError(f"{where}: expected a PNG")
    try:
        with Image.open(io.BytesIO(data)) as image:
            text = image.info.get(CHUNK)  # it stands before the pixels
    except Exception as error:  # Pillow raises errors of many kinds for a damaged file
        raise InputError(f"{where}: cannot be read as a PNG: {short(str(error))}") from error
    if text is None:
        raise InputError(f"{where}: expected a picture of this project, found no text {CHUNK!r} in it")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: {CHUNK}: expected JSON: {short(str(error))}") from error
    if not isinstance(values, dict):
        raise InputError(f"{where}: {CHUNK}: expected an object, got {short(values)}")
    return values
