"""Goodput: the share of a run's wall time that its steps take, and what takes the rest.

Every moment since the run's first start counts for exactly one cause, also over restarts, so the causes add up to the
wall time. Work that a killed run did after its newest checkpoint is done again: its time counts as restart.
"""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from instdiff_jax.paths import read_file

# steps: computing, or waiting for a step's numbers. restart: from the last line in metrics.jsonl that a later process
# kept to that process's first step. compile: a process's first step. data_wait: the loop has no batch; the devices may
# still compute the step before.
CAUSES = ("steps", "start", "restart", "compile", "data_wait", "checkpoint", "validation", "samples")
_PREFIX = "seconds/"


def _now() -> float:
    return time.time()


class Goodput:
    """Seconds of a run by cause.

    Args:
        now: the clock, in seconds since 1970; processes on several machines share it.
    """

    def __init__(self, now: Callable[[], float] = _now):
        self._now, self._seconds = now, dict.fromkeys(CAUSES, 0.0)
        self._began = self._since = now()
        self._cause = "start"

    def resume(self, line: Mapping[str, Any] | None) -> None:
        """Goes on after a line of metrics.jsonl: what came since, this process's start included, is a restart.

        Call before the first step. None, or a line of a version without these numbers, changes nothing.
        """
        if line is None or not _is_number(line.get("time")) or f"{_PREFIX}steps" not in line:
            return
        self.switch("restart")
        started = sum(self._seconds.values())
        values = {cause: line.get(f"{_PREFIX}{cause}") for cause in CAUSES}
        self._seconds = {cause: float(value) if _is_number(value) else 0.0 for cause, value in values.items()}
        self._seconds["restart"] += started + max(self._began - line["time"], 0.0)

    def switch(self, cause: str) -> str:
        """From now on, time counts for this cause; returns the one before."""
        now, before = self._now(), self._cause
        self._seconds[before] += max(now - self._since, 0.0)
        self._since, self._cause = now, cause
        return before

    @contextlib.contextmanager
    def of(self, cause: str) -> Iterator[None]:
        """Time inside counts for this cause, except for what other causes take inside it."""
        before = self.switch(cause)
        try:
            yield
        finally:
            self.switch(before)

    def values(self) -> dict[str, float]:
        """The steps' share of the wall time so far, and the seconds by cause."""
        self.switch(self._cause)
        wall = max(sum(self._seconds.values()), 1e-9)
        seconds = {f"{_PREFIX}{cause}": taken for cause, taken in self._seconds.items()}
        return {"goodput": self._seconds["steps"] / wall} | seconds

    def __str__(self) -> str:
        values = self.values()
        wall = sum(self._seconds.values())
        shares = [(cause, taken / max(wall, 1e-9)) for cause, taken in self._seconds.items() if cause != "steps"]
        rest = ", ".join(f"{cause} {share:.1%}" for cause, share in shares if share >= 0.0005)
        return f"goodput: steps took {values['goodput']:.1%} of {wall:.0f} s; {rest or 'nothing else took time'}"


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The lines of a metrics.jsonl as text and as values, without what is none of a run's or was cut by a kill."""
    for text in read_file(path).decode("utf-8", "replace").splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError, RecursionError):
            line = json.loads(text)
            if isinstance(line, dict) and _is_number(line.get("step")):
                yield text, line


def line_at(path: Path, step: int) -> dict[str, Any] | None:
    """The last line of a metrics.jsonl up to a step that has a goodput; None if there is none."""
    found = [line for _, line in read_lines(path) if line["step"] <= step and "goodput" in line]
    return found[-1] if found else None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
