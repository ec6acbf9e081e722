"""orbax says each error once: what its threads log and print, it also raises where it is called."""

import functools
import logging
import os
import sys
import traceback
from types import TracebackType
from typing import Any

_ORBAX = f"{os.sep}orbax{os.sep}checkpoint{os.sep}"


@functools.cache
def say_errors_once() -> None:
    """Leaves out orbax's warnings, and the tracebacks of errors that reach its caller. Call before using orbax.

    It stays for the process: after an error, threads that are still writing may fail at any time.
    """
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(_keeps)
    sys.unraisablehook = functools.partial(_unraisable, sys.unraisablehook)


def _keeps(record: logging.LogRecord) -> bool:
    if _ORBAX in record.pathname:
        return False
    return not record.exc_info or not _is_orbax(record.exc_info[2])


def _is_orbax(trace: TracebackType | None) -> bool:
    return any(_ORBAX in frame.f_code.co_filename for frame, _ in traceback.walk_tb(trace))


def _unraisable(before: Any, unraisable: Any) -> None:
    """orbax closes the loop of a save at its first error; tensorstore's other writes then find it closed."""
    if isinstance(unraisable.exc_value, RuntimeError) and str(unraisable.exc_value) == "Event loop is closed":
        return
    before(unraisable)
