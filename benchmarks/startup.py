"""Time to the first image, and peak memory, of `sample.py` as a user runs it.

    python -m benchmarks.startup                        # checkpoints/shapes
    python -m benchmarks.startup --model full --steps 2 # the released size with deterministic weights: 6 GB on disk
    python -m benchmarks.startup --loading              # with and without comparing checksums; no image

Runs `sample.py` three times: with an empty compilation cache, from the cache that this filled, and with an empty cache
and `--compiled`, a folder that `instdiff compile` made before. Memory is the peak resident set of the process;
on a CPU this includes everything. `--loading` loads the checkpoint alone, with and without `--no_verify` in turn, each
time in a process of its own; its files have been read before, so that they come from memory and not from the disk.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cli, models, tables
from benchmarks.tables import Column
from instdiff_jax.errors import InputError, exit_on_input_error
from instdiff_jax.layout import Layout

LOADS = 3  # of each kind, for a median


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.set_defaults(model="box")
    parser.add_argument("--instances", type=int, default=6)
    parser.add_argument("--steps", type=int, help="default: the checkpoint's")
    parser.add_argument("--layout", type=Path, help="a layout file, instead of boxes")
    parser.add_argument("--loading", action="store_true", help="time loading alone, with and without --no_verify")
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


def make_programs(command: list[str], rows: int, canvas: tuple[int, int], folder: Path) -> Path:
    """Runs `instdiff compile` with the checkpoint, type and steps of a command."""
    wanted = ("--checkpoint", "--dtype", "--steps")
    kept = [part for name in wanted if name in command for part in (name, command[command.index(name) + 1])]
    programs = folder / "programs"
    size = ["--width", str(canvas[0]), "--height", str(canvas[1])]
    compiling = [sys.executable, "-m", "instdiff_jax", "compile", *kept, *size, "--rows", str(rows)]
    environment = dict(os.environ, XDG_CACHE_HOME=str(folder / "third"))
    done = subprocess.run(
        [*compiling, "--output", str(programs)], cwd=models.ROOT, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        raise InputError(f"instdiff compile ended with {done.stderr.splitlines()[-1:]}")
    return programs


_LOAD = """
import sys, time
import jax
from instdiff_jax.sampling.loading import DTYPES, load_model
began = time.perf_counter()
jax.block_until_ready(load_model(sys.argv[1], DTYPES[sys.argv[2]], verify=sys.argv[3] == "True").params)
print(time.perf_counter() - began)
"""


def time_loading(checkpoint: Path, dtype: str) -> list[dict[str, Any]]:
    """Rows of the seconds that loading takes, with and without comparing checksums; medians."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(1 + LOADS):
        for verify, times in seconds.items():
            command = [sys.executable, "-c", _LOAD, str(checkpoint), dtype, str(verify)]
            done = subprocess.run(command, cwd=models.ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                raise InputError(f"{checkpoint}: loading ended with {done.stderr.splitlines()[-1:]}")
            times += [float(done.stdout)] * (turn > 0)  # the first turn reads the files from the disk
    size = sum(path.stat().st_size for path in (checkpoint / "params").rglob("*") if path.is_file()) / 1e9
    plain = statistics.median(seconds[False])
    rows = []
    for verify, times in seconds.items():
        median = statistics.median(times)
        name = "compared" if verify else "not compared (--no_verify)"
        rows.append(dict(checksums=name, size=size, seconds=median, least=min(times), ratio=median / plain))
    return rows


def write_loading(args: argparse.Namespace, name: str, dtype: str, checkpoint: Path) -> None:
    columns = [
        Column("checksums", "checksums"),
        Column("size", "parameters on disk, GB", ".2f"),
        Column("seconds", "loading, s", ".2f"),
        Column("least", "the fastest, s", ".2f"),
        Column("ratio", "of --no_verify", ".2f"),
    ]
    notes = [f"Model {name}, {dtype}, median of {LOADS} processes each, in turn."]
    rows = time_loading(checkpoint, dtype)
    tables.write_table(args.output, f"loading_{name}_{dtype}", "Loading a checkpoint", columns, rows, notes)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = cli.choose(args)
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        checkpoint, layout = model.folder, folder / "layout.json"
        if checkpoint is None:
            checkpoint = folder / "checkpoint"
            models.write_checkpoint(model, checkpoint, dtype if args.loading else np.float32)
        if args.loading:
            write_loading(args, model.name, dtype, checkpoint.resolve())
            return
        given = Layout.from_json(args.layout) if args.layout else models.make_layout(args.instances, model.canvas)
        layout.write_text(given.to_json())
        command = [sys.executable, "sample.py", "--checkpoint", str(checkpoint.resolve()), "--layout", str(layout)]
        command += ["--dtype", dtype, *(["--steps", str(args.steps)] if args.steps else [])]
        programs = make_programs(command, args.instances + 1, (model.canvas, model.canvas), folder)
        for process, more, cache in (
            ("first, compiles", [], "cache"),
            ("second, from the cache", [], "cache"),
            ("first, with instdiff compile's folder", ["--compiled", str(programs)], "other"),
        ):
            output = folder / f"output{len(rows)}"
            measured = run([*command, *more], output, folder / cache)
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
