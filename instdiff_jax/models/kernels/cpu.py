"""Builds the CPU's own kernels with the machine's C++ compiler, once, and makes them known to XLA.

A library is built for this very processor when a program first needs it, in a few seconds, and kept in the cache
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

# The kernels by their names in XLA, in two libraries: `*_cpu.cc`, and `*_bf16.cc` for bfloat16, with AMX or
# AVX-512's dot products.
TARGETS = {
    "cpu": {"instdiff_flash_attention": "InstdiffAttention", "instdiff_product": "InstdiffProduct"},
    "bf16": {
        "instdiff_bf16_product": "InstdiffBf16Product",
        "instdiff_bf16_gradient": "InstdiffBf16Gradient",
        "instdiff_bf16_attention": "InstdiffBf16Attention",
        "instdiff_bf16_attention_gradient": "InstdiffBf16AttentionGradient",
    },
}
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
_FOLDER = Path(__file__).parent
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
    # AMX's tiles have to be asked for before they are used.
    if not (has_bf16() if name in TARGETS["bf16"] else is_available()):
        raise RuntimeError("the CPU's own kernels are not available here; `supports` says so")
    return jax.ffi.ffi_call(name, out, vmap_method="sequential")(*given, **settings)


def is_available() -> bool:
    """Whether this process has the kernels."""
    return _library("cpu") is not None


@functools.cache
def has_bf16() -> bool:
    """Whether the processor multiplies bfloat16, and this process has the kernels for it.

    Intel's AMX (Xeons since 2023) or AVX-512's dot products (AMD's processors since Zen 4, some older Xeons).
    INSTDIFF_AMX=0 takes the second where there are both.
    """
    if " avx512_bf16" not in processor():
        return False
    library = _library("bf16")
    return library is not None and library.InstdiffHasBf16(int(os.environ.get("INSTDIFF_AMX") != "0")) > 0


@functools.cache
def _library(name: str) -> ctypes.CDLL | None:
    """Builds a library if the cache folder has none, and makes it known to XLA; None where that fails."""
    if os.environ.get("INSTDIFF_CPU_KERNEL") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        _log.info("no C++ compiler: the CPU's own kernels are not used")
        return None
    try:
        library = ctypes.CDLL(str(build(name, compiler, cache_folder() / "kernels")))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        _log.warning("the CPU's own kernels are not used: %s", reason.strip().partition("\n")[0])
        return None
    for target, function in TARGETS[name].items():
        jax.ffi.register_ffi_target(target, jax.ffi.pycapsule(getattr(library, function)), platform="cpu")
    return library


def build(name: str, compiler: str, folder: Path) -> Path:
    """The library of that name, built unless the folder has it. Several processes may build at once.

    Raises:
        OSError, subprocess.SubprocessError: if it cannot be built.
    """
    sources = sorted(_FOLDER.glob(f"*_{name}.cc"))
    made_from = [path.read_bytes() for path in sources + _HEADERS]
    made_from += [text.encode() for text in (compiler, jax.__version__, processor(), *FLAGS)]
    path = folder / f"{name}_{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / path.name
        # In one go: reading XLA's headers takes longer than a kernel.
        code = "".join(f'#include "{source.name}"\n' for source in sources)
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
