"""Shared memory in which the loader's workers hand over batches, under names that tell whose it is.

A name is instdiff-SPACE-PID-ID: the main process, and the space in which its process id counts (containers may share
/dev/shm). So what a run left that was killed with all its workers is found and removed by the next one.
"""

import contextlib
import math
import multiprocessing
import os
import re
import uuid
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

import numpy as np
from grain.multiprocessing import SharedMemoryArray

from instdiff_jax.processes import is_alive, started

FOLDER = Path("/dev/shm")
_OURS = re.compile(r"instdiff-(?P<space>\d+)-(?P<pid>\d+)-[0-9a-f]{12}")


def new_segment(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """An array in shared memory, which grain hands to the main process without a copy. Call it in a worker."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    if not size:  # no segment is that small
        return np.empty(shape, dtype)
    name = f"instdiff-{_space()}-{multiprocessing.parent_process().pid}-{uuid.uuid4().hex[:12]}"
    return SharedMemoryArray.from_shared_memory(SharedMemory(name, create=True, size=size), shape, dtype)


def remove_segments(ended: int | None = None) -> None:
    """Removes the segments of main processes that are gone: of the one that has just `ended`, or of all."""
    for path in FOLDER.glob("instdiff-*"):
        match = _OURS.fullmatch(path.name)
        if match is None or int(match["space"]) != _space():
            continue
        with contextlib.suppress(OSError):  # another process may be cleaning up too
            if path.stat().st_uid == os.getuid() and _is_left(int(match["pid"]), path, ended):
                if path.stat().st_size:
                    SharedMemory(path.name).unlink()  # and tells Python's resource tracker, which would warn
                else:  # its worker was killed before it gave it a size: nothing to map, and no tracker knows of it
                    path.unlink()


def _is_left(pid: int, path: Path, ended: int | None) -> bool:
    if ended is not None:
        return pid == ended
    # A process that has the number of one that is gone is younger than its segments.
    return not is_alive(pid) or started(pid) > path.stat().st_mtime + 60


def _space() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0
