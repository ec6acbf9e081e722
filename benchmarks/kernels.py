"""Which kernels of a program take longest, from jax's profiler."""

import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# They last as long as what they run, which is listed too.
_CONTAINERS = ("while", "call", "conditional")


def find_kernels(run: Callable[[], Any], top: int, calls: int = 3) -> dict[str, Any]:
    """The kernels of a call that take longest, most first.

    Args:
        run: the call; compiled before.
        top: number of kernels.
        calls: that are averaged.

    Returns:
        milliseconds of all kernels in one call, and `kernels`: name, milliseconds and calls in one call, and share.
        Kernels whose names differ in a number at the end only are one.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(calls):
                run()
        (path,) = Path(folder).rglob("*.xplane.pb")
        taken = _durations(jax.profiler.ProfileData.from_file(str(path)))
    whole = sum(nanoseconds for nanoseconds, _ in taken.values())
    ordered = sorted(taken.items(), key=lambda entry: -entry[1][0])[:top]
    kernels = [
        dict(name=name, milliseconds=ns / calls / 1e6, calls=count / calls, share=ns / whole)
        for name, (ns, count) in ordered
    ]
    return dict(milliseconds=whole / calls / 1e6, kernels=kernels)


def _durations(profile: Any) -> dict[str, tuple[float, int]]:
    """Nanoseconds and number of runs by name: of kernels in a GPU's streams, or of a CPU's operations."""
    planes = list(profile.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:GPU")]
    taken: dict[str, tuple[float, int]] = {}
    for plane in devices or planes:
        for line in plane.lines:
            if devices and not line.name.startswith("Stream"):
                continue  # the same time again, by module or operation
            for event in line.events:
                name = re.sub(r"([._]\d+)+$", "", event.name)
                if name in _CONTAINERS or not devices and "hlo_op" not in dict(event.stats):
                    continue
                ns, count = taken.get(name, (0.0, 0))
                taken[name] = ns + event.duration_ns, count + 1
    return taken
