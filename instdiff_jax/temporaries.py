"""Names of temporary files and folders: `.NAME.instdiff-HOST-PID-ID.part`, or `.old` for one that is replaced.

Hidden and recognisably ours, so that what a killed process left is told from a user's files; see `files.py`.
"""

import functools
import hashlib
import os
import re
import socket
import time
import uuid
from pathlib import Path

from instdiff_jax.processes import is_alive, started

OURS = re.compile(
    r"\.(?P<name>.+)\.instdiff-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-[0-9a-f]{12}\.(?P<end>part|old)", re.DOTALL
)
_LONGEST_NAME = 255  # bytes, on nearly all file systems
_FOREIGN_AGE = 24 * 3600  # seconds
in_use: set[str] = set()  # paths of this process; in a container every process may have the same number


def is_left(path: Path, match: re.Match) -> bool:
    """Whether the process that made a temporary file or folder is gone.

    Processes of other hosts cannot be seen: there what has not changed for a day is left (for an old folder that is
    hidden a minute: one move later it is replaced). In a container that is started again, the same process id may
    belong to another process, which is younger than what it would have made.
    """
    if str(path) in in_use:
        return False
    pid, changed = int(match["pid"]), last_change(path)
    if match["host"] != host():
        return time.time() - changed > (_FOREIGN_AGE if match["end"] == "part" else 60)
    if pid == os.getpid():
        return True
    return not is_alive(pid) or started(pid) > changed + 60


def last_change(path: Path) -> float:
    """When a file, or anything in a folder, last changed, in seconds since 1970."""
    return max([os.lstat(path).st_ctime, *(os.lstat(inner).st_mtime for inner in path.rglob("*"))])


@functools.cache
def host() -> str:
    """A short name of this host."""
    return hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]


def name_beside(path: Path, end: str) -> Path:
    """A new temporary name of this process beside a path; `end` is "part" or "old"."""
    ours = f".instdiff-{host()}-{os.getpid()}-{uuid.uuid4().hex[:12]}.{end}"
    return path.with_name(f".{shortened(path.name, len(ours))}{ours}")


def shortened(name: str, others: int) -> str:
    """A name that leaves room for other signs, and a point, in the longest name of a file."""
    return name.encode(errors="surrogateescape")[: _LONGEST_NAME - others - 1].decode(errors="ignore")
