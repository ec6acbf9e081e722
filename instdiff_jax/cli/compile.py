"""Compile a checkpoint's programs ahead of time, for processes on machines of this kind that are to start fast.

    instdiff compile --checkpoint checkpoints/sd15 --rows 1 8 --output compiled/sd15
    instdiff sample --checkpoint checkpoints/sd15 --layout scene.json --compiled compiled/sd15

Rows are latents denoised at once: pictures, or with the multi-instance sampler a picture and its instances. Give the
numbers, the canvas and the settings that will be used; the number of steps, α, mis and the solver need no other
programs. The folder serves machines with the same processor or card and the same versions; elsewhere, and for programs
that are not in it, `--compiled` says so in a line and compiles. It holds machine code: use only what you made.
"""

import argparse
import time
from collections.abc import Sequence

from instdiff_jax.cli.box import default_checkpoint
from instdiff_jax.cli.parser import any_path, command_parser, local_path
from instdiff_jax.cli.sampling_flags import DTYPE_HELP, DTYPES, add_sampling_flags, read_overrides
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser("compile", __doc__)
    add = parser.add_argument
    add("--checkpoint", type=any_path, default=default_checkpoint(), help="a checkpoint folder, or a training workdir")
    add("--output", type=local_path, required=True, help="the folder to write")
    add("--rows", type=int, nargs="+", default=[1], help="latents denoised at once (default: 1)")
    add("--width", type=int, help="of the images in pixels (default: the model's)")
    add("--height", type=int, help="of the images in pixels (default: --width)")
    add("--dtype", choices=DTYPES, help=DTYPE_HELP)
    add("--max_rows", type=int, help="as for sampling")
    add("--no_verify", action="store_true", help="do not compare the checkpoint with its checksums")
    add_sampling_flags(parser)
    args = parser.parse_args(argv)
    for name in ("rows", "width", "height", "max_rows"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            raise InputError(f"--{name}: expected whole numbers of at least 1, got {value}")
    if args.height is not None and args.width is None:
        raise InputError("--height: expected with --width")
    if max(args.rows) > 31:
        raise InputError(f"--rows: expected at most 31, a picture and its 30 instances, got {max(args.rows)}")
    args.lora = args.embedding = []
    args.taesd = args.tile = None
    return args


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    overrides, began = read_overrides(args), time.time()
    SamplingConfig.from_dict(overrides, "sampling")

    from instdiff_jax.cli.sample import open_pipeline
    from instdiff_jax.parallel.runtime import set_up_compilation

    set_up_compilation()
    from instdiff_jax.sampling.compiled import fill

    canvas = None if args.width is None else (args.width, args.height or args.width)
    count = fill(args.output, lambda: open_pipeline(args), args.rows, canvas, overrides)
    print(f"{count} programs in {args.output} ({time.time() - began:.1f} s)")
