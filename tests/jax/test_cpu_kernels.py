"""How the CPU's own kernels are built, and what runs without them."""

import os
import shutil
import subprocess
import sys

import pytest

from instdiff_jax.models.kernels import chunked, cpu

COMPILER = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
WITH_COMPILER = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler: XLA's operations run instead")
WITH_BF16 = pytest.mark.skipif(not cpu.has_bf16(), reason="no bfloat16 on this processor: XLA runs instead")

CHOOSE = """
import jax.numpy as jnp
from instdiff_jax.models.attention import choose_kernel
from instdiff_jax.models.kernels import product_bf16, product_cpu
assert not product_bf16.supports(512, (512, 512), jnp.dtype("bfloat16"))
assert not product_cpu.supports(512, jnp.zeros((512, 512)), jnp.dtype("float32"))
print(choose_kernel("cpu", (2, 256, 8, 40), (2, 256, 8, 40), jnp.dtype("float32"), False).__module__)
"""


@pytest.mark.parametrize(
    "env",
    [
        pytest.param({"INSTDIFF_CPU_KERNEL": "0"}, id="switched_off"),
        pytest.param({"PATH": "/nowhere", "CXX": "none"}, id="no_compiler"),
        pytest.param({"CXX": "false"}, id="a_compiler_that_fails", marks=WITH_COMPILER),
    ],
)
def test_without_them_xla_runs(env, tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path)} | env
    done = subprocess.run([sys.executable, "-c", CHOOSE], env=env, capture_output=True, text=True, check=True)
    assert done.stdout == f"{chunked.__name__}\n", done.stderr
    assert not list(tmp_path.rglob("*.so"))


@WITH_COMPILER
@pytest.mark.parametrize("name", cpu.TARGETS)
def test_built_once(name, tmp_path):
    first = cpu.build(name, COMPILER, tmp_path)
    made = first.stat().st_mtime_ns
    assert cpu.build(name, COMPILER, tmp_path) == first and first.stat().st_mtime_ns == made
    assert [path.name for path in tmp_path.iterdir()] == [first.name]
