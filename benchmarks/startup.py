"""Time to the first image, and peak memory, of `sample.py` as a user runs it.

    python -m benchmarks.startup                        # checkpoints/shapes
    python -m benchmarks.startup --model full --steps 2 # the released size with deterministic weights: 6 GB on disk

Runs `sample.py` twice, the first time with an empty compilation cache. Memory is the peak resident set of the process;
on a CPU this includes everything.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks import cli, models, tables
from benchmarks.tables import Column
from instdiff_jax.errors import InputError, exit_on_input_error
from instdiff_jax.layout import Layout


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.set_defaults(model="box")
    parser.add_argument("--instances", type=int, default=6)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--layout", type=Path, help="a layout file, instead of boxes")
    return cli.parse_alone(parser, argv)


def run(command: list[str], output: Path, cache: Path) -> dict[str, float]:
    """Seconds to the first image and to the end of the process, and its peak resident memory in GB."""
    environment = dict(os.environ, XDG_CACHE_HOME=str(cache))
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start, found, ended = time.perf_counter(), None, 0
    command = [*command, "--output", str(output)]
    process = subprocess.Popen(command, cwd=models.ROOT, env=environment, stdout=subprocess.DEVNULL)
    while not ended:
        if found is None and (output / "layout" / "0.png").exists():
            found = time.perf_counter() - start
        time.sleep(0.01)
        ended, status, usage = os.wait4(process.pid, os.WNOHANG)
    end = time.perf_counter() - start
    if status:
        raise InputError(f"sample.py ended with status {os.waitstatus_to_exitcode(status)}; see its error above")
    return dict(first=found or end, end=end, peak=usage.ru_maxrss * 1024 / 1e9)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = cli.choose(args)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, layout = model.folder, folder / "layout.json"
        if checkpoint is None:
            checkpoint = folder / "checkpoint"
            models.write_checkpoint(model, checkpoint)
        given = Layout.from_json(args.layout) if args.layout else models.make_layout(args.instances, model.canvas)
        layout.write_text(given.to_json())
        command = [sys.executable, "sample.py", "--checkpoint", str(checkpoint.resolve()), "--layout", str(layout)]
        command += ["--dtype", dtype, *(["--steps", str(args.steps)] if args.steps else [])]
        for process in ("first, compiles", "second, from the cache"):
            output = folder / process.split(",")[0]
            measured = run(command, output, folder / "cache")
            rows.append(dict(process=process, **measured, **json.loads((output / "run.json").read_text())["seconds"]))
    columns = [
        Column("process", "process"),
        Column("first", "first image, s", ".1f"),
        Column("loading", "of it loading, s", ".1f"),
        Column("sampling", "sampling, compiling and writing, s", ".1f"),
        Column("end", "whole process, s", ".1f"),
        Column("peak", "peak GB", ".2f"),
    ]
    notes = [f"Model {model.name}, {model.canvas}x{model.canvas} pixels, {dtype}, one image."]
    tables.write_table(args.output, f"startup_{model.name}_{dtype}", "Start-up", columns, rows, notes)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
