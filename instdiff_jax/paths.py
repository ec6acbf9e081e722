"""Safe paths: which files are read as input, and where a name that comes from a file may be written."""

import os
import stat
from pathlib import Path

from instdiff_jax.buckets import as_path, bucket_errors, is_bucket
from instdiff_jax.errors import InputError, short


def read_file(path: str | os.PathLike, folder: str | os.PathLike | None = None) -> bytes:
    """The content of an input file.

    Args:
        path: a regular file (a device has no end, and a pipe may never answer), or one in a bucket.
        folder: for a path that comes from a file: the folder that it is in. It may not lead out of it; a link that the
            user put into the folder may.

    Raises:
        InputError: if the file cannot be read, is not a regular file, or is outside the folder.
    """
    if folder is not None:
        path = inside(folder, os.fspath(path))
    if is_bucket(path):
        with bucket_errors(path):
            return as_path(path).read_bytes()
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with open(handle, "rb") as file:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise InputError(f"{path}: expected a regular file, found a device or pipe")
            return file.read()
    except (OSError, ValueError) as error:
        if isinstance(error, InputError):
            raise
        reason = error.strerror if isinstance(error, OSError) else None
        raise InputError(f"{path}: cannot be read: {reason or error}") from error


def check_regular(path: str | os.PathLike) -> None:
    """For what other libraries open: InputError for a device or pipe at a path, or anywhere in it if it is a folder.

    What is missing is left for the reader to say.
    """
    path = Path(path)
    for each in (path, *path.rglob("*")):
        if each.exists() and not each.is_file() and not each.is_dir():
            raise InputError(f"{each}: expected a regular file, found a device or pipe")


def inside(folder: str | os.PathLike, name: str, where: str = "") -> Path:
    """The path of a file that another file names in the field `where`; InputError if it leads out of the folder."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise InputError(f"{where}{': ' * bool(where)}expected a path inside {folder}, got {short(name)}")
    return as_path(folder) / path


def output_path(folder: str | os.PathLike, *names: str) -> Path:
    """A path below an output folder. The folder itself may be a link; nothing below it may.

    Raises:
        InputError: for a name that is not the plain name of a file or folder, is hidden, or is a link there.
    """
    path = as_path(folder)
    for name in names:
        if not name or name.startswith(".") or any(sign in name for sign in (os.sep, os.altsep or os.sep, "\0")):
            raise InputError(f"{path}: {short(name)} cannot be the name of a file there; rename the input")
        path /= name
        if os.path.islink(path):
            raise InputError(f"{path}: is a link, which could lead out of the output folder; remove it")
    return path


def cache_folder() -> Path:
    """Where this package keeps what it can make again: compiled programs and kernels, copies of buckets."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "instdiff_jax"
