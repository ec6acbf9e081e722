"""The parser that every command starts from."""

import argparse

from instdiff_jax.errors import ArgumentParser

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
