"""The memory that compiling leaves behind, and that training keeps."""

import os
import platform
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest

from instdiff_jax.parallel import runtime as compilation


def printed(code: str, *arguments: str) -> str:
    """What a process of its own prints, on a CPU and with glibc's own settings of its memory."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    command, environment = [sys.executable, "-c", code, *arguments], environment | {"JAX_PLATFORMS": "cpu"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


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
    monkeypatch.setattr(compilation, "_mallopt", lambda *given: counts.append(given))
    compilation.spare_compiler_memory()
    assert counts == [(compilation._M_ARENA_MAX, max(1, os.cpu_count() // 2))] * asked


@pytest.mark.parametrize(
    ("variables", "asked"),
    [
        ({}, {-8: 1, -4: 0, -1: -1}),
        ({"MALLOC_ARENA_MAX": "4", "MALLOC_MMAP_MAX_": "9"}, {-1: -1}),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0"}, {-8: 1, -1: -1}),
    ],
)
def test_training_on_a_cpu_keeps_its_memory(monkeypatch, variables, asked):
    """Where jax finds no accelerator, and as far as the user has not set it."""
    for name in ("MALLOC_ARENA_MAX", "MALLOC_MMAP_MAX_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    made = []
    monkeypatch.setattr(compilation, "_mallopt", lambda *given: made.append(given))
    monkeypatch.setattr(compilation, "_is_on_cpu", lambda: False)
    compilation.keep_step_memory()
    assert not made
    monkeypatch.setattr(compilation, "_is_on_cpu", lambda: True)
    compilation.keep_step_memory()
    assert dict(made) == asked


@pytest.mark.parametrize(
    ("platforms", "plugins", "modules", "expected"),
    [
        ("cpu", ["cuda"], ["libtpu"], True),
        ("cpu,tpu", [], [], True),
        ("cuda,cpu", [], [], False),
        (None, [], [], True),
        (None, ["cuda"], [], False),
        (None, [], ["libtpu"], False),
        (None, [], ["jax_plugins"], False),
    ],
)
def test_what_is_a_cpu(monkeypatch, platforms, plugins, modules, expected):
    monkeypatch.setattr(compilation, "entry_points", lambda group: plugins)
    monkeypatch.setattr(compilation.importlib.util, "find_spec", lambda name: name in modules or None)
    before = jax.config.jax_platforms
    jax.config.update("jax_platforms", platforms)
    try:
        assert compilation._is_on_cpu() is expected
    finally:
        jax.config.update("jax_platforms", before)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps memory in other ways")
@pytest.mark.parametrize("keep", [False, True])
def test_a_thread_gets_its_large_blocks_back(keep):
    """In a process of its own: a thread takes and frees 64 MB ten times. If it is kept, only the first costs faults."""
    code = f"""
import ctypes, resource, threading
from instdiff_jax.parallel import runtime as compilation
if {keep}: compilation.keep_step_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
counts = []
thread = threading.Thread(target=lambda: counts.extend(faults() for _ in range(10)))
thread.start(), thread.join()
print(sum(counts[1:]) / counts[0])
"""
    assert (float(printed(code)) < 0.1) is keep


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library has other heaps")
def test_glibc_takes_the_number_of_heaps():
    """In a process of its own, with threads that each would have had a heap: malloc_info lists them."""
    code = """
import ctypes, threading, sys
from instdiff_jax.parallel import runtime as compilation
asked = int(sys.argv[1])
assert not asked or compilation._mallopt(compilation._M_ARENA_MAX, asked)
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
    heaps = [printed(code, str(n)).count("<heap") for n in (0, 1)]
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
