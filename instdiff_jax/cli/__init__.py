"""The commands: `instdiff NAME` and `python -m instdiff_jax NAME`, one module each."""

import importlib
import sys
from collections.abc import Sequence

from instdiff_jax.errors import exit_on_input_error

# Command -> (module with a `main(argv)`, one line of help). Modules are imported only when they run.
COMMANDS = {
    "sample": ("instdiff_jax.cli.sample", "generate images from layouts"),
    "train": ("instdiff_jax.cli.train", "train on a dataset"),
    "convert": ("instdiff_jax.cli.convert", "PyTorch checkpoints to a checkpoint folder, and back"),
    "export": ("instdiff_jax.training.export", "a checkpoint folder from a training run"),
    "evaluate": ("instdiff_jax.cli.evaluate", "measure how well images follow their layouts"),
    "build-coco": ("instdiff_jax.data.build_coco", "a COCO folder to a training dataset"),
    "build-official-json": ("instdiff_jax.data.official_json", "the official training JSON to a training dataset"),
    "build-tokenizer": ("instdiff_jax.data.build_tokenizer", "a CLIP tokenizer from a dataset's words"),
    "aot": ("instdiff_jax.analysis.aot", "compile for a TPU that is not there, and report time and memory"),
}
USAGE = "usage: instdiff COMMAND [flags]\n\n" + "\n".join(f"  {name:20} {text}" for name, (_, text) in COMMANDS.items())


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command; `argv` begins with its name, and the rest of `sys.argv` follows where it is only that."""
    arguments = sys.argv[1:] if argv is None else [*argv, *sys.argv[1:]]
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name not in COMMANDS:
        print(f"error: {name!r}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    with exit_on_input_error():
        importlib.import_module(COMMANDS[name][0]).main(rest)
