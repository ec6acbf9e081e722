"""Time of a Pallas kernel on a TPU, read from the compiler's schedule; no TPU is needed.

A TPU core runs its bundles of instructions in the order and at the cycles that the compiler has set. So a kernel's time
is the bundles of each loop's body, times its turns, over the clock: all but waiting for main memory. libtpu writes the
schedule of every kernel into a folder when `DUMP_FLAGS` are in LIBTPU_INIT_ARGS before it is loaded.
"""

import glob
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Without the last flag a dump takes 100 MB.
DUMP_FLAGS = "--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final"
# Bundles after a branch that still run before it takes effect.
BRANCH_DELAY = 4

_BUNDLE = re.compile(r"^\s*(?:0x[0-9a-f]+|0)\s+(LB)?[A-Z]*\s*: [> ]*\{")
_EXIT_TEST = re.compile(r"(%p\d+_p\d+) = scmp\.ge\.s32\.totalorder %\w+, (\d+) /\* loop exit test \*/")
_BRANCH = re.compile(r"sbr\.rel \(!?(%p\d+_p\d+)\) target = \$region(\d+)")
_REGION = re.compile(r"Start(?:/End empty)? region (\d+)\b")
_GRID = re.compile(r"^iteration_bounds: \(([\d, ]+)\)", re.MULTILINE)
_ANALYSIS = re.compile(r"(\d+-(.*)-)\d+-schedule-analysis_final_bundles\.txt")


class Loop(NamedTuple):
    """Bundles `first` to `last` run `turns` times; if `guarded`, not in every step of the grid."""

    first: int
    last: int
    turns: int
    guarded: bool


class KernelSchedule(NamedTuple):
    """The static schedule of one kernel.

    Attributes:
        bundles: in the text.
        grid: steps of the kernel's grid; these are the turns of the outermost loop.
        loops: outer ones first.
        open_loops: those whose number of turns the text does not tell, counted once. They copy a grid's last, smaller
            blocks.
    """

    bundles: int
    grid: int
    loops: tuple[Loop, ...]
    open_loops: int

    def cycles(self, guarded: float = 1.0) -> float:
        """Cycles on one core. `guarded`: the share of the grid's steps in which guarded loops run; 1 is a bound."""
        total = 0.0
        for bundle in range(self.bundles):
            around = [loop for loop in self.loops if loop.first <= bundle <= loop.last]
            share = guarded if any(loop.guarded for loop in around) else 1.0
            total += share * math.prod(loop.turns for loop in around)
        return total


def read_schedule(text: str) -> KernelSchedule:
    """A kernel's schedule, from the text of its `…-final_bundles.txt`."""
    bundle, is_body = -1, False
    bodies: dict[str, int] = {}
    skips: dict[str, int] = {}
    loops, guards = [], []
    tests = {name: int(turns) for name, turns in _EXIT_TEST.findall(text)}
    for line in text.splitlines():
        if match := _BUNDLE.match(line):
            bundle, is_body = bundle + 1, bool(match[1])
        for region in _REGION.findall(line):
            if region in skips:
                guards.append((skips.pop(region), bundle))
            if is_body:
                bodies[region] = bundle
        for test, region in _BRANCH.findall(line):
            if region in bodies:
                loops.append((bodies[region], bundle + BRANCH_DELAY, tests.get(test, 0)))
            else:
                skips[region] = bundle
    loops.sort()
    bounds = _GRID.search(text)
    # Else the turns of the outermost loop, which count two more, to fill and drain the buffers.
    grid = math.prod(map(int, bounds[1].split(","))) if bounds else max(1, loops[0][2] - 2) if loops else 1
    result = [Loop(first, last, grid, False) for first, last, _ in loops[:1]]
    for first, last, turns in loops[1:]:
        # One condition is around the whole step: it is false while buffers are filled and drained.
        guarded = sum(start < first and last <= end + BRANCH_DELAY for start, end in guards) > 1
        result.append(Loop(first, last, turns or 1, guarded))
    return KernelSchedule(bundle + 1, grid, tuple(result), sum(not turns for _, _, turns in loops))


def read_dump(folder: Path) -> Iterator[tuple[str, KernelSchedule]]:
    """Name and schedule of each Pallas kernel in a folder that libtpu wrote.

    A name has a suffix where a program runs a kernel several times.
    """
    for path in sorted(folder.iterdir()):
        match = _ANALYSIS.fullmatch(path.name)
        if match and "tpu_custom_call" in path.read_text(errors="replace") and not match[2].startswith("TLP"):
            (bundles,) = folder.glob(f"{glob.escape(match[1])}[0-9][0-9]-final_bundles.txt")
            yield match[2], read_schedule(bundles.read_text(errors="replace"))
