"""Flags of the benchmarks, and the sides that they name."""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

from benchmarks.models import Model, find_model
from benchmarks.processes import Worker
from benchmarks.tables import RESULTS
from instdiff_jax.errors import ArgumentParser, InputError


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the flags that all benchmarks share."""
    made = ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model",
        help="full, small, tiny, box or a checkpoint folder; default: full, on a CPU small",
    )
    made.add_argument("--canvas", type=int, help="side of the images in pixels")
    made.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32 on a CPU, else bfloat16")
    made.add_argument("--reference", type=Path, help="a clone of the official repository, as the baseline")
    made.add_argument("--compile", action="store_true", help="also measure the baseline with torch.compile")
    made.add_argument("--repeats", type=int, default=5, help="runs; the median is reported")
    made.add_argument("--cores", type=int, help="bind each side to this many cores")
    made.add_argument("--output", type=Path, default=RESULTS, help="folder for the tables")
    return made


def parse_alone(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """Parses the flags of a benchmark without a baseline; InputError for flags that would have no effect."""
    args = parser.parse_args(argv)
    for name in ("reference", "compile", "repeats", "cores"):
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name}: this benchmark has no baseline and runs once")
    return args


def check_clone(clone: str | Path) -> None:
    """Raises InputError for a folder that is not a clone of the official repository."""
    if not (Path(clone) / "ldm" / "models" / "diffusion" / "plms_instance.py").is_file():
        raise InputError(f"--reference {clone}: expected a clone of github.com/frank-xwang/InstanceDiffusion")


def sides(args: argparse.Namespace, model: Model, dtype: str) -> dict[str, Worker]:
    """Our code, and the official code as released and compiled, each in its own process."""
    if args.reference is not None:
        # Checked here, as an error in a worker's start says only that the pool is broken.
        check_clone(args.reference)
        if model.folder is not None:
            raise InputError(
                "--reference: expected --model full or small: UniFusion's sizes are fixed in the official code"
            )
        if dtype == "float32" and not on_cpu():
            raise InputError(
                "--dtype float32: expected bfloat16 with --reference, as the official code uses 16 bits here"
            )
    cached = getattr(args, "cached", False)
    found = {"ours": Worker("benchmarks.ours:Ours", model, dtype, cached, cores=args.cores)}
    if args.reference is not None:
        for name, compiled in (("official", False), ("compiled", True))[: 1 + args.compile]:
            found[name] = Worker(
                "benchmarks.official:Official", args.reference, model, compiled, dtype, cores=args.cores
            )
    return found


@functools.cache
def on_cpu() -> bool:
    """Whether jax runs on a CPU."""
    import jax

    return jax.default_backend() == "cpu"


def about(args: argparse.Namespace, model: Model, dtype: str) -> str:
    """What was measured, for a table's notes."""
    line = f"Model {model.name}, {model.canvas}x{model.canvas} pixels, {dtype}"
    halved = args.reference is not None and on_cpu() and dtype == "bfloat16"
    return f"{line} (the official code under autocast, which is not as released)" if halved else line


def choose(args: argparse.Namespace) -> tuple[Model, str]:
    """The model and dtype of the flags, or the defaults of the platform."""
    model = find_model(args.model or ("small" if on_cpu() else "full"), args.canvas)
    return model, args.dtype or ("float32" if on_cpu() else "bfloat16")
