"""Builds the CPU's own kernels (`*.cc`) with the machine's C++ compiler, once, and makes them known to XLA.

The library is built for this very processor when a program first needs it, in a few seconds, and kept in the cache
folder. Without a C++ compiler, or with `INSTDIFF_CPU_KERNEL=0`, XLA's own operations run.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import jax
from jaxtyping import Array

from instdiff_jax.paths import cache_folder

# The kernels by their names in XLA.
TARGETS = {
    "instdiff_flash_attention": "InstdiffAttention",
    "instdiff_product": "InstdiffProduct",
    "instdiff_amx_product": "InstdiffAmxProduct",
    "instdiff_amx_gradient": "InstdiffAmxGradient",
    "instdiff_amx_attention": "InstdiffAmxAttention",
    "instdiff_amx_attention_gradient": "InstdiffAmxAttentionGradient",
}
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
_FOLDER = Path(__file__).parent
SOURCES = sorted(_FOLDER.glob("*.cc"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_log = logging.getLogger(__name__)


def is_used() -> bool:
    """Whether this process has the kernels and a use for them.

    XLA cannot split a custom call, so a process with several devices has none.
    """
    return jax.device_count() == 1 and is_available()


def call(name: str, out: Any, *given: Array, **settings: int) -> Any:
    """A kernel's results, of the types in `out`: `name` is one of TARGETS; vmap runs it row by row.

    Raises:
        RuntimeError: where the kernels are not available.
    """
    # AMX has to be asked for before it is used.
    if not (has_amx() if "_amx_" in name else is_available()):
        raise RuntimeError("the CPU's own kernels are not available here; `supports` says so")
    return jax.ffi.ffi_call(name, out, vmap_method="sequential")(*given, **settings)


def is_available() -> bool:
    """Whether this process has the kernels."""
    return _library() is not None


@functools.cache
def has_amx() -> bool:
    """Whether the kernels are there, and the processor and its system have AMX for them."""
    library = _library()
    return library is not None and library.InstdiffHasAmx() == 1


@functools.cache
def _library() -> ctypes.CDLL | None:
    """Builds the library if the cache folder has none, and makes it known to XLA; None where that fails."""
    if os.environ.get("INSTDIFF_CPU_KERNEL") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        _log.info("no C++ compiler: the CPU's own kernels are not used")
        return None
    try:
        library = ctypes.CDLL(str(build(compiler, cache_folder() / "kernels")))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        _log.warning("the CPU's own kernels are not used: %s", reason.strip().partition("\n")[0])
        return None
    for name, function in TARGETS.items():
        jax.ffi.register_ffi_target(name, jax.ffi.pycapsule(getattr(library, function)), platform="cpu")
    return library


def build(compiler: str, folder: Path) -> Path:
    """The library, built unless the folder has it. Several processes may build at once.

    Raises:
        OSError, subprocess.SubprocessError: if it cannot be built.
    """
    made_from = [path.read_bytes() for path in SOURCES + _HEADERS]
    made_from += [text.encode() for text in (compiler, jax.__version__, processor(), *FLAGS)]
    path = folder / f"cpu_{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / path.name
        # In one go: reading XLA's headers takes longer than a kernel.
        code = "".join(f'#include "{source.name}"\n' for source in SOURCES)
        folders = [f"-I{jax.ffi.include_dir()}", f"-I{_FOLDER}"]
        command = [compiler, *FLAGS, "-march=native", *folders, "-x", "c++", "-", "-o", str(made)]
        subprocess.run(command, input=code, check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, path)
    return path


@functools.cache
def processor() -> str:
    """What a library built for this processor depends on: a folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
