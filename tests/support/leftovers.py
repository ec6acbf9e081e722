"""What the tests of safe files share: what a killed process leaves, and folders with contents."""

import subprocess
import sys
from pathlib import Path

from instdiff_jax import temporaries


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def left_behind(name: str, pid: int, end: str = "part", host: str | None = None) -> str:
    return f".{name}.instdiff-{host or temporaries.host()}-{pid}-0123456789ab.{end}"


def fill(folder: Path, text: str) -> None:
    for i in range(3):
        (folder / f"{i}.txt").write_text(text)
    (folder / "below").mkdir()
    (folder / "below" / "a.txt").write_text(text)


def read(folder: Path) -> set[str]:
    return {path.read_text() for path in folder.rglob("*.txt")}
