"""Makes a checkpoint folder from a training run, with the averaged parameters.

instdiff export --workdir runs/coco --output checkpoints/mine
"""

import argparse
from collections.abc import Sequence

from instdiff_jax.cli.parser import any_path, command_parser
from instdiff_jax.errors import InputError, exit_on_input_error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    parser.add_argument("--workdir", type=any_path, required=True, help="the run's folder")
    parser.add_argument("--output", type=any_path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at --output")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="how parameters are stored; 16 bits halve the folder (default: float32)",
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
        from instdiff_jax.training.export import export

        try:
            step = export(args.workdir, args.output, args.step, args.overwrite, args.dtype)
        except OSError as error:
            raise InputError(f"{error.filename or args.output}: {error.strerror or error}") from error
        print(f"wrote {args.output}: the averaged parameters of step {step}")
