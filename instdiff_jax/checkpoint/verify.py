"""Checksums (CRC-32) of a checkpoint's and a dataset's files, compared while the files are read."""

import json
import os
import sys
import zlib
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.buckets import bucket_errors, is_bucket
from instdiff_jax.errors import InputError
from instdiff_jax.paths import check_regular

CHECKSUMS = "_CRC32"  # file in a part's folder; the underscore marks it as metadata, like orbax's own
_CHUNK = 1 << 22
_THREADS = min(os.cpu_count() or 1, 8)


def file_crc(path: Path, size: int | None = None) -> int:
    """CRC-32 of a file's bytes, or of the first `size` bytes."""
    crc, left = 0, sys.maxsize if size is None else size
    buffer = memoryview(bytearray(_CHUNK))
    with path.open("rb") if is_bucket(path) else open(path, "rb", buffering=0) as file:
        while count := file.readinto(buffer[: min(left, _CHUNK)]):
            crc, left = zlib.crc32(buffer[:count], crc), left - count
    return crc


def file_crcs(folder: Path, names: Iterable[str]) -> dict[str, int]:
    """CRC-32 of the named files of a folder."""
    names = sorted(names)
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(names, pool.map(lambda name: file_crc(folder / name), names), strict=True))


def signed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for a JSON file, with a checksum of themselves: a changed digit in them would pass for another setting."""
    return {**values, "crc32": _values_crc(values)}


def is_intact(values: Mapping[str, Any]) -> bool:
    """Whether values are those that `signed` was given; older files, without a checksum, always are."""
    crc = _values_crc(values)
    return values.get("crc32", crc) == crc


def check_intact(path: Path, values: Mapping[str, Any]) -> None:
    """Raises InputError, naming the file, unless its values are those that `signed` was given."""
    if not is_intact(values):
        raise InputError(f"{path}: damaged or edited: its checksum is of other values; after an edit, remove its crc32")


def _values_crc(values: Mapping[str, Any]) -> int:
    kept = {key: value for key, value in values.items() if key != "crc32"}
    return zlib.crc32(json.dumps(kept, sort_keys=True).encode())


def write_checksums(folder: Path) -> int:
    """Writes the checksums of all files of a folder into it. Returns the checksum of that list."""
    names = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    (folder / CHECKSUMS).write_text(json.dumps(file_crcs(folder, names), indent=0), encoding="utf-8")
    return file_crc(folder / CHECKSUMS)


def compare_files(folder: Path, expected: Mapping[str, Any]) -> None:
    """Raises InputError, naming the file, unless the files of a folder have the expected checksums."""
    check_regular(folder)
    try:
        with bucket_errors(folder):
            found = file_crcs(folder, expected)
    except OSError as error:
        raise InputError(f"{error.filename or folder}: cannot be read: {error.strerror or error}") from error
    for name, crc in expected.items():
        if found[name] != crc:
            raise InputError(f"{folder / name}: damaged: its checksum is not the one of when it was written")


def compare_folder(folder: Path, crc: int) -> None:
    """Compares a folder with the checksums that `write_checksums` wrote; `crc` is what it returned."""
    compare_files(folder, read_checksums(folder, crc))


def read_checksums(folder: Path, crc: int) -> dict[str, int]:
    """What `write_checksums` wrote, by file; `crc` is what it returned. InputError if the list has changed."""
    compare_files(folder, {CHECKSUMS: crc})
    return json.loads((folder / CHECKSUMS).read_text(encoding="utf-8"))


def start_compare_folder(folder: Path, crc: int) -> Future:
    """Runs `compare_folder` in the background while the same files are read, so that the disk is read once."""
    pool = ThreadPoolExecutor(1)
    future = pool.submit(compare_folder, folder, crc)
    pool.shutdown(wait=False)
    return future


def compare_arrays(path: Path, arrays: Iterable[tuple[str, np.ndarray, int, int]]) -> None:
    """Raises InputError, naming the entry, unless parts of a file have the expected checksums.

    Args:
        path: the file, for the error.
        arrays: name, bytes, the checksum to start from (0) and the expected one.
    """
    arrays = list(arrays)
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(lambda entry: zlib.crc32(entry[1].data, entry[2]), arrays))
    for (name, _, _, expected), crc in zip(arrays, found, strict=True):
        if crc != expected:
            raise InputError(f"{path}: {name[:200]}: damaged: its checksum does not match; --no_verify reads it")
