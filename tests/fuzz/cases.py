"""Runs the cases of a family, each reproducible from the family's name and the case's number.

A case writes one of the family's inputs, changed, and reads it. It ends in a result whose invariants hold, or in an
InputError of one line; within 10 s of CPU time and 1 GB of memory, without running what a file holds, and with nothing
written but the output, whole.
"""

import contextlib
import dataclasses
import importlib
import io
import logging
import os
import random
import shutil
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from instdiff_jax.cli import main as run_cli
from instdiff_jax.errors import InputError

# Family -> cases of a long run, and of the short one in the test suite.
FAMILIES = {
    "layouts": (4000, 200),
    "checkpoints": (3000, 40),
    "annotations": (1000, 24),
    "evaluations": (1000, 40),
    "records": (2500, 150),
    "official": (300, 8),
    "imports": (2000, 48),
}
SECONDS, BYTES = 10.0, 1 << 30
BOMB = "INSTDIFF_FUZZ_BOMB"  # a folder that pickled code in the inputs would make in the working folder


@dataclasses.dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        name: for reports.
        write: writes the input into a folder; without a Random as it should be, else with changes.
        read: reads it and checks what comes out; InputError where the input is refused.
        weight: how often it is chosen.
        refused: whether even the unchanged input is refused.
    """

    name: str
    write: Callable[[random.Random | None, Path], None]
    read: Callable[[Path], None]
    weight: int = 1
    refused: bool = False


@dataclasses.dataclass(frozen=True)
class Outcome:
    """How a case ended; `failure` is "" if as it should."""

    number: int
    kind: str
    result: str
    failure: str
    seconds: float
    bytes: int


def open_family(name: str, folder: Path) -> list[Kind]:
    """The kinds of a family; `folder` is for inputs that all cases share."""
    folder.mkdir(parents=True, exist_ok=True)
    kinds = importlib.import_module(f"tests.fuzz.{name}").kinds(folder)
    return [kind for kind in kinds for _ in range(kind.weight)]


def run_valid(kinds: Sequence[Kind], folder: Path) -> None:
    """Every kind's unchanged input gives a result: refusing everything would not pass."""
    for kind in dict.fromkeys(kinds):
        outcome = _run(kind, -1, None, folder)
        assert not outcome.failure, f"{kind.name}: {outcome.failure}"
        assert (outcome.result == "result") != kind.refused, f"{kind.name}: unchanged, and {outcome.result}"


def run_case(family: str, kinds: Sequence[Kind], number: int, folder: Path) -> Outcome:
    """One case."""
    rng = random.Random(f"{family} {number}")
    return _run(rng.choice(kinds), number, rng, folder)


def _run(kind: Kind, number: int, rng: random.Random | None, folder: Path) -> Outcome:
    place = folder / "case"
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    with quiet():
        kind.write(rng, place)
    before, start = _reset_peak(), time.process_time()
    result, failure = "result", ""
    with quiet(), contextlib.chdir(place):
        try:
            kind.read(place)
        except InputError as error:
            result = f"refused: {error}"
            failure = _not_one_line(str(error))
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                raise
            failure = "".join(traceback.format_exception(error)[-12:])
    seconds, used = time.process_time() - start, _peak() - before
    if not failure and seconds > SECONDS:
        failure = f"{seconds:.1f} s of CPU time"
    if not failure and used > BYTES:
        failure = f"{used / 1e9:.2f} GB"
    if (place / BOMB).exists():
        failure = "code in the input was run"
    return Outcome(number, kind.name, result, failure, seconds, used)


def _not_one_line(message: str) -> str:
    return f"expected one line: {message!r}" if {"\n", "\r", "\x1b"} & set(message) else ""


@contextlib.contextmanager
def quiet():
    """Nothing of what is logged, printed or warned."""
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):
                yield
    finally:
        logging.disable(logging.NOTSET)


def command(*argv: object, output: Path, writes_early: bool = False) -> str:
    """Runs a command of `instdiff` in this process; returns what it printed.

    Args:
        argv: the command and its flags.
        output: the folder that it may write.
        writes_early: whether it may leave whole files there when it is refused, such as images that are done.

    Raises:
        InputError: with the command's line, if it ends with exit code 2.
        AssertionError: if it ends in another way than with a result or with one line.
    """
    around = output.parent
    before = _tree(around)
    out, err = io.StringIO(), io.StringIO()
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            run_cli([str(arg) for arg in argv])
        except SystemExit as end:
            code = end.code
    after = _tree(around)
    changed = {path for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    beside = sorted(path for path in changed if path.split("/")[0] not in (output.name, BOMB))
    assert not beside, f"written beside the output: {beside}"
    assert not [path for path in after if ".instdiff-" in path], f"temporary files are left: {sorted(after)}"
    if code == 0:
        return out.getvalue()
    lines = [line for line in err.getvalue().splitlines() if line.startswith("error:")]
    last = err.getvalue().rstrip("\n").splitlines()[-1:]
    assert code == 2 and lines == last, f"exit code {code}, {err.getvalue()[-2000:]}"
    assert writes_early or not changed, f"half-written: {sorted(changed)}"
    raise InputError(lines[0].removeprefix("error: "))


def _tree(folder: Path) -> dict[str, bytes | None]:
    files = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        files[name] = path.read_bytes() if path.is_file() and not path.is_symlink() else None
    return files


def _reset_peak() -> int:
    """Starts a new peak of this process's memory where the system can; returns what it takes now, in bytes."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) << 10
    except (OSError, IndexError):  # not Linux: the peak since the process began
        import resource

        scale = 1 if sys.platform == "darwin" else 1 << 10
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def root_of_cases() -> Path:
    """Where long runs write: memory if there is some, else the disk."""
    return Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else Path("/tmp")
