"""Trains InstanceDiffusion, or the networks beneath it.

    instdiff train --config=configs/coco.py --workdir=DIR [--config.train.batch_size=64 ...]

The same command continues from DIR's newest checkpoint. SIGTERM saves and ends. DIR gets checkpoints/, metrics.jsonl,
tensorboard/, samples/ and config.json; `instdiff export` makes a checkpoint folder of it. On several hosts, start the
same command on each; see docs/training.md. Without --config the settings are the paper's recipe.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence

from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.cli.parser import command_parser
from instdiff_jax.errors import exit_on_input_error


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = command_parser("train", __doc__)
    parser.add_argument("--config", help="a config file; --config.KEY=VALUE changes a setting of it")
    parser.add_argument("--workdir", required=True, help="the run's folder; may be gs://BUCKET/NAME")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        parse_args(argv)
    from instdiff_jax.parallel.runtime import keep_step_memory
    from instdiff_jax.training.inputs import check_data
    from instdiff_jax.training.loop import train
    from instdiff_jax.training.metrics import make_workdir
    from instdiff_jax.training.settings import RunSettings

    keep_step_memory()
    with exit_on_input_error():
        run, rest = read_settings(argv, RunSettings)
        args = parse_args(rest)
        check_data(run)
        there = os.path.exists(args.workdir)
        workdir = make_workdir(args.workdir)
        try:
            print(train(run, workdir), file=sys.stderr)
        finally:
            if not there:
                with contextlib.suppress(OSError, ValueError):  # the latter for a bucket
                    workdir.rmdir()  # only if nothing was written to it
