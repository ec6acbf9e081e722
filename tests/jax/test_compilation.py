"""The memory that compiling leaves behind."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from instdiff_jax.parallel import runtime as compilation


@pytest.fixture
def trims(monkeypatch):
    """Calls of the C library's trim, with listeners that end with the test."""
    made, listeners = [], []
    monkeypatch.setattr(compilation, "_heap_trim", lambda: lambda: made.append(1))
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", listeners.append)
    compilation.return_compiler_memory.cache_clear()
    compilation.return_compiler_memory()
    compilation.return_compiler_memory()
    assert len(listeners) == 1
    yield made, listeners[0]
    compilation.return_compiler_memory.cache_clear()


def test_memory_goes_back_after_a_long_compilation_alone(trims):
    made, listener = trims
    for event, duration in (("/jax/core/compile/jaxpr_trace_duration", 9.0), (compilation._BACKEND_COMPILE, 0.1)):
        listener(event, duration)
    assert not made
    listener(compilation._BACKEND_COMPILE, 9.0, fun_name="f")
    assert made == [1]


def test_jax_tells_of_a_compilation_by_that_name():
    """The name is no public promise of jax: without it nothing would be given back."""
    events = []
    listener = lambda event, duration, **_: events.append(event)  # noqa: E731
    jax.monitoring.register_event_duration_secs_listener(listener)
    try:
        jax.jit(lambda x: jnp.sin(x) * 7.125)(1.0)
    finally:
        jax._src.monitoring.unregister_event_duration_listener(listener)
    assert compilation._BACKEND_COMPILE in events


def test_another_c_library_is_no_error(monkeypatch):
    monkeypatch.setattr(compilation, "_heap_trim", lambda: None)
    compilation.return_compiler_memory.cache_clear()
    compilation.return_compiler_memory()
    compilation.return_compiler_memory.cache_clear()
    monkeypatch.undo()
    trim = compilation._heap_trim()
    assert trim is None or trim() in (0, 1)


@pytest.mark.parametrize(
    "before", ["", "--xla_cpu_use_fusion_emitters=true", "--xla_force_host_platform_device_count=2"]
)
def test_flags_of_the_user_stay(monkeypatch, before):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setattr(compilation, "_FIRST_WITHOUT", (1000,))
    compilation.spare_compiler_memory()
    compilation.spare_compiler_memory()
    added = [] if "emitters" in before else ["--xla_cpu_use_fusion_emitters=false"]
    assert os.environ["XLA_FLAGS"].split() == before.split() + added


@pytest.mark.parametrize(
    ("variables", "asked"),
    [({}, 1), ({"MALLOC_ARENA_MAX": "4"}, 0), ({"GLIBC_TUNABLES": "glibc.malloc.arena_max=4"}, 0)],
)
def test_heaps_of_the_user_stay(monkeypatch, variables, asked):
    for name in ("MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    counts = []
    monkeypatch.setattr(compilation, "_set_heaps", counts.append)
    compilation.spare_compiler_memory()
    assert counts == [max(1, os.cpu_count() // 2)] * asked


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other heaps")
def test_glibc_takes_the_number_of_heaps():
    """In a process of its own, with threads that each would have had a heap: malloc_info lists them."""
    code = """
import ctypes, threading, sys
from instdiff_jax.parallel import runtime as compilation
asked = int(sys.argv[1])
assert not asked or compilation._set_heaps(asked)
libc, go = ctypes.CDLL(None), threading.Barrier(4)
libc.malloc.restype = ctypes.c_void_p
def work():
    go.wait(); libc.malloc(100_000); go.wait()
threads = [threading.Thread(target=work) for _ in range(4)]
[t.start() for t in threads]; [t.join() for t in threads]
libc.fopen.restype = ctypes.c_void_p
out = ctypes.c_void_p(libc.fopen(b"/dev/stdout", b"w"))
libc.malloc_info(0, out); libc.fflush(out)
"""
    heaps = [
        subprocess.run([sys.executable, "-c", code, str(n)], capture_output=True, text=True, check=True).stdout.count(
            "<heap"
        )
        for n in (0, 1)
    ]
    assert heaps[0] > heaps[1] == 1, heaps


def test_no_flag_for_an_unknown_xla(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(compilation, "_FIRST_WITHOUT", (0, 1))
    compilation.spare_compiler_memory()
    assert os.environ["XLA_FLAGS"] == ""


def test_this_xla_knows_the_flag():
    code = "from instdiff_jax.parallel.runtime import *; spare_compiler_memory(); print(jax.jit(lambda x: x + 1)(1))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr
