"""One row of `benchmarks.gpu`, in its own process: `python -m benchmarks.gpu_rows NAME --output FILE`.

FILE is written anew whenever a number is there, so that a row that is stopped leaves what it had.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import cli, models, processes, sampling, startup, tables, train_step, unet

INSTANCES, MIS = 6, 0.36


class Sink:
    """The row's file."""

    def __init__(self, path: Path):
        self._path = path
        self._content: dict[str, Any] = dict(lines=[], raw=[], machine=tables.machine_facts())

    def line(self, what: str, **values: str | None) -> None:
        """A line of the table; values: ours, official, ratio, aim, more."""
        print(what, values, flush=True)
        self._content["lines"].append(dict(what=what, **values))
        self._write()

    def raw(self, **values: Any) -> None:
        """Everything that was measured."""
        self._content["raw"].append(values)
        self._write()

    def _write(self) -> None:
        temporary = self._path.with_suffix(".part")
        temporary.write_text(json.dumps(self._content, indent=1))
        os.replace(temporary, self._path)


class Measured:
    """What the rows share: the sides' processes, started together."""

    def __init__(self, args: argparse.Namespace, compiled: bool = False, official: bool = True):
        self.model = models.find_model(args.model, args.canvas)
        self.dtype = "float32" if args.dry else "bfloat16"
        args.compile, args.cores, args.cached = compiled, None, True
        reference, args.reference = args.reference, args.reference if official else None
        self.workers = cli.sides(args, self.model, self.dtype)
        args.reference = reference
        if compiled:
            self.workers.pop("official", None)
        for ready in [worker.start() for worker in self.workers.values()]:
            ready.result()
        self.rate = self.workers["ours"].matmul_rate(512 if args.dry else None)


def small(args: argparse.Namespace, count: int, dry: int) -> int:
    """A number of pictures, latents or steps, on a card and in a dry run."""
    return dry if args.dry else count


def checks(args: argparse.Namespace, sink: Sink) -> None:
    from benchmarks import gpu_checks

    for check in gpu_checks.run(quick=args.dry):
        good = check.error <= check.tolerance
        sink.raw(
            check=check.name, error=check.error, tolerance=check.tolerance, **({} if good else {"check_failed": True})
        )
        sink.line(
            check.name, ours=f"{check.error:.1e}", aim=f"at most {check.tolerance:.0e}", more="" if good else "FAILED"
        )


def pictures(args: argparse.Namespace, sink: Sink, images: int, aim: str | None = None, official: bool = True) -> None:
    measured, steps = Measured(args, official=official), small(args, sampling.STEPS, 4)
    options = argparse.Namespace(
        alpha=0.8, repeats=small(args, 3, 1), budget=30, reference_images=images if official else 0
    )
    row = sampling.measure(options, measured.workers, (images, INSTANCES, MIS), steps, measured.rate)
    sink.raw(**row)
    name = f"pictures: {images} of {measured.model.canvas}², {INSTANCES} instances, MIS {MIS}, {steps} steps"
    more = [_number(row, "per_minute", "{:.1f} pictures a minute"), _number(row, "utilisation", "{:.0%} utilisation")]
    more.append(_number(row, "compile", "compile {:.0f} s"))
    sink.line(name, aim=aim, **_sides(row, "official", "seconds"), more=", ".join(filter(None, more)))
    _peaks(sink, row, name)


def evaluations(args: argparse.Namespace, sink: Sink, counts: Sequence[int], compiled: bool = False) -> None:
    measured, name = Measured(args, compiled), "compiled" if compiled else "official"
    options = argparse.Namespace(repeats=small(args, 20, 1))
    for count in counts:
        row = unet.evaluation(options, measured.model, measured.workers, count, measured.rate)
        sink.raw(**row)
        what = f"UNet, {count} latents" + ", official with torch.compile" * compiled
        more = [_number(row, "tflops", "{:.2f} TFLOP"), _number(row, "plain", "{:.4f} s without fusers")]
        more += [_number(row, "compile", "compile {:.0f} s"), _number(row, f"{name}_difference", "difference {:.1e}")]
        sink.line(what, **_sides(row, name, "seconds"), more=", ".join(filter(None, more)))
        if "utilisation" in row:
            aim = "at least 45%" if count == 16 and not args.dry else None
            rate = f"of a matrix product's {measured.rate / 1e12:.4g} TFLOP/s"
            sink.line(f"UNet, {count} latents: share of the rate", ours=f"{row['utilisation']:.1%}", aim=aim, more=rate)


def kernels(args: argparse.Namespace, sink: Sink) -> None:
    measured = Measured(args, official=False)
    ours, count = measured.workers["ours"], small(args, 16, 2)
    inputs, grounding, _ = unet.make_inputs(measured.model, count)
    ours.prepare_forward(inputs, grounding)
    found = ours.kernels()
    sink.raw(latents=count, **found)
    for kernel in found["kernels"]:
        share = f"{kernel['share']:.1%} of {found['milliseconds']:.2f} ms"
        sink.line(
            f"`{kernel['name'][:80]}`",
            ours=f"{kernel['milliseconds']:.3f} ms",
            more=f"{kernel['calls']:g} calls, {share}",
        )


def training(args: argparse.Namespace, sink: Sink) -> None:
    measured, batch = Measured(args), small(args, 8, 1)
    row = train_step.measure(measured.workers, batch, "none", small(args, 5, 1))
    sink.raw(**row)
    more = [_number(row, "rate", "{:.2f} pictures a second"), _number(row, "utilisation", "{:.0%} utilisation")]
    more.append(_number(row, "compile", "compile {:.0f} s"))
    what = f"training step, {batch} images"
    sink.line(what, aim="at least 1.5", **_sides(row, "official", "seconds"), more=", ".join(filter(None, more)))
    _peaks(sink, row, what)


def variant(args: argparse.Namespace, sink: Sink, name: str, **settings: Any) -> None:
    """One picture as it is and with other settings, in turn."""
    ours, steps = Measured(args, official=False).workers["ours"], small(args, sampling.STEPS, 4)
    case = (1, INSTANCES, MIS, steps, 0.8)
    runs: dict[str, Callable[[], float]] = {
        "plain": lambda: ours.sample(*case),
        name: lambda: ours.sample(*case, **settings),
    }
    for run in runs.values():
        run()
    taken = processes.alternate(runs, small(args, 3, 1), 30)
    sink.raw(name=name, **taken)
    ratio = taken[name] / taken["plain"]
    sink.line(
        f"one picture, {name}", ours=f"{taken[name]:.2f} s", more=f"{ratio:.2f} of the {taken['plain']:.2f} s without"
    )


def starting(args: argparse.Namespace, sink: Sink) -> None:
    model = models.find_model(args.model, args.canvas)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models.write_checkpoint(model, folder / "checkpoint")
        layout = folder / "layout.json"
        layout.write_text(models.make_layout(INSTANCES, model.canvas).to_json())
        command = [sys.executable, "sample.py", "--checkpoint", str(folder / "checkpoint"), "--layout", str(layout)]
        command += ["--steps", str(small(args, sampling.STEPS, 4))]
        for which in ("compiles", "from the compilation cache"):
            measured = startup.run(command, folder / which.split()[0], folder / "cache")
            sink.raw(which=which, **measured)
            sink.line(f"start-up to the first picture, {which}", ours=f"{measured['first']:.1f} s")


def _sides(row: dict[str, Any], other: str, key: str) -> dict[str, str | None]:
    return dict(
        ours=_number(row, key, "{:.4f} s"),
        official=_number(row, f"{other}_{key}", "{:.4f} s") or row.get(f"{other}_failed"),
        ratio=_number(row, f"{other}_ratio", "{:.2f}"),
    )


def _peaks(sink: Sink, row: dict[str, Any], what: str) -> None:
    if "peak" in row:
        both = dict(ours=_number(row, "peak", "{:.2f} GB"), official=_number(row, "official_peak", "{:.2f} GB"))
        sink.line(f"peak memory, {what}", **both)


def _number(row: dict[str, Any], key: str, form: str) -> str | None:
    return form.format(row[key]) if key in row else None


RUN: dict[str, Callable[[argparse.Namespace, Sink], None]] = {
    "checks": checks,
    "one": lambda args, sink: pictures(args, sink, 1, "at least 8"),
    "eight": lambda args, sink: pictures(args, sink, small(args, 8, 2), "at least 2"),
    "unet": lambda args, sink: evaluations(args, sink, [2] if args.dry else [16, 64]),
    "kernels": kernels,
    "training": training,
    "compiled": lambda args, sink: evaluations(args, sink, [small(args, 16, 2)], compiled=True),
    "pictures32": lambda args, sink: pictures(args, sink, small(args, 32, 2), official=False),
    "fast": lambda args, sink: variant(args, sink, "--preset fast", preset="fast"),
    "reuse": lambda args, sink: variant(args, sink, "--reuse 3", reuse=3),
    "masked": lambda args, sink: variant(args, sink, "--masked_attention correct", masked_attention="correct"),
    "startup": starting,
    "pictures128": lambda args, sink: pictures(args, sink, small(args, 128, 2), official=False),
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("row", choices=RUN)
    parser.add_argument("--model", required=True)
    parser.add_argument("--canvas", type=int)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--dry", action="store_true")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    if not args.dry and cli.on_cpu():
        raise SystemExit("jax finds no GPU here: is its plugin installed?")
    RUN[args.row](args, Sink(args.output))


if __name__ == "__main__":
    main()
