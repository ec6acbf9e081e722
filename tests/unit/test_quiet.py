"""orbax's threads do not say what its caller is told; everything else is said."""

import logging
import types

from instdiff_jax.checkpoint import quiet


def record(path: str, error: BaseException | None = None) -> logging.LogRecord:
    info = None if error is None else (type(error), error, error.__traceback__)
    return logging.LogRecord("absl", logging.ERROR, path, 1, "message", None, info)


def raised(file: str) -> Exception:
    try:
        exec(compile("raise ValueError('full')", file, "exec"))
    except ValueError as error:
        return error


def test_only_orbax_is_left_out():
    inside = "/site-packages/orbax/checkpoint/_src/futures/future.py"
    assert not quiet._keeps(record(inside)) and not quiet._keeps(record("base_events.py", raised(inside)))
    assert quiet._keeps(record("other.py")) and quiet._keeps(record("other.py", raised("other.py")))


def test_only_a_closed_loop_is_left_out():
    said = []
    for text in ("Event loop is closed", "another"):
        quiet._unraisable(said.append, types.SimpleNamespace(exc_value=RuntimeError(text)))
    assert [str(entry.exc_value) for entry in said] == ["another"]
