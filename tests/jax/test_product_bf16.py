"""Matrix products and convolutions of bfloat16 on CPUs: outputs, gradients, and where they are used."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.models import layers
from instdiff_jax.models.kernels import cpu, product_bf16
from tests.jax.test_cpu_kernels import WITH_BF16
from tests.jax.test_product_cpu import exact_convolution

BF16 = jnp.dtype("bfloat16")


def random_arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    """Numbers that bfloat16 has, in float32."""
    rng = np.random.default_rng(sum(sum(shape) for shape in shapes))
    return [rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(np.float32) for shape in shapes]


def assert_rounded(found: jax.Array, expected: np.ndarray) -> None:
    """Sums in float32, then rounded to the nearest of the result's type."""
    half = 2.0**-8 if found.dtype == BF16 else 2.0**-24
    sums = 1e-6 * np.abs(expected).max()
    assert found.shape == expected.shape
    assert (np.abs(np.asarray(found, np.float64) - expected) <= half * np.abs(expected) * 1.001 + sums).all()


def as_bf16(*arrays: np.ndarray) -> list[jax.Array]:
    return [jnp.asarray(array, BF16) for array in arrays]


@WITH_BF16
@pytest.mark.parametrize(
    ("rows", "c", "out"),
    [
        ((1,), 1, 1),
        ((32,), 32, 32),  # one whole block
        ((3, 11), 33, 34),  # one row, one term, two columns more
        ((1100,), 1300, 70),  # several blocks of terms, several parts of rows
        ((70,), 77, 1100),  # several parts of columns
        ((4200,), 64, 48),  # more rows than are kept at a time
    ],
)
def test_products_and_gradients_are_sums_in_float32(rows, c, out):
    x, weights, bias, g = random_arrays((*rows, c), (c, out), (out,), (*rows, out))
    y, gradients = outputs(product_bf16.product, x, weights, bias, g)
    x64, w64, g64 = (array.astype(np.float64) for array in (x.reshape(-1, c), weights, g.reshape(-1, out)))
    assert_rounded(y, (x64 @ w64 + bias).reshape(y.shape))
    of_x, of_weights, of_bias = gradients
    assert (of_x.dtype, of_weights.dtype, of_bias.dtype) == (BF16, jnp.float32, jnp.float32)
    assert_rounded(of_x, (g64 @ w64.T).reshape(x.shape))
    assert_rounded(of_weights, x64.T @ g64)
    assert_rounded(of_bias, g64.sum(0))


@WITH_BF16
@pytest.mark.parametrize(
    ("shape", "k", "out", "step"),
    [
        ((2, 5, 7, 3), 3, 4, 1),  # odd sides
        ((1, 1, 1, 4), 3, 4, 1),  # a pixel alone
        ((2, 8, 6, 330), 3, 40, 1),  # several blocks of terms
        ((2, 8, 6, 20), 3, 40, 2),
        ((3, 4, 4, 5), 1, 7, 2),
        ((1, 6, 9, 34), 5, 8, 1),
        ((3, 20, 20, 64), 3, 64, 1),  # more pixels than are kept at a time
    ],
)
def test_convolutions_and_gradients_are_sums_in_float32(shape, k, out, step):
    b, h, w, c = shape
    x, weights, bias, g = random_arrays(shape, (k, k, c, out), (out,), (b, h // step, w // step, out))
    y, gradients = outputs(lambda *given: product_bf16.convolution(*given, step), x, weights, bias, g)
    assert_rounded(y, exact_convolution(x, weights, step) + bias)
    for found, exact in zip(gradients, exact_gradients(x, weights, g, step), strict=True):
        assert_rounded(found, exact)


def outputs(function: Callable, x: np.ndarray, weights: np.ndarray, bias: np.ndarray, g: np.ndarray):
    """The result, and the gradients of x, weights and bias."""

    @jax.jit
    def run(x, g, *parameters):
        y, pull = jax.vjp(function, x, *parameters)
        return y, pull(g)

    return run(*as_bf16(x, g), weights, bias)


def exact_gradients(x: np.ndarray, weights: np.ndarray, g: np.ndarray, step: int) -> list[np.ndarray]:
    """Of a convolution, in float64."""
    k, (_, h, w, _) = len(weights), x.shape
    around = [(0, 0), (k // 2,) * 2, (k // 2,) * 2, (0, 0)]
    padded, g = np.pad(x.astype(np.float64), around), g.astype(np.float64)
    of_padded, of_weights = np.zeros_like(padded), np.zeros(weights.shape)
    for i in range(k):
        for j in range(k):
            near = np.s_[:, i : i + h : step, j : j + w : step]
            of_weights[i, j] = np.einsum("bhwi,bhwo->io", padded[near], g)
            of_padded[near] += np.einsum("bhwo,io->bhwi", g, weights[i, j])
    return [of_padded[:, k // 2 :, k // 2 :][:, :h, :w], of_weights, g.sum((0, 1, 2))]


@WITH_BF16
def test_a_row_is_the_same_alone_and_among_others():
    x, weights = as_bf16(*random_arrays((4500, 700), (700, 96)))
    run, bias = jax.jit(product_bf16.product), jnp.zeros(96)
    whole = np.asarray(run(x, weights, bias))
    for rows in (slice(0, 1), slice(13, 30), slice(137, 4400)):
        np.testing.assert_array_equal(np.asarray(run(x[rows], weights, bias)), whole[rows])


@WITH_BF16
def test_what_is_not_finite_stays_so():
    x, weights, bias = random_arrays((40, 50), (50, 33), (33,))
    x[3, 7], x[20, 0], weights[4, 32], bias[5] = np.nan, np.inf, np.nan, np.inf
    ours = np.isfinite(np.asarray(product_bf16.product(*as_bf16(x, weights), bias), np.float32))
    assert (ours == np.isfinite(x @ weights + bias)).all() and not ours.all()


@WITH_BF16
def test_maps_and_many_calls_at_once():
    x, weights, bias = random_arrays((3, 90, 64), (64, 48), (48,))
    run = jax.jit(product_bf16.product)
    mapped = jax.jit(jax.vmap(product_bf16.product, (0, None, None)))(x, weights, bias)
    for row, one in zip(x, mapped, strict=True):
        np.testing.assert_array_equal(np.asarray(run(row, weights, bias)), np.asarray(one))
    outs = [run(x, weights, bias) for _ in range(50)]
    assert all((np.asarray(other) == np.asarray(outs[0])).all() for other in outs)


@WITH_BF16
def test_used_by_dense_and_conv_in_bfloat16(monkeypatch):
    cases = [
        (layers.Dense(64, dtype=BF16), (1, 512, 64), True),
        (layers.Dense(64, use_bias=False, dtype=BF16), (1, 512, 64), True),
        (layers.Dense(64), (1, 512, 64), False),
        (layers.Dense(8, dtype=BF16), (1, 512, 64), False),
        (layers.Conv(64, (3, 3), dtype=BF16), (1, 16, 16, 64), True),
        (layers.Conv(64, (3, 3), strides=2, padding=((1, 1), (1, 1)), dtype=BF16), (2, 16, 16, 64), True),
        (layers.Conv(64, (3, 3), strides=2, padding=((0, 1), (0, 1)), dtype=BF16), (2, 16, 16, 64), False),
        (layers.Conv(64, (3, 3), strides=2, padding=((1, 1), (1, 1)), dtype=BF16), (2, 17, 17, 64), False),
        (layers.Conv(64, (3, 3), feature_group_count=64, dtype=BF16), (2, 64, 64, 64), False),
        (layers.Conv(64, (3, 3), kernel_dilation=2, dtype=BF16), (2, 16, 16, 64), False),
        (layers.Conv(4, (3, 3), dtype=BF16), (1, 64, 64, 320), False),
    ]
    for layer, shape, used in cases:
        (x,) = as_bf16(*random_arrays(shape))
        params = layer.init(jax.random.key(0), x)
        with monkeypatch.context() as without:
            without.setattr(cpu, "is_used", lambda: False)
            theirs, same = layer.apply(params, x), layer.init(jax.random.key(0), x)
        assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), params, same))  # and of the same names
        assert ("instdiff_bf16" in str(jax.make_jaxpr(layer.apply)(params, x))) == used, (layer, shape)
        ours = layer.apply(params, x)
        assert ours.dtype == theirs.dtype
        ours, theirs = (np.asarray(y, np.float32) for y in (ours, theirs))
        np.testing.assert_allclose(ours, theirs, atol=2.0**-7 * np.abs(theirs).max())
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not product_bf16.supports(512, (512, 512), BF16)


def test_not_used_without_bf16(monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    assert not product_bf16.supports(512, (512, 512), BF16)
    with pytest.raises(RuntimeError, match="not available here"):
        product_bf16.product(*as_bf16(*random_arrays((4, 4), (4, 4))), jnp.zeros(4))


ALONE = """
import jax, numpy as np
from instdiff_jax.models.kernels import cpu, product_bf16
from tests.jax.test_product_bf16 import as_bf16, assert_rounded, random_arrays
assert cpu.has_bf16()
x, weights, bias = random_arrays((1100, 1300), (1300, 70), (70,))
exact = x.astype(np.float64) @ weights + bias
assert_rounded(product_bf16.product(*as_bf16(x, weights), bias), exact)
"""


@WITH_BF16
def test_without_tiles():
    """Where a processor has AMX too, its other instructions give sums in float32 as well."""
    env = os.environ | {"JAX_PLATFORMS": "cpu", "INSTDIFF_AMX": "0"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", ALONE], env=env, cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@WITH_BF16
def test_flops_are_counted():
    x, weights, bias = (jax.ShapeDtypeStruct(shape, BF16) for shape in ((2, 100, 64), (64, 48), (48,)))
    assert count_flops(product_bf16.product, x, weights, bias) == 2 * 200 * 64 * 48
    x, weights = (jax.ShapeDtypeStruct(shape, BF16) for shape in ((2, 8, 8, 64), (3, 3, 64, 48)))
    convolve = lambda x, w, b: product_bf16.convolution(x, w, b, 2)  # noqa: E731
    forward = 2 * 2 * 16 * 9 * 64 * 48
    assert count_flops(convolve, x, weights, bias) == forward

    def gradients(x, w, b):
        y, pull = jax.vjp(convolve, x, w, b)
        return pull(y)

    # Of x by a convolution at every pixel, of the weights at every second.
    assert count_flops(gradients, x, weights, bias) == forward * (1 + 4 + 1)
