"""One process of a job fails: the others, which wait for it, are told and end too."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax._src import distributed  # the coordinator's client has no public name; orbax takes it from there too

from instdiff_jax.errors import explained

_KEY = "instdiff/failed"
_EVERY = 1.0  # seconds between two looks
_GRACE = 10.0  # seconds for a process to end by itself: most faults are seen by all of them


@contextlib.contextmanager
def end_together() -> Iterator[None]:
    """Inside, an error of one process ends the whole job, also those that wait for it in a collective or a barrier.

    They end with a line that names the process and its error, and with exit code 2 where `errors.explained` explains
    it, else 1. Does nothing in a job of one process.
    """
    client = distributed.global_state.client
    if jax.process_count() == 1 or client is None:
        yield
        return
    left = threading.Event()
    watcher = threading.Thread(target=_watch, args=(client, left), name="failures", daemon=True)
    watcher.start()
    try:
        yield
    except Exception as error:
        line = explained(error)
        code, said = (1, f"{type(error).__name__}: {error}") if line is None else (2, line)
        line = f"{code} process {jax.process_index()}: {' '.join(said.split())[:1000]}"
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another was first, or the coordinator is gone
            client.key_value_set(_KEY, line)
        raise
    finally:
        left.set()
        watcher.join()


def _watch(client: Any, left: threading.Event) -> None:
    """Ends the process some time after another one has failed, unless it gets out by itself."""
    said = None
    while said is None:
        if left.wait(_EVERY):
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nothing there
            said = client.key_value_try_get(_KEY)
    if left.wait(_GRACE):
        return
    code, _, line = said.partition(" ")
    print(f"error: {line}", file=sys.stderr, flush=True)
    with contextlib.suppress(jax.errors.JaxRuntimeError):
        client.shutdown()  # else the others wait for this one
    os._exit(int(code))  # the main thread may never come back from what it waits in


def barrier(*, key: str, timeout_ms: int) -> None:
    """orbax's barrier of background saves, which a process whose save has failed does not wait at.

    Without it, that process and the others would wait at two different barriers, for each other, until a time-out.
    """
    error = sys.exc_info()[1]  # orbax waits in a `finally`
    if error is not None:
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)
