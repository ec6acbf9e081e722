"""Safe files: a file or folder is written beside its place and moved there when it is whole.

A program that is killed leaves the old file or folder, never half of a new one. Temporary names are hidden and
recognisably ours, `.NAME.instdiff-HOST-PID-ID.part`, so that `remove_leftovers` can tell them from a user's files.
"""

import contextlib
import ctypes
import io
import json
import os
import shutil
import tempfile
import time
import types
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from instdiff_jax.buckets import as_path, bucket_errors, is_bucket, upload_folder
from instdiff_jax.errors import FULL_DISK, InputError, short
from instdiff_jax.paths import read_file
from instdiff_jax.temporaries import OURS, in_use, is_left, name_beside, shortened

_FULL = tuple(os.strerror(code) for code in FULL_DISK)


def write_file(path: str | os.PathLike, write: Callable[[BinaryIO], object], sync: bool = True) -> None:
    """Writes a file, whole or not at all. Missing parent folders are made.

    Args:
        path: where. A link stays a link; a device or pipe, such as /dev/stdout, is written directly. In a bucket
            the file is made in memory.
        write: called with a binary file.
        sync: wait for the disk, so that the file is whole after a power failure too; costs milliseconds.

    Raises:
        InputError: if the file cannot be written.
    """
    if is_bucket(path):
        content = io.BytesIO()
        write(content)
        with bucket_errors(path, "cannot be written"):
            as_path(path).write_bytes(content.getvalue())
        return
    path = Path(path)
    with write_errors(path):
        if path.is_dir():
            raise IsADirectoryError(None, "is a folder")
        if path.exists() and not path.is_file():
            with open(path, "wb") as file:
                write(file)
            return
        path = Path(os.path.realpath(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        if sync:  # of small files written without, there may be thousands; their command cleans up where it starts
            remove_leftovers(path.parent, path.name)
        with _temporary(path) as beside:
            try:
                with open(beside, "xb") as file:
                    write(file)
                    file.flush()
                    if sync:
                        os.fsync(file.fileno())
                os.replace(beside, path)
            finally:
                beside.unlink(missing_ok=True)


def write_text(path: str | os.PathLike, text: str, sync: bool = True) -> None:
    """Writes text as UTF-8, whole or not at all; see `write_file`."""
    data = text.encode()
    write_file(path, lambda file: file.write(data), sync)


def write_json(path: str | os.PathLike, value: Any, indent: int | None = 1, sync: bool = True) -> None:
    """Writes JSON as UTF-8, whole or not at all; see `write_file`."""
    text = json.dumps(value, indent=indent, ensure_ascii=False) + "\n"
    try:
        text.encode()
    except UnicodeEncodeError:  # half of a surrogate pair, which only an escape can hold
        text = json.dumps(value, indent=indent) + "\n"
    write_text(path, text, sync)


def write_array(path: str | os.PathLike, array: np.ndarray, sync: bool = True) -> None:
    """Writes a .npy file, whole or not at all; see `write_file`."""
    # numpy does not say why it cannot write to what it knows to be a file.
    write_file(path, lambda file: np.save(types.SimpleNamespace(write=file.write), array, allow_pickle=False), sync)


def read_json(path: str | os.PathLike) -> Any:
    """Reads a JSON file in UTF-8; an integer of thousands of digits becomes infinity.

    Raises:
        InputError: if it is missing, is not valid JSON, or has a key twice in one object, of which one would be lost.
    """
    try:
        return json.loads(read_file(path).decode("utf-8-sig"), object_pairs_hook=_object, parse_int=_integer)
    except InputError:
        raise
    except UnicodeDecodeError as error:
        byte = f"{error.object[error.start]:#04x}"
        raise InputError(f"{path}: not valid JSON: expected UTF-8, got the byte {byte}") from error
    except RecursionError as error:
        raise InputError(f"{path}: not valid JSON: too deeply nested") from error
    except ValueError as error:
        raise InputError(f"{path}: not valid JSON: {' '.join(str(error).split())}") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {short(twice)} occurs twice in one object")
    return found


def _integer(text: str) -> int | float:
    return int(text) if len(text) < 4000 else float(text)  # infinity: the fault of its field, not of the file


def json_files(folder: str | os.PathLike, inner: bool = False) -> list[Path]:
    """The .json files of a folder, in any case, sorted; `inner` looks into its folders too.

    Hidden files and folders are left out, such as the copies in .ipynb_checkpoints and macOS' ._x.json.
    """
    folder = Path(folder)
    found = folder.rglob("*") if inner else folder.glob("*")
    return sorted(
        path
        for path in found
        if path.suffix.lower() == ".json"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and not path.is_dir()
    )


@contextlib.contextmanager
def replace_folder(path: str | os.PathLike, sync: bool = True, last: str = "") -> Iterator[Path]:
    """Gives an empty folder beside `path` that takes its place at the end of the block.

    If the block raises, the new folder is removed and the old one stays. What a killed process left of an earlier
    attempt is removed first.

    Args:
        path: the folder to make or replace; missing parents are made.
        sync: wait for the disk, so that the folder is whole after a power failure too.
        last: in a bucket, where nothing can be renamed, the file without which the folder counts as unfinished.

    Raises:
        InputError: if the folder cannot be written.
    """
    if is_bucket(path):
        with tempfile.TemporaryDirectory(prefix="instdiff-") as local:
            yield Path(local)
            upload_folder(Path(local), path, last)
        return
    path = Path(os.path.realpath(path))
    with write_errors(path):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(None, "is not a folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(path.parent, path.name)
        with _temporary(path) as beside:
            beside.mkdir()
            try:
                yield beside
                if sync:
                    _sync_folder(beside)
                _move_folder(beside, path)
            except BaseException:
                remove_folder(beside)
                raise
            finally:
                shutil.rmtree(beside, ignore_errors=True)


def remove_leftovers(folder: str | os.PathLike, name: str | None = None) -> None:
    """Removes what killed processes left in a folder, and restores a folder that one was replacing.

    Only our temporary names are touched, and only if their process is gone. To be called where a command starts.

    Args:
        folder: where to look; may be missing.
        name: of the file or folder that they were writing; any by default.
    """
    folder = Path(folder)
    try:
        paths = [Path(entry.path) for entry in os.scandir(folder)]
    except OSError:  # a missing folder holds nothing
        return
    for path in paths:
        match = OURS.fullmatch(path.name)
        if match is None:
            continue
        if name is not None and match["name"] != shortened(name, len(path.name) - match.end("name")):
            continue
        with contextlib.suppress(OSError):  # another process may be cleaning up too
            if not is_left(path, match):
                continue
            place = folder / (name or match["name"])
            if match["end"] == "old" and not place.exists():
                os.rename(path, place)
            elif path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def remove_folder(path: Path, patience: float = 5.0) -> None:
    """Removes a folder in which threads of a failed save may still make files, until it stays away."""
    end, checks = time.monotonic() + patience, 0
    while checks < 4 and time.monotonic() < end:
        checks = 0 if path.exists() else checks + 1
        shutil.rmtree(path, ignore_errors=True)
        time.sleep(0.05)


def recover_folder(path: str | os.PathLike) -> None:
    """Brings back a folder that a killed process was replacing. Call before reading one."""
    if not os.path.lexists(path):
        remove_leftovers(Path(path).absolute().parent, Path(path).name)


@contextlib.contextmanager
def _temporary(path: Path) -> Iterator[Path]:
    beside = name_beside(path, "part")
    in_use.add(str(beside))
    try:
        yield beside
    finally:
        in_use.discard(str(beside))


@contextlib.contextmanager
def scratch_folder(name: str) -> Iterator[Path]:
    """A folder for temporary files that is removed at the end of the block; what killed processes left goes too."""
    path = Path(tempfile.gettempdir()) / f"instdiff-{name}"
    remove_leftovers(path.parent, path.name)
    with _temporary(path) as beside:
        beside.mkdir(mode=0o700)
        try:
            yield beside
        finally:
            shutil.rmtree(beside, ignore_errors=True)


@contextlib.contextmanager
def write_errors(path: str | os.PathLike) -> Iterator[None]:
    """Turns an OSError into an InputError that names the file the user asked for, not its temporary name.

    So it does with the errors of libraries in C++ that hold the system's text for a full disk.
    """
    try:
        yield
    except InputError:
        raise
    except OSError as error:
        what = error.strerror or str(error)
        if error.filename is not None and ".instdiff-" not in str(error.filename):
            what += "" if str(error.filename) == str(path) else f": {error.filename}"
        raise InputError(f"{path}: cannot be written: {what}") from error
    except (ValueError, RuntimeError) as error:
        full = [text for text in _FULL if text in str(error)]
        if not full:
            raise
        raise InputError(f"{path}: cannot be written: {full[0]}") from error


def with_defaults(record: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A record as read, whose writer may not have known some settings yet: those had their defaults.

    Args:
        record: as JSON gives it.
        defaults: nested as the record is; used only inside of objects that the record has.
    """
    filled = dict(record)
    for name, value in json.loads(json.dumps(defaults)).items():
        if isinstance(value, dict) and isinstance(record.get(name), dict):
            filled[name] = value | with_defaults(record[name], value)
    return filled


def _move_folder(beside: Path, path: Path) -> None:
    """Puts `beside` at `path`; an old folder there ends at `beside` or is removed."""
    if not path.exists():
        try:
            os.rename(beside, path)
            return
        except OSError:
            if not path.exists():  # else another process has put a folder there by now
                raise
    if _exchange(beside, path):
        return
    # Two moves, between which there is no folder: a process killed there leaves `old`, which the next start restores.
    old = name_beside(path, "old")
    in_use.add(str(old))
    try:
        os.rename(path, old)
        os.rename(beside, path)
    finally:
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            os.rename(old, path)
        in_use.discard(str(old))


def _exchange(a: Path, b: Path) -> bool:
    """Swaps two folders in one step; False if the system or the file system cannot."""
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # only Linux has it
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(a), at_fdcwd, os.fsencode(b), rename_exchange) == 0


def _sync_folder(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
