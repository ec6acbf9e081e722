"""What a process is set up with: the cache of compiled programs, and the memory that compiling and training need."""

import ctypes
import functools
import importlib.util
import os
import warnings
from collections.abc import Callable
from importlib.metadata import entry_points
from typing import Any

import jax
import jaxlib

from instdiff_jax.paths import cache_folder

_EMITTERS_FLAG = "xla_cpu_use_fusion_emitters"
# An unknown flag makes XLA end the process. jaxlib 0.10.2 knows this one, 0.11.2 does not.
_FIRST_WITHOUT = (0, 11)
# Parameters of mallopt, from glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_BACKEND_COMPILE = "/jax/core/compile/backend_compile_duration"


def set_up_compilation() -> None:
    """Sets up compilation for a command: cache and memory. Call before jax looks for devices.

    It changes the process (environment, jax's configuration, the allocator), so only the command line calls it, never
    the library.
    """
    spare_compiler_memory()
    enable_compilation_cache()
    return_compiler_memory()


def enable_compilation_cache() -> None:
    """Caches compiled programs in the user's cache folder, unless jax already has a cache folder."""
    if jax.config.jax_compilation_cache_dir is not None:
        return
    folder = cache_folder() / "xla"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        warnings.warn(f"no compilation cache: {folder}: {error.strerror}", stacklevel=2)
        return
    jax.config.update("jax_compilation_cache_dir", str(folder))


def spare_compiler_memory() -> None:
    """Makes XLA compile for CPUs in less memory. Has no effect once jax has looked for devices.

    XLA's fusion emitters need half a gigabyte more for a small UNet, beside the weights, and the program is no faster
    (docs/performance.md). By default glibc gives every thread its own heap, each partly unused; this allows one heap
    per two cores. A user's own XLA_FLAGS and MALLOC_ARENA_MAX are kept.
    """
    if not _is_set("arena_max"):
        _mallopt(_M_ARENA_MAX, max(1, (os.cpu_count() or 1) // 2))
    flags = os.environ.get("XLA_FLAGS", "")
    if _EMITTERS_FLAG not in flags and jaxlib.version.__version_info__ < _FIRST_WITHOUT:
        os.environ["XLA_FLAGS"] = f"{flags} --{_EMITTERS_FLAG}=false".strip()


@functools.cache
def return_compiler_memory() -> None:
    """From now on, returns the compiler's freed memory to the system after each long compilation, on CPUs.

    On CPUs, compiler and programs share memory, and glibc would keep half a gigabyte after a small UNet. Does nothing
    with another C library.
    """
    trim = _heap_trim()
    if trim is None:
        return

    def trim_after(event: str, duration: float, **_: Any) -> None:
        if event == _BACKEND_COMPILE and duration > 0.5 and jax.default_backend() == "cpu":
            trim()

    jax.monitoring.register_event_duration_secs_listener(trim_after)


def keep_step_memory() -> None:
    """Makes glibc keep the memory of a training step for the next one, on CPUs. Call before jax looks for devices.

    By default glibc returns large blocks to the system when they are freed, and the next step pays for every page of
    them again. Only the first heap can keep them, so all threads share it. It changes the process, so only the command
    line calls it. What the user has set (GLIBC_TUNABLES, MALLOC_ARENA_MAX and so on) is kept.
    """
    if not _is_on_cpu():
        return
    wanted = {"arena_max": (_M_ARENA_MAX, 1), "mmap_max": (_M_MMAP_MAX, 0), "trim_threshold": (_M_TRIM_THRESHOLD, -1)}
    for name, (parameter, value) in wanted.items():
        if not _is_set(name):
            _mallopt(parameter, value)


def _is_on_cpu() -> bool:
    """Whether jax will find no accelerator, as far as can be said before it looks."""
    if jax.config.jax_platforms:
        return jax.config.jax_platforms.split(",")[0] == "cpu"
    plugins = entry_points(group="jax_plugins") or any(map(importlib.util.find_spec, ("jax_plugins", "libtpu")))
    return not plugins


def _is_set(name: str) -> bool:
    """Whether the user has set a parameter of glibc's malloc, by the name it has in GLIBC_TUNABLES."""
    variable = f"MALLOC_{name.upper()}" + "_" * (name != "arena_max")
    return variable in os.environ or f"glibc.malloc.{name}=" in os.environ.get("GLIBC_TUNABLES", "")


def _mallopt(parameter: int, value: int) -> bool:
    """Sets a parameter of glibc's malloc; returns False with another C library."""
    try:
        return bool(ctypes.CDLL(None).mallopt(ctypes.c_int(parameter), ctypes.c_int(value)))
    except (OSError, TypeError, AttributeError):
        return False


def _heap_trim() -> Callable[[], int] | None:
    """glibc's malloc_trim with a pad of 0; None with another C library."""
    try:
        function = ctypes.CDLL(None).malloc_trim
    except (OSError, TypeError, AttributeError):
        return None
    return functools.partial(function, ctypes.c_size_t(0))
