"""Makes a checkpoint folder from a training run, with the averaged parameters; or a folder for diffusers.

instdiff export --workdir runs/coco --output checkpoints/mine
instdiff export --workdir runs/coco --to_diffusers mine_diffusers
"""

import argparse
from collections.abc import Sequence

from instdiff_jax.cli.parser import any_path, command_parser, local_path
from instdiff_jax.errors import InputError, exit_on_input_error


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("export", __doc__)
    parser.add_argument("--workdir", type=any_path, required=True, help="the run's folder")
    parser.add_argument("--output", type=any_path, help="the checkpoint folder to write")
    parser.add_argument("--to_diffusers", type=local_path, help="instead, a folder that diffusers loads")
    parser.add_argument("--step", type=int, help="the checkpoint's step (default: the newest)")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at --output")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="how parameters are stored; 16 bits halve the folder (default: float32)",
    )
    args = parser.parse_args(argv)
    if (args.output is None) == (args.to_diffusers is None):
        parser.error("give one of --output and --to_diffusers")
    return args


def main(argv: Sequence[str] | None = None) -> None:
    with exit_on_input_error():
        args = parse_args(argv)
        from instdiff_jax.training.export import export, export_to_diffusers

        target = args.output or args.to_diffusers
        try:
            if args.to_diffusers is None:
                step = export(args.workdir, args.output, args.step, args.overwrite, args.dtype)
            else:
                step = export_to_diffusers(args.workdir, args.to_diffusers, args.step, args.dtype)
        except OSError as error:
            raise InputError(f"{error.filename or target}: {error.strerror or error}") from error
        print(f"wrote {target}: the averaged parameters of step {step}")
