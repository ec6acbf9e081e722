"""Locks of folders: two runs that would write the same files do not run at once."""

import contextlib
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from instdiff_jax.buckets import is_bucket
from instdiff_jax.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

NAME = ".instdiff.lock"
_PATIENCE = 2.0  # seconds; another process may be between taking the lock and writing its name


@contextlib.contextmanager
def lock_folder(folder: Path, key: str = "") -> Iterator[None]:
    """Keeps other runs out of a folder. The system releases the lock of a process that dies.

    Args:
        folder: made if it is not there. A file system that has no locks is used without one, and so is a bucket.
        key: runs of one key may share the folder; without a key none may.

    Raises:
        InputError: if another run has it; names its host and process id.
    """
    handle = _take(folder / NAME, key) if fcntl and not is_bucket(folder) else None
    if handle is None:
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # others of this key are still running
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(folder / NAME)
        os.close(handle)


def _take(path: Path, key: str) -> int | None:
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except FileNotFoundError:  # another run that wrote nothing has just removed the folder
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        except OSError as error:
            raise InputError(f"{path}: cannot be written: {error.strerror}") from error
        try:
            if _hold(handle, key) and _is_at(handle, path):
                return handle
        except BlockingIOError:
            pass
        except OSError:
            os.close(handle)
            return None
        owner, _, found = os.pread(handle, 4096, 0).decode(errors="replace").partition("\n")
        os.close(handle)
        if (owner and found != key) or time.monotonic() > end:
            other = owner or "another process"
            raise InputError(f"{path.parent}: in use by another run ({other}); wait for its end or use another folder")
        time.sleep(0.05)


def _hold(handle: int, key: str) -> bool:
    """Takes the lock alone and signs it, or joins those of the same key. BlockingIOError if others have it."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        if not key or os.pread(handle, 4096, 0).decode(errors="replace").partition("\n")[2] != key:
            raise
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        return True
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n{key}".encode(), 0)
    if key:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    return True


def _is_at(handle: int, path: Path) -> bool:
    """Whether the file is still the one at the path: its last owner removes it."""
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
