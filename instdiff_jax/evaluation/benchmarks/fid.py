"""FID of a benchmark's pictures: their Fréchet distance to a folder of real pictures."""

import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from PIL import Image

from instdiff_jax.data.importers.scene import is_image
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detectors import Features, open_features
from instdiff_jax.evaluation.fid import distance_to, fit_gaussian
from instdiff_jax.evaluation.measure import describe
from instdiff_jax.files import read_json, write_json
from instdiff_jax.images import open_image
from instdiff_jax.paths import read_file

BATCH = 32  # pictures in memory at a time
NAMES = "inception:FILE or python:MODULE:FUNCTION"


class Reference(NamedTuple):
    """What pictures are compared with, and by which features.

    Attributes:
        name: what --features says.
        features: the function of pictures.
        folder: the real pictures'.
        pictures: the real pictures.
    """

    name: str
    features: Features
    folder: Path
    pictures: Sequence[Path]


class Fid(NamedTuple):
    """A distance and, in sentences, what it was measured on."""

    value: float
    notes: Sequence[str]


def open_reference(name: str | None, folder: Path | None) -> Reference | None:
    """What the flags --features and --real name; None without either.

    Raises:
        InputError: for one flag without the other, features that cannot be opened, and fewer than two pictures.
    """
    if name is None and folder is None:
        return None
    if folder is None:
        raise InputError("--real: expected a folder of real pictures, for the FID that --features measures")
    if name is None or name.partition(":")[0] not in ("inception", "python"):
        raise InputError(f"--features: expected {NAMES}, for the FID to --real; got {name or 'nothing'}")
    pictures = [path for path in sorted(folder.rglob("*")) if path.is_file() and is_image(path)]
    if len(pictures) < 2:
        raise InputError(f"--real: {folder}: expected two or more real pictures, found {len(pictures)}")
    features = open_features(name, None)
    assert features is not None
    return Reference(name, features, folder, pictures)


def measure_fid(
    drawn: Sequence[Path], reference: Reference, output: Path, report: Callable[[int], object] = lambda count: None
) -> Fid:
    """The distance of drawn to real pictures; kept in OUTPUT/fid.json until a picture changes.

    Args:
        drawn: files of pictures of one size; real ones are squeezed into that size, as layouts are.
        reference: the real pictures and the features.
        output: the benchmark's folder.
        report: called with the number of pictures that are done.

    Raises:
        InputError: for pictures that are missing or broken, and features that are not finite.
    """
    path = output / "fid.json"
    facts: dict[str, Any] = {"features": reference.name, "real": str(reference.folder.absolute())}
    for key, files in (("pictures", drawn), ("real_pictures", reference.pictures)):
        facts |= {key: len(files), f"{key}_crc32": _contents(files)}
    kept = read_json(path) if path.exists() else {}
    if not isinstance(kept, dict) or {key: kept.get(key) for key in facts} != facts or "FID" not in kept:
        with Image.open(drawn[0]) as first:
            size = first.size
        described = [_describe(files, size, reference.features, report) for files in (drawn, reference.pictures)]
        real = fit_gaussian(described[1], "features of the real pictures")
        distance, remarks = distance_to(described[0], real, min(map(len, described)))
        kept = facts | {"FID": distance, "remarks": remarks}
        write_json(path, kept, indent=2)
    said = f"FID (lower is better): {len(drawn)} drawn and {len(reference.pictures)} real pictures, {reference.name}."
    return Fid(float(kept["FID"]), [said, *kept.get("remarks", ())])


def _contents(files: Sequence[Path]) -> int:
    crc = 0
    for path in files:
        crc = zlib.crc32(read_file(path), crc)
    return crc


def _describe(
    files: Sequence[Path], size: tuple[int, int], features: Features, report: Callable[[int], object]
) -> Float[np.ndarray, "n d"]:
    rows = []
    for start in range(0, len(files), BATCH):
        part = files[start : start + BATCH]
        rows.append(describe(features, np.stack([_read(path, size) for path in part])))
        report(len(part))
    return np.concatenate(rows)


def _read(path: Path, size: tuple[int, int]) -> np.ndarray:
    try:
        image = open_image(read_file(path))
    except ValueError as error:  # an InputError is one too
        raise InputError(f"{path}: cannot be read as an image ({error})") from error
    return np.asarray(image if image.size == size else image.resize(size, Image.Resampling.BICUBIC))
