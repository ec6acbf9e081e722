"""Flash attention for CPUs, in C++ (`flash_cpu.cc`), which the machine's own compiler builds once.

XLA writes all logits of a chunk to memory and reads them back; here they stay in the first cache. The library is
built for this very processor when a program first needs it, in a few seconds, and kept in the cache folder. Without a
C++ compiler, or with `INSTDIFF_CPU_KERNEL=0`, the chunked kernel runs. `benchmarks/attention.py` compares them.

Axes: b batch, h heads, n queries, m keys, d head width.
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

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels import chunked
from instdiff_jax.paths import cache_folder

SOURCE = Path(__file__).with_suffix(".cc")
FLAGS = ("-std=c++17", "-O3", "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-shared")
# With fewer products the call takes longer than the work.
MIN_PRODUCTS = 1 << 20
_TARGET = "instdiff_flash_attention"
_log = logging.getLogger(__name__)


def supports(queries: tuple[int, ...], keys: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether the kernel runs queries [b, n, h, d] on keys [b, m, h, d] here, and is worth it.

    It takes float32. XLA cannot split a custom call, so a process with several devices has no use for it.
    """
    (b, n, h, d), m = queries, keys[1]
    worth_it = d <= 256 and b * n * h * d * m >= MIN_PRODUCTS
    return worth_it and dtype == jnp.float32 and jax.device_count() == 1 and is_available()


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
) -> Float[Array, "b n h d"]:
    """`plain.attention`; the gradient is the chunked kernel's."""
    if key_bits is None:
        query_bits = key_bits = jnp.zeros((q.shape[0], 0), jnp.uint32)
    return _flash(q, k, v, query_bits, key_bits)


@jax.custom_vjp
def _flash(q, k, v, query_bits, key_bits) -> Float[Array, "b n h d"]:
    if not is_available():
        raise RuntimeError("the CPU's attention kernel could not be built; `supports` says so")
    out = jax.ShapeDtypeStruct(q.shape, q.dtype)
    return jax.ffi.ffi_call(_TARGET, out, vmap_method="sequential")(q, k, v, query_bits, key_bits)


def _flash_forward(*given):
    return _flash(*given), given


def _flash_backward(given, gradient):
    q, k, v, query_bits, key_bits = given
    bits = (query_bits, key_bits) if key_bits.size else (None, None)
    _, pull = jax.vjp(lambda q, k, v: chunked.attention(q, k, v, *bits), q, k, v)
    return *pull(gradient), None, None


_flash.defvjp(_flash_forward, _flash_backward)


@functools.cache
def is_available() -> bool:
    """Builds the library if the cache folder has none, and makes it known to XLA; False where that fails."""
    if os.environ.get("INSTDIFF_CPU_KERNEL") == "0":
        return False
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))), None)
    if compiler is None:
        _log.info("no C++ compiler: attention runs without the CPU's own kernel")
        return False
    try:
        library = ctypes.CDLL(str(build(compiler, cache_folder() / "kernels")))
    except (OSError, subprocess.SubprocessError) as error:
        reason = getattr(error, "stderr", "") or str(error)
        _log.warning("attention runs without the CPU's own kernel: %s", reason.strip().partition("\n")[0])
        return False
    jax.ffi.register_ffi_target(_TARGET, jax.ffi.pycapsule(library.InstdiffAttention), platform="cpu")
    return True


def build(compiler: str, folder: Path) -> Path:
    """The library, built unless the folder has it. Several processes may build at once.

    Raises:
        OSError, subprocess.SubprocessError: if it cannot be built.
    """
    made_from = [SOURCE.read_bytes(), *(text.encode() for text in (compiler, jax.__version__, processor(), *FLAGS))]
    path = folder / f"flash_cpu_{hashlib.sha256(b'|'.join(made_from)).hexdigest()[:16]}.so"
    if path.exists():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        made = Path(temporary) / path.name
        command = [compiler, *FLAGS, "-march=native", f"-I{jax.ffi.include_dir()}", str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
        os.replace(made, path)
    return path


def processor() -> str:
    """What a library built for this processor depends on: a folder may be shared by several machines."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        return platform.processor() + platform.machine()
