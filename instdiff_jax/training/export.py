"""Makes a checkpoint folder, with the averaged parameters, from a training run.

python -m instdiff_jax export --workdir DIR --output DIR [--step N] [--dtype float16] [--overwrite]
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint import run
from instdiff_jax.checkpoint.folder import check_output, save_folder
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.training.settings import TrainSettings


def read_run(workdir: Path) -> tuple[ModelConfig, SamplingConfig, TrainSettings]:
    """What a run's config.json says.

    Raises:
        InputError: for a folder that is not a run's.
    """
    found = run.read_run(workdir)
    return found.model, found.sampling, TrainSettings.from_dict(found.train, f"{workdir / 'config.json'}: train")


def export(
    workdir: Path, output: Path, step: int | None = None, overwrite: bool = False, dtype: str = "float32"
) -> int:
    """Writes the checkpoint folder, its parameters stored as `dtype`; returns the step it is of."""
    check_output(output, overwrite)
    tokenizer = run.run_tokenizer(workdir)
    model, sampling, params, step = run.load_run(workdir, step)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)
    save_folder(output, params, model, sampling, tokenizer, run.absent_groups(params), overwrite)
    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m instdiff_jax export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at --output")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="how parameters are stored; 16 bits make half the folder",
    )
    with exit_on_input_error():
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
        try:
            step = export(args.workdir, args.output, args.step, args.overwrite, args.dtype)
        except OSError as error:
            raise InputError(f"{error.filename or args.output}: {error.strerror or error}") from error
        print(f"wrote {args.output}: the averaged parameters of step {step}")
