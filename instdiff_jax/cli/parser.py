"""The parser that every command starts from."""

import argparse
from pathlib import Path

from instdiff_jax.buckets import as_path, is_bucket
from instdiff_jax.errors import ArgumentParser, InputError

# Help of the flag that build-coco and evaluate share.
OUTSIDE = "let file_name be absolute or lead out of the split's folder of images; only for annotations that you trust"


def command_parser(command: str, description: str | None) -> ArgumentParser:
    """A parser for `instdiff COMMAND`; the description is shown as it is written, mostly a module's docstring."""
    return ArgumentParser(
        prog=f"instdiff {command}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def any_path(text: str) -> Path:
    """The value of a flag that may be a path in a bucket."""
    try:
        return as_path(text)
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def local_path(text: str) -> Path:
    """The value of a flag that may not."""
    if is_bucket(text):
        raise argparse.ArgumentTypeError(f"expected a path on this machine, got {text}; copy or mount it")
    return Path(text)
