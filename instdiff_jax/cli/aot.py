"""Compiles the training step and the sampler for a TPU without having one, and reports memory and time.

    pip install libtpu
    instdiff aot --topology v5e:16x16 --config configs/coco.py --what both --output aot.json

Compiling takes minutes. A program that does not fit the chips' memory is an error. `--what blocks` compiles every kind
of block of the UNet alone, for one chip, forward and with its gradient: about half a minute each.
"""

import argparse
import dataclasses
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instdiff_jax.analysis.kernel_schedule import DUMP_FLAGS, read_dump
from instdiff_jax.cli.config_flags import names_config, read_settings
from instdiff_jax.cli.parser import command_parser, local_path
from instdiff_jax.errors import InputError
from instdiff_jax.files import scratch_folder, write_json, write_text

if TYPE_CHECKING:
    from instdiff_jax.aot.programs import Program
    from instdiff_jax.aot.report import Outcome
    from instdiff_jax.training.settings import RunSettings

# What configs/coco.py sets for a TPU pod: the defaults where no config file is named.
POD = ("--config.train.remat=blocks", "--config.parallel.fsdp=16")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("aot", __doc__)
    parser.add_argument("--topology", required=True, help="a TPU generation and shape: v5e:16x16, v5p:2x2x4, v6e:4x4")
    parser.add_argument("--slices", type=int, default=1, help="slices of that shape, joined by the network (default 1)")
    parser.add_argument(
        "--config", help="a config file; default: the paper's recipe. --config.KEY=VALUE changes a setting"
    )
    parser.add_argument("--what", default="both", choices=("train", "sample", "both", "blocks"), help="programs")
    parser.add_argument("--images_per_chip", type=int, default=8, help="batch of the training step (default 8)")
    parser.add_argument("--rows", type=int, default=64, help="rows of the sampler, over all chips (default 64)")
    parser.add_argument("--no_fusers", action="store_true", help="the sampler where α is 0 and fusers are left out")
    parser.add_argument("--blocks", default=".*", help="with --what blocks: a regular expression of blocks' names")
    parser.add_argument("--image_size", type=int, default=512, help="side of the images in pixels (default 512)")
    parser.add_argument("--output", type=local_path, help="a JSON file for the reports")
    parser.add_argument("--hlo", type=local_path, help="a folder for the text of the compiled programs")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    from instdiff_jax.training.settings import RunSettings

    argv = sys.argv[1:] if argv is None else list(argv)
    run, rest = read_settings([*POD, *argv] if not names_config(argv) else argv, RunSettings)
    args = parse_args(rest)
    for path in (args.output and args.output.parent, args.hlo):
        if path is not None and not path.is_dir():
            raise InputError(f"{path}: expected an existing folder")
    with scratch_folder("aot") as dump:
        # Read when libtpu is loaded: the compiler then writes the schedules of Pallas kernels.
        flags = DUMP_FLAGS.format(folder=dump)
        os.environ["LIBTPU_INIT_ARGS"] = f"{os.environ.get('LIBTPU_INIT_ARGS', '')} {flags}".strip()
        compile_programs(run, args, dump)


def compile_programs(run: "RunSettings", args: argparse.Namespace, dump: Path) -> None:
    """Compiles and reports; libtpu writes the schedules of kernels to the folder `dump`."""
    from instdiff_jax.aot.programs import topology_devices

    if args.slices < 1:
        raise InputError(f"--slices: expected a whole number of at least 1, got {args.slices}")
    devices = topology_devices(args.topology, args.slices)
    if args.image_size <= 0 or args.image_size % run.model.canvas_stride:
        raise InputError(f"--image_size: expected a multiple of {run.model.canvas_stride}, got {args.image_size}")
    compile_all = compile_blocks if args.what == "blocks" else compile_whole
    compile_all(run, args, devices, dump)


def compile_whole(run: "RunSettings", args: argparse.Namespace, devices: list, dump: Path) -> None:
    """The training step, the sampler, or both."""
    from instdiff_jax.aot import programs
    from instdiff_jax.aot.report import format_report, make_report
    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh

    model, parallel = run.model, run.parallel
    settings = dataclasses.replace(run.train, batch_size=args.images_per_chip * len(devices))

    def train() -> "Program":
        return programs.train_program(model, settings, parallel, make_mesh(parallel, devices), args.image_size)

    def sample() -> "Program":
        # Every chip has all parameters, as in the pipeline: fsdp is training's.
        mesh = make_mesh(ParallelSettings(slices=parallel.slices), devices)
        return programs.sample_program(model, settings, mesh, args.rows, args.image_size, not args.no_fusers)

    makers: dict[str, Callable[[], Program]] = dict(train=train, sample=sample)
    reports = []
    for name in makers if args.what == "both" else [args.what]:
        print(f"compiling {name} for {args.topology}", flush=True)
        program = makers[name]()
        reports.append(make_report(program, args.topology, compile_one(program, args, dump, name)))
        print(format_report(reports[-1]), flush=True)
        # After each program: the next one takes as long again, or may not fit.
        if args.output:
            write_json(args.output, reports)


def compile_blocks(run: "RunSettings", args: argparse.Namespace, devices: list, dump: Path) -> None:
    """Every kind of block alone, on one chip."""
    from instdiff_jax.aot.blocks import block_programs, format_blocks
    from instdiff_jax.aot.report import make_block_report
    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh

    mesh, rows = make_mesh(ParallelSettings(), devices[:1]), args.images_per_chip
    reports = []
    for kind, program in block_programs(run.model, run.train, mesh, rows, args.image_size, args.blocks):
        print(f"compiling {kind.label}, {program.name}", file=sys.stderr, flush=True)
        outcome = compile_one(program, args, dump, f"{kind.names[0]}_{program.name}")
        reports.append(make_block_report(kind, program, args.topology, outcome))
        if args.output:
            write_json(args.output, reports)
    print(f"blocks for {args.topology}, {rows} latents, on one chip:\n\n{format_blocks(reports)}", flush=True)


def compile_one(program: "Program", args: argparse.Namespace, dump: Path, name: str) -> "Outcome":
    """What the compiler made of a program; its text goes to `--hlo` too."""
    from instdiff_jax.aot.programs import compile_program, program_text
    from instdiff_jax.aot.report import Outcome, memory_table, xla_counts

    compiled, seconds = compile_program(program, args.topology, dump)
    text = program_text(compiled, dump)
    if args.hlo:
        write_text(args.hlo / f"{args.topology.replace(':', '_')}_{name}.hlo", text)
    kernel_cycles = {name: schedule.cycles() for name, schedule in read_dump(dump)}
    empty(dump)  # names may come again in the next program
    return Outcome(text, memory_table(compiled.memory_analysis()), xla_counts(compiled), seconds, kernel_cycles)


def empty(folder: Path) -> None:
    """Removes what a folder has; the compiler gives a large program a folder of its own there."""
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
