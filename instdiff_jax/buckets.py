"""Google Cloud Storage: gs://BUCKET/NAME where a command takes a file or folder.

etils' path (over gcsfs) reads and writes objects; orbax and tensorstore read and write arrays there by themselves.
An object appears whole or not at all. There are no renames and no locks: a folder is whole once its last file is there
(`upload_folder`), and of two runs in one folder the later one goes on (`Owner`).
"""

import contextlib
import functools
import os
import re
import socket
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from instdiff_jax.errors import InputError

_START = re.compile(r"gs:/+")  # pathlib makes one slash of two
OWNER = ".instdiff.owner"


def is_bucket(path: str | os.PathLike) -> bool:
    """Whether a path is in a bucket."""
    return _START.match(str(path)) is not None


def as_path(path: str | os.PathLike) -> Path:
    """A path on this machine, or one in a bucket, which has the same methods except for `rglob` and `absolute`.

    Raises:
        InputError: for a path in a bucket without the packages that read it.
    """
    if not is_bucket(path):
        return Path(path)
    _file_system()
    from etils import epath

    return epath.Path(_START.sub("gs://", str(path), count=1))  # type: ignore[return-value]


def absolute(path: str | os.PathLike) -> Path:
    """As `as_path`, and the same from every folder."""
    return as_path(path) if is_bucket(path) else Path(path).absolute()


@functools.cache
def _file_system() -> Any:
    os.environ.setdefault("EPATH_USE_TF", "false")  # where TensorFlow is installed, etils would import it
    try:
        import fsspec
        import gcsfs  # noqa: F401
        import google.cloud.storage  # noqa: F401
    except ImportError as error:
        raise InputError("paths that start with gs:// need gcsfs; pip install 'instdiff_jax[gcs]'") from error
    # tensorstore and other processes write there too, which a cached listing would not show.
    fsspec.config.conf.setdefault("gs", {}).setdefault("use_listings_cache", False)
    return fsspec.filesystem("gs")


@contextlib.contextmanager
def bucket_errors(path: str | os.PathLike, what: str = "cannot be read") -> Iterator[None]:
    """For a path in a bucket, makes an InputError of one line of whatever the network raises."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not is_bucket(path):
            raise
        raise InputError(f"{path}: {what}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such object or bucket"
    return " ".join(str(error).split())[:300] or type(error).__name__


def unreachable(error: Exception) -> bool:
    """Whether an error says that a bucket could not be read now, and nothing about what is in it."""
    if type(error).__module__.partition(".")[0] in ("gcsfs", "google", "aiohttp"):
        return True
    return re.search(r"HTTP response code: (?!404)|Forbidden:|UNAVAILABLE|PERMISSION_DENIED", str(error)) is not None


def objects(folder: str | os.PathLike) -> dict[str, dict[str, Any]]:
    """What a folder in a bucket holds: each object's facts (size, updated) by its name below the folder."""
    root = str(as_path(folder)).removeprefix("gs://").rstrip("/") + "/"
    with bucket_errors(folder):
        try:
            found = _file_system().find(root, detail=True)
        except FileNotFoundError:
            return {}
    return {name.removeprefix(root): facts for name, facts in found.items() if facts["type"] == "file" and name > root}


def files_below(folder: Path) -> dict[str, int]:
    """The size of every file in a folder and its folders, by its name below the folder; sorted part by part."""
    if is_bucket(folder):
        sizes = {name: facts["size"] for name, facts in objects(folder).items()}
    else:
        files = (path for path in folder.rglob("*") if path.is_file())
        sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    return dict(sorted(sizes.items(), key=lambda item: item[0].split("/")))


def upload_folder(local: Path, folder: str | os.PathLike, last: str = "", only_add: bool = False) -> None:
    """Copies a folder to a bucket, in place of what is there.

    Args:
        local: the folder.
        folder: in a bucket.
        last: the file without which the folder counts as unfinished: it goes first and comes last.
        only_add: keep what else is there.

    Raises:
        InputError: if it cannot be written.
    """
    from fsspec.callbacks import TqdmCallback

    target, old = as_path(folder), set() if only_add else set(objects(folder))
    names = sorted(files_below(local), key=lambda name: (name == last, name))
    with bucket_errors(folder, "cannot be written"):
        if last in old:
            (target / last).unlink()
        head = names[:-1] if last in names else names
        bar = TqdmCallback(tqdm_kwargs=dict(desc=f"to {target}", unit="file", disable=not sys.stderr.isatty()))
        if head:
            files = [str(local / name) for name in head], [str(target / name) for name in head]
            _file_system().put(*files, callback=bar)
        for name in old - set(names):
            (target / name).unlink(missing_ok=True)
        if last in names:
            (target / last).write_bytes((local / last).read_bytes())


def move_folder(source: Path, target: Path) -> None:
    """Moves a folder; in a bucket object by object."""
    if not is_bucket(source):
        source.rename(target)
        return
    with bucket_errors(target, "cannot be written"):
        for name in objects(source):
            _file_system().copy(str(source / name), str(target / name))
            (source / name).unlink()


def check_writable(folder: Path) -> None:
    """Raises InputError unless objects can be written below a folder in a bucket, and removed."""
    with bucket_errors(folder, "cannot be written"):
        probe = folder / f".writable.{uuid.uuid4().hex}"
        probe.write_bytes(b"")
        probe.unlink()


class Owner:
    """The run that may write to a folder in a bucket: the one that came last.

    A lock there would outlive a killed process. So nobody waits: a run that starts signs the folder, and one that finds
    another's signature stops before it writes.
    """

    def __init__(self, folder: Path):
        """Signs the folder."""
        self._path = folder / OWNER
        self._text = f"process {os.getpid()} on {socket.gethostname()}, {uuid.uuid4().hex[:12]}"
        with bucket_errors(folder, "cannot be written"):
            self._path.write_bytes(self._text.encode())

    def check(self) -> None:
        """Raises InputError if another run has signed since."""
        with bucket_errors(self._path):
            found = self._path.read_bytes().decode(errors="replace")
        if found != self._text:
            raise InputError(f"{self._path.parent}: another run has started there ({found[:100]}); this one stops")
