"""Processes of this host: whether one runs, and since when."""

import os
import re
from pathlib import Path


def is_alive(pid: int) -> bool:
    """Whether a process of this host runs; True where that cannot be told."""
    if os.name != "posix":  # os.kill would send a signal there
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def started(pid: int) -> float:
    """When a process started, in seconds since 1970; 0 where that cannot be told (only Linux tells)."""
    try:
        ticks = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        (boot,) = re.findall(r"^btime (\d+)$", Path("/proc/stat").read_text(), re.MULTILINE)
        return int(boot) + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, TypeError):
        return 0.0
