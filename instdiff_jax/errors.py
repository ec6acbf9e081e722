"""The error for input that a user can mend, and how a command line reports it."""

import argparse
import contextlib
import errno
import sys
from collections.abc import Iterator
from typing import Any, NoReturn

FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class InputError(ValueError):
    """Bad input: a layout, a flag, a config, a checkpoint or a dataset.

    The message is one line that names the file, the field and what was expected.
    """


class NotFiniteError(InputError):
    """Latents or pixels with NaN or infinity: a broken weight, or an overflow of float16.

    Attributes:
        layout: the name of the layout whose image it is.
    """

    def __init__(self, layout: str, seed: int, problem: str):
        self.layout = layout
        super().__init__(f"{layout}: seed {seed}: {problem}")


def short(value: Any) -> str:
    """A value for an error message: one line of at most 60 characters."""
    try:
        text = " ".join(repr(value).split())
    except (ValueError, RecursionError):
        return f"a {type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(text: str) -> str:
    """Words longer than 300 signs are cut: no file name or number of use is as long."""
    words = (word if len(word) <= 300 else word[:57] + "..." for word in text.split())
    text = " ".join(words)
    return text if len(text) <= 2000 else text[:1997] + "..."


def explained(error: Exception) -> str | None:
    """One line for an error that the user can mend: an `InputError`, a full disk, a bucket's; None for any other."""
    if isinstance(error, InputError):
        return _one_line(str(error))
    if isinstance(error, OSError) and error.errno in FULL_DISK:
        return f"{_one_line(str(error.filename or 'output'))}: {error.strerror}"
    if type(error).__module__.partition(".")[0] in ("gcsfs", "google"):  # what reads gs:// paths
        return f"the bucket: {_one_line(str(error))}"
    return None


@contextlib.contextmanager
def exit_on_input_error() -> Iterator[None]:
    """Ends the process with one line on stderr and exit code 2 at an error that has an explanation (`explained`)."""
    try:
        yield
    except Exception as error:
        line = explained(error)
        if line is None:
            raise
        print(f"error: {line}", file=sys.stderr)
        sys.exit(2)


class ArgumentParser(argparse.ArgumentParser):
    """argparse's, but an error is one line, without the usage before it."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {_one_line(message.removeprefix('argument '))}\n")
