"""Processes to measure in, clocks, and peak memory."""

import importlib
import math
import multiprocessing
import os
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any

# Two sides may share one GPU, so neither may reserve all of its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


class Worker:
    """An object in its own process: its memory is measured separately, and it is idle between calls."""

    def __init__(self, target: str, *args: Any, cores: int | None = None):
        """Makes an object of a class.

        Args:
            target: the class, as "module:name".
            args: for the class.
            cores: bind the process to this many cores.
        """
        self._pool = ProcessPoolExecutor(
            1, multiprocessing.get_context("spawn"), _start, initargs=(target, args, cores)
        )

    def __getattr__(self, method: str) -> Callable[..., Any]:
        return lambda *args, **options: self._pool.submit(_call, method, args, options).result()

    def start(self) -> Future[int]:
        """Starts the process now; the result is there when its object is made."""
        return self._pool.submit(int)

    def close(self) -> None:
        """Ends the process."""
        self._pool.shutdown()


_object: Any = None


def _start(target: str, args: tuple, cores: int | None) -> None:
    global _object
    if cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])
    module, name = target.split(":")
    _object = getattr(importlib.import_module(module), name)(*args)


def _call(method: str, args: tuple, options: dict) -> Any:
    return getattr(_object, method)(*args, **options)


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(function: Callable[[], Any]) -> float:
    """Seconds that a call takes; the call must block until its result is ready."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(
    sides: Mapping[str, Callable[[], float]],
    repeats: int,
    budget: float = math.inf,
    failed: dict[str, str] | None = None,
) -> dict[str, float]:
    """Median seconds of each side. Sides take turns (A B A B …), so that other load on the machine affects all alike.

    Args:
        sides: name to a function that returns its seconds; warm up before.
        repeats: turns of each side.
        budget: stop after this many seconds, once every side has had a turn.
        failed: receives the error of a side that fails, which is then left out; None: the error is raised.
    """
    taken: dict[str, list[float]] = {name: [] for name in sides}
    start = time.perf_counter()
    for turn in range(repeats):
        if turn and time.perf_counter() - start > budget:
            break
        for name in list(taken):
            try:
                taken[name].append(sides[name]())
            except RuntimeError as error:
                if failed is None:
                    raise
                failed[f"{name}_failed"] = failure(error)
                del taken[name]
    return {name: statistics.median(times) for name, times in taken.items()}


class HostMemory:
    """Peak resident memory of this process, from Linux's counters; NaN on other systems."""

    def reset(self) -> None:
        """Starts a new peak."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            pass

    def peak(self) -> float:
        """Peak bytes since the last reset."""
        try:
            status = Path("/proc/self/status").read_text()
        except OSError:
            return math.nan
        return 1024.0 * int(status.split("VmHWM:")[1].split()[0])


def failure(error: RuntimeError) -> str:
    """What a table says about a side that failed, for example of memory or in a compiler; stderr has its traceback."""
    traceback.print_exception(error)
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
