"""A process of a job that fails: the others end too. The whole job is in e2e/test_full_disk.py."""

import errno
import os
import threading
from types import SimpleNamespace

import jax
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.parallel import failures


class Client:
    """A coordinator's client of one process."""

    def __init__(self, **values: str):
        self.values, self.ended = dict(values), False

    def key_value_try_get(self, key):
        if key not in self.values:
            raise jax.errors.JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def key_value_set(self, key, value):
        if key in self.values:
            raise jax.errors.JaxRuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def shutdown(self):
        self.ended = True


@pytest.fixture
def job(monkeypatch):
    """Makes this process the second of two, with a client."""

    def make(**values):
        client = Client(**values)
        monkeypatch.setattr(failures.distributed, "global_state", SimpleNamespace(client=client))
        monkeypatch.setattr(failures, "_EVERY", 0.01)
        monkeypatch.setattr(failures, "_GRACE", 0.05)
        monkeypatch.setattr(jax, "process_count", lambda: 2)
        monkeypatch.setattr(jax, "process_index", lambda: 1)
        return client

    return make


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (InputError("a/b:\nfull"), "2 process 1: a/b: full"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "2 process 1: x: No space left on device"),
        (
            type("HttpError", (Exception,), {"__module__": "gcsfs.retry"})("Forbidden"),
            "2 process 1: the bucket: Forbidden",
        ),
        (KeyError("x"), "1 process 1: KeyError: 'x'"),
    ],
    ids=["input", "disk", "bucket", "other"],
)
def test_an_error_is_told_and_raised(job, error, said):
    client = job()
    with pytest.raises(type(error)) as raised, failures.end_together():
        raise error
    assert raised.value is error and client.values == {failures._KEY: said}


def test_the_first_error_is_kept(job):
    client = job(**{failures._KEY: "2 process 0: full"})
    with pytest.raises(InputError), failures.end_together():
        raise InputError("mine")
    assert client.values == {failures._KEY: "2 process 0: full"}


@pytest.mark.parametrize("code", [1, 2])
def test_a_process_that_waits_is_ended(job, monkeypatch, capsys, code):
    client, codes, ended = job(**{failures._KEY: f"{code} process 0: full"}), [], threading.Event()

    def leave(number):
        codes.append(number)
        ended.set()

    monkeypatch.setattr(os, "_exit", leave)
    with failures.end_together():
        assert ended.wait(30)
    assert codes == [code] and client.ended
    assert capsys.readouterr().err == "error: process 0: full\n"


def test_a_process_that_gets_out_by_itself_is_not(job, monkeypatch, capsys):
    job(**{failures._KEY: "2 process 0: full"})
    monkeypatch.setattr(failures, "_GRACE", 60)
    monkeypatch.setattr(os, "_exit", lambda code: pytest.fail(str(code)))
    with failures.end_together():
        pass
    assert not capsys.readouterr().err


def test_one_process_watches_nothing(job, monkeypatch):
    job()
    monkeypatch.setattr(jax, "process_count", lambda: 1)
    with failures.end_together():
        assert "failures" not in [thread.name for thread in threading.enumerate()]


def test_a_process_whose_save_failed_does_not_wait():
    error = InputError("full")
    with pytest.raises(InputError) as raised:
        try:
            raise error
        finally:
            failures.barrier(key="k", timeout_ms=1)
    assert raised.value is error
