"""Every number of the GPU table within a few minutes on a card, the most wanted first.

    python -m benchmarks.gpu --minutes 9 --reference InstanceDiffusion
    python -m benchmarks.gpu --minutes 5 --reference InstanceDiffusion --rows training compiled    # more, later
    python -m benchmarks.gpu --dry --model small --minutes 3                                       # tried on a CPU

Each row runs in its own process. OUTPUT/gpu.json and gpu.md are written before the first row and after every one, and
OUTPUT/ROW.log keeps all that a row said. A row that fails is a result with its traceback; the others still run. A row
that no longer fits the time is left out, which the table says; one that takes longer than the time is stopped, and
keeps what it measured until then. Rows of an earlier call in the same folder are kept unless they run again.
"""

import argparse
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, models
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error

DRY_CANVAS = 64  # pixels
LOG_LINES = 60  # of a failed row's log, in the report


@dataclasses.dataclass(frozen=True)
class Row:
    """A measurement: its name, what it measures, and an estimate of its seconds on a card and in a dry run."""

    name: str
    title: str
    seconds: float
    dry: float


# In the order of worth. All seconds are estimates; a dry run's are for the small model on two idle cores.
ROWS = (
    Row("checks", "correctness on the card", 60, 60),
    Row("one", "one picture of 6 instances, MIS 0.36, 50 steps", 130, 70),
    Row("eight", "eight pictures of the same", 160, 70),
    Row("unet", "one UNet evaluation", 110, 30),
    Row("kernels", "kernels of one UNet evaluation", 45, 25),
    Row("training", "one training step of 8 images", 110, 100),
    Row("compiled", "one UNet evaluation, the official code under torch.compile", 150, 90),
    Row("pictures32", "32 pictures", 130, 70),
    Row("fast", "one picture with --preset fast", 80, 60),
    Row("reuse", "one picture with --reuse 3", 80, 60),
    Row("masked", "one picture with masked attention", 80, 60),
    Row("startup", "from sample.py's start to the first picture", 150, 70),
    Row("pictures128", "128 pictures", 160, 70),
)


@dataclasses.dataclass
class Outcome:
    """What came of a row.

    Attributes:
        state: done, failed, stopped (at the end of the time) or left out.
        seconds: it took.
        lines: of the table, as `gpu_rows` writes them.
        raw: all that was measured.
        machine: see `tables.machine_facts`.
        why: one sentence if it is not done.
        log: the end of its log if it failed.
    """

    state: str
    seconds: float = 0.0
    lines: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    raw: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    machine: dict[str, Any] = dataclasses.field(default_factory=dict)
    why: str = ""
    log: str = ""


# Runs a row for at most some seconds.
Launch = Callable[[Row, float], Outcome]


def run_rows(
    rows: Sequence[Row],
    budget: float,
    launch: Launch,
    done: Callable[[Row, Outcome], None],
    clock: Callable[[], float] = time.monotonic,
    dry: bool = False,
) -> None:
    """Runs rows in order within a budget of seconds; `done` gets each one's outcome at once.

    Rows that were slower than their estimates make the estimates of the later ones longer in proportion.
    """
    end, pace = clock() + budget, [1.0]
    for row in rows:
        estimate, left = statistics.median(pace) * (row.dry if dry else row.seconds), end - clock()
        if estimate > left:
            done(row, Outcome("left out", why=f"needs about {estimate:.0f} s; {max(left, 0):.0f} s were left"))
            continue
        start = clock()
        outcome = launch(row, left)
        outcome.seconds = clock() - start
        if outcome.state != "failed":
            pace.append(max(outcome.seconds / (row.dry if dry else row.seconds), 0.3))
        done(row, outcome)


def launch_process(command: Sequence[str], result: Path, seconds: float, environment: dict[str, str]) -> Outcome:
    """Runs a row's process for at most some seconds; it and all it started are gone afterwards."""
    result.unlink(missing_ok=True)
    log = result.with_suffix(".log")
    with open(log, "w") as file:
        process = subprocess.Popen(
            command, cwd=models.ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end_group(process)
    found = json.loads(result.read_text()) if result.exists() else {}
    outcome = Outcome("done", lines=found.get("lines", []), raw=found.get("raw", []), machine=found.get("machine", {}))
    if status is None:
        outcome.state, outcome.why = "stopped", f"the time was over after {seconds:.0f} s"
    elif status or any(key.endswith("_failed") for entry in outcome.raw for key in entry):
        outcome.state = "failed"
        outcome.why = f"signal {-status}" if status < 0 else f"exit code {status}" if status else "a side failed"
        outcome.log = "\n".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
    return outcome


def _end_group(process: subprocess.Popen) -> None:
    """Ends a process and its children: a worker that lives on would hold the card's memory."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()


@dataclasses.dataclass
class Report:
    """The two files of results, complete after every row."""

    folder: Path
    notes: list[str]
    outcomes: dict[str, Outcome] = dataclasses.field(default_factory=dict)

    @classmethod
    def opened(cls, folder: Path, notes: list[str]) -> "Report":
        """With the rows of an earlier call; InputError if that was of another model."""
        path = folder / "gpu.json"
        found = json.loads(path.read_text()) if path.exists() else {"notes": notes, "rows": {}}
        if found["notes"] != notes:
            raise InputError(f"--output {folder}: holds results of other flags: {' '.join(found['notes'])}")
        kept = {name: Outcome(**entry) for name, entry in found["rows"].items() if entry["state"] != "left out"}
        return cls(folder, notes, kept)

    def add(self, row: Row, outcome: Outcome) -> None:
        self.outcomes[row.name] = outcome
        self.write()

    def write(self) -> None:
        rows = {name: dataclasses.asdict(outcome) for name, outcome in self.outcomes.items()}
        for name, text in (
            ("gpu.json", json.dumps({"notes": self.notes, "rows": rows}, indent=1)),
            ("gpu.md", str(self)),
        ):
            temporary = self.folder / f".{name}"
            temporary.write_text(text)
            os.replace(temporary, self.folder / name)

    def __str__(self) -> str:
        machine = next((o.machine for o in self.outcomes.values() if o.machine), {})
        about = ", ".join(f"{key} {machine[key]}" for key in ("jax", "torch", "commit", "date") if key in machine)
        lines = [f"**On a GPU**: {machine.get('device', 'no row is done')}; {about}.", *self.notes]
        table = [["row", "what", "ours", "official", "its / ours", "aim", "more"], ["---"] * 7]
        ends = []
        for row in ROWS:
            outcome = self.outcomes.get(row.name)
            if outcome is None:
                continue
            for line in outcome.lines:
                table.append([row.name, *(str(line.get(key) or "–") for key in LINE)])
            if outcome.state != "done":
                table.append([row.name, row.title, "–", "–", "–", "–", f"{outcome.state}: {outcome.why}"])
            if outcome.log:
                ends += [f"End of {row.name}.log:", f"```\n{outcome.log}\n```"]
        took = ", ".join(f"{name} {o.seconds:.0f}" for name, o in self.outcomes.items() if o.seconds)
        body = "\n".join("| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |" for cells in table)
        return "\n\n".join([" ".join(lines), body, f"Seconds that rows took: {took or 'none yet'}.", *ends]) + "\n"


LINE = ("what", "ours", "official", "ratio", "aim", "more")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [row.name for row in ROWS]
    parser.add_argument("--minutes", type=float, required=True, help="the rows end in this time")
    parser.add_argument("--reference", type=Path, help="a clone of the official repository, as the baseline")
    parser.add_argument("--rows", nargs="+", choices=names, metavar="ROW", help=f"only these: {', '.join(names)}")
    parser.add_argument("--dry", action="store_true", help="on this machine's CPU, with small sizes")
    parser.add_argument("--model", default="full", help="full, small or tiny (default: full)")
    parser.add_argument(
        "--canvas", type=int, help=f"side of the pictures in pixels (default: 512; {DRY_CANVAS} in a dry run)"
    )
    parser.add_argument("--output", type=Path, default=Path("gpu_results"), help="folder (default: gpu_results)")
    args = parser.parse_args(argv)
    if not 0 < args.minutes < 1e4:
        raise InputError(f"--minutes: expected a number above 0, got {args.minutes}")
    if args.model not in models.SIZES:
        raise InputError(f"--model {args.model}: expected one of {', '.join(models.SIZES)}")
    if args.reference is not None:
        cli.check_clone(args.reference)
    if not args.dry and not any(Path("/dev").glob("nvidia[0-9]*")) and not Path("/dev/kfd").exists():
        raise InputError("no GPU on this machine; --dry tries the rows on its CPU")
    return args


def main(argv: Sequence[str] | None = None, rows: Sequence[Row] = ROWS) -> int:
    """Runs the rows; returns 1 if one failed."""
    args = parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    folder = args.output.resolve()
    canvas = args.canvas or (DRY_CANVAS if args.dry else None)
    common = ["--model", args.model, *(["--canvas", str(canvas)] if canvas else [])]
    common += ["--reference", str(args.reference.resolve())] if args.reference else []
    # The compiled programs of a row serve the later rows and calls, and so do XLA's measurements of kernels.
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / "cache"))
    if args.dry:
        common.append("--dry")
        environment |= dict(JAX_PLATFORMS="cpu", CUDA_VISIBLE_DEVICES="")

    def launch(row: Row, seconds: float) -> Outcome:
        print(f"{row.name}: {row.title}, at most {seconds:.0f} s", flush=True)
        result = folder / f"{row.name}.json"
        command = [sys.executable, "-m", "benchmarks.gpu_rows", row.name, *common, "--output", str(result)]
        return launch_process(command, result, seconds, environment)

    def done(row: Row, outcome: Outcome) -> None:
        report.add(row, outcome)
        print(f"{row.name}: {outcome.state} after {outcome.seconds:.0f} s. {outcome.why}", flush=True)

    report = Report.opened(folder, [f"Model {args.model}{', a dry run on a CPU' * args.dry}."])
    report.write()
    wanted = [row for row in rows if not args.rows or row.name in args.rows]
    run_rows(wanted, 60 * args.minutes, launch, done, dry=args.dry)
    print(report, flush=True)
    return int(any(report.outcomes[row.name].state == "failed" for row in wanted))


if __name__ == "__main__":
    with exit_on_input_error():
        sys.exit(main())
