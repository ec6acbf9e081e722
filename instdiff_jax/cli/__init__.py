"""The commands: `instdiff NAME` and `python -m instdiff_jax NAME`, one module each."""

import errno
import importlib
import io
import sys
from collections.abc import Sequence
from typing import Any

from instdiff_jax.errors import FULL_DISK, exit_on_input_error, short

# Command -> (module with a `main(argv)`, one line of help). A module is imported when its command runs.
COMMANDS = {
    "sample": ("instdiff_jax.cli.sample", "generate images from layouts"),
    "studio": ("instdiff_jax.cli.studio", "draw layouts in the browser; serve pictures to programs"),
    "train": ("instdiff_jax.cli.train", "train on a dataset"),
    "convert": ("instdiff_jax.cli.convert", "convert PyTorch checkpoints to a checkpoint folder, and back"),
    "export": ("instdiff_jax.cli.export", "make a checkpoint folder from a training run"),
    "evaluate": ("instdiff_jax.cli.evaluate", "measure how well images follow their layouts"),
    "benchmark": ("instdiff_jax.cli.benchmark", "draw and judge one of the field's benchmarks"),
    "annotate": ("instdiff_jax.cli.annotate", "make a COCO folder of pictures without labels"),
    "import-data": ("instdiff_jax.cli.import_data", "write another tool's dataset as a COCO folder"),
    "build-coco": ("instdiff_jax.cli.build_coco", "build a training dataset from a COCO folder"),
    "build-official-json": (
        "instdiff_jax.cli.build_official_json",
        "build a training dataset from the official training JSON",
    ),
    "build-tokenizer": ("instdiff_jax.cli.build_tokenizer", "build a CLIP tokenizer from a dataset's captions"),
    "compile": ("instdiff_jax.cli.compile", "compile a checkpoint's programs ahead of time, to start fast"),
    "aot": ("instdiff_jax.cli.aot", "compile for a TPU without having one; report time and memory"),
}
# Packages that are not installed by default -> the extra of pyproject.toml that has them.
EXTRAS = {
    **dict.fromkeys(("grain", "tensorflow_datasets", "importlib_resources", "tensorboardX", "optax"), "train"),
    **dict.fromkeys(("fastapi", "pydantic", "prometheus_client", "starlette", "uvicorn"), "studio"),
}
USAGE = "\n".join(
    [
        "usage: instdiff COMMAND [flags]",
        "",
        "InstanceDiffusion in JAX: generate images from a caption and captioned, located instances.",
        "",
        "commands:",
        *(f"  {name:20} {text}" for name, (_, text) in COMMANDS.items()),
        "",
        "`instdiff COMMAND --help` lists a command's flags; `instdiff --version` prints the version.",
    ]
)


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command.

    Bad input, or a package that is not installed, ends with one line on stderr and exit code 2; Ctrl-C with one line
    and 130.

    Args:
        argv: the command's name and its flags; by default the process's arguments.
    """
    survive_any_terminal()
    try:
        _dispatch(list(sys.argv[1:] if argv is None else argv) or ["--help"])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


class _Pipe(io.FileIO):
    """A stream whose reader may go, as in `instdiff ... | head`, or whose disk may be full: work goes on unseen."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in (errno.EPIPE, *FULL_DISK):
                raise
            return len(data)


def survive_any_terminal() -> None:
    """Output never ends a command: signs that an encoding lacks are escaped, and a closed pipe is ignored."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper):
            continue
        stream.reconfigure(errors="backslashreplace")
        buffered = type(stream.buffer) is io.BufferedWriter
        if type(stream.buffer.raw if buffered else stream.buffer) is not io.FileIO:
            continue  # a test's or a notebook's
        stream.flush()
        pipe = _Pipe(stream.fileno(), "wb", closefd=False)
        ours = io.TextIOWrapper(
            io.BufferedWriter(pipe) if buffered else pipe,
            stream.encoding,
            "backslashreplace",
            line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        setattr(sys, name, ours)


def _dispatch(argv: list[str]) -> None:
    name, *rest = argv
    if name in ("-h", "--help"):
        print(USAGE)
        return
    if name == "--version":
        print(f"instdiff {importlib.import_module('instdiff_jax').__version__}")
        return
    if name not in COMMANDS:
        print(f"error: {short(name)}: expected one of {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
    try:
        with exit_on_input_error():
            importlib.import_module(COMMANDS[name][0]).main(rest)
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"error: {name} needs {error.name}; pip install 'instdiff_jax[{extra}]'", file=sys.stderr)
        sys.exit(2)
