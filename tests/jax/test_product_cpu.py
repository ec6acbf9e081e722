"""The CPU's own matrix products and convolutions against XLA's: outputs, gradients, and where they are used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.models import layers
from instdiff_jax.models.kernels import cpu, product_cpu
from tests.jax.test_cpu_kernels import WITH_COMPILER

NAMES = ("NHWC", "HWIO", "NHWC")
F32 = jnp.dtype("float32")


def random_arrays(*shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(sum(sum(shape) for shape in shapes))
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def exact_convolution(x: np.ndarray, weights: np.ndarray, step: int) -> np.ndarray:
    """In float64."""
    with jax.enable_x64(True):
        x, weights = jnp.asarray(x, jnp.float64), jnp.asarray(weights, jnp.float64)
        around = [(weights.shape[0] // 2,) * 2] * 2
        return np.asarray(jax.lax.conv_general_dilated(x, weights, (step, step), around, dimension_numbers=NAMES))


@WITH_COMPILER
@pytest.mark.parametrize(
    ("rows", "c", "out"),
    [
        ((1,), 1, 1),
        ((14,), 320, 32),  # one whole tile
        ((3, 5), 321, 33),  # one row, one term, one column more
        ((2, 700), 640, 672),  # several parts, more columns than one may have
        ((1100,), 77, 40),
        ((29,), 1000, 100),
    ],
)
def test_products_equal_xla_to_rounding(rows, c, out):
    """At most twice as far from float64 as XLA's."""
    x, weights = random_arrays((*rows, c), (c, out))
    expected = x.astype(np.float64) @ weights.astype(np.float64)
    ours, theirs = (np.asarray(jax.jit(f)(x, weights)) for f in (product_cpu.product, jnp.matmul))
    distance = [np.abs(y - expected).max() for y in (ours, theirs)]
    assert ours.shape == expected.shape and distance[0] <= 2 * distance[1] + 1e-7 * np.abs(expected).max()


@WITH_COMPILER
@pytest.mark.parametrize(
    ("shape", "k", "out", "step"),
    [
        ((2, 5, 7, 3), 3, 4, 1),  # odd sides
        ((1, 1, 1, 4), 3, 4, 1),  # a pixel alone
        ((2, 8, 6, 330), 3, 40, 1),  # a kernel's neighbour has more than one block of terms
        ((2, 8, 6, 20), 3, 40, 2),
        ((3, 4, 4, 5), 1, 7, 1),
        ((1, 6, 9, 4), 5, 8, 1),
    ],
)
def test_convolutions_equal_xla_to_rounding(shape, k, out, step):
    x, weights = random_arrays(shape, (k, k, shape[-1], out))
    expected = exact_convolution(x, weights, step)
    ours = np.asarray(jax.jit(product_cpu.convolution, static_argnums=2)(x, weights, step))
    assert ours.shape == expected.shape
    np.testing.assert_allclose(ours, expected, atol=2e-6 * np.abs(expected).max())


@WITH_COMPILER
def test_gradients_equal_xla():
    x, weights, gradient = random_arrays((2, 5, 30), (30, 12), (2, 5, 12))
    for ours, theirs in zip(*(jax.vjp(f, x, weights)[1](gradient) for f in (product_cpu.product, jnp.matmul))):
        np.testing.assert_array_equal(ours, theirs)
    for step in (1, 2):
        x, weights, gradient = random_arrays((2, 4, 6, 8), (3, 3, 8, 5), (2, 4 // step, 6 // step, 5))
        found = jax.vjp(lambda x, w: product_cpu.convolution(x, w, step), x, weights)[1](gradient)
        x64, w64 = x.astype(np.float64), weights.astype(np.float64)
        # A convolution is linear in either: <g, conv(x, w)> = <dx, x> = <dw, w>.
        value = (gradient * exact_convolution(x, weights, step)).sum()
        np.testing.assert_allclose([(found[0] * x64).sum(), (found[1] * w64).sum()], [value] * 2, rtol=1e-5)


@WITH_COMPILER
def test_a_row_is_the_same_alone_and_among_others():
    """Sums are added in one order, whatever the number of rows; so a picture does not depend on its batch."""
    x, weights = random_arrays((400, 700), (700, 96))
    run = jax.jit(product_cpu.product)
    whole = np.asarray(run(x, weights))
    for rows in (slice(0, 1), slice(13, 30), slice(137, 400)):
        np.testing.assert_array_equal(np.asarray(run(x[rows], weights)), whole[rows])


@WITH_COMPILER
def test_what_is_not_finite_stays_so():
    x, weights = random_arrays((40, 50), (50, 33))
    x[3, 7], x[20, 0], weights[4, 32] = np.nan, np.inf, np.nan
    ours, theirs = (np.isfinite(f(x, weights)) for f in (product_cpu.product, jnp.matmul))
    assert (np.asarray(ours) == np.asarray(theirs)).all() and not ours.all()


@WITH_COMPILER
def test_maps_and_many_calls_at_once():
    x, weights = random_arrays((3, 90, 64), (64, 48))
    run = jax.jit(product_cpu.product)
    mapped = jax.jit(jax.vmap(product_cpu.product, (0, None)))(x, weights)
    for row, one in zip(x, mapped, strict=True):
        np.testing.assert_array_equal(np.asarray(run(row, weights)), np.asarray(one))
    outs = [run(x, weights) for _ in range(50)]
    assert all((np.asarray(other) == np.asarray(outs[0])).all() for other in outs)


@WITH_COMPILER
def test_used_by_dense_and_conv_where_it_is_faster(monkeypatch):
    monkeypatch.setattr(product_cpu, "is_faster", lambda: True)
    cases = [
        (layers.Dense(256), (1, 512, 256), True),
        (layers.Dense(256), (1, 32, 256), False),  # few rows
        (layers.Dense(64), (1, 512, 256), False),
        (layers.Conv(128, (3, 3)), (1, 16, 16, 128), True),
        (layers.Conv(128, (3, 3), strides=2, padding=((1, 1), (1, 1))), (2, 16, 16, 128), True),
        (layers.Conv(128, (3, 3), strides=2, padding=((0, 1), (0, 1))), (2, 16, 16, 128), False),
        (layers.Conv(128, (3, 3), strides=2, padding=((1, 1), (1, 1))), (2, 17, 17, 128), False),  # no whole pairs
        (layers.Conv(128, (5, 5)), (2, 16, 16, 128), False),
        (layers.Conv(128, (3, 3), feature_group_count=128), (2, 64, 64, 128), False),
        (layers.Conv(4, (3, 3)), (1, 64, 64, 320), False),
    ]
    for layer, shape, used in cases:
        (x,) = random_arrays(shape)
        params = layer.init(jax.random.key(0), x[:, :1] if len(shape) == 3 else x)
        text = str(jax.make_jaxpr(layer.apply)(params, x))
        assert ("instdiff_product" in text) == used, (layer, shape)
        ours = layer.apply(params, x)
        with monkeypatch.context() as without:
            without.setattr(cpu, "is_used", lambda: False)
            np.testing.assert_allclose(ours, layer.apply(params, x), atol=3e-5)
    wide = jnp.zeros((512, 512))
    assert product_cpu.supports(512, wide, F32)
    assert not product_cpu.supports(512, wide.astype(jnp.bfloat16), jnp.dtype("bfloat16"))
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert not product_cpu.supports(512, wide, F32)


def test_used_on_intel_with_avx512_alone(monkeypatch):
    for text, expected in (
        ("vendor_id : GenuineIntel\nflags : fpu avx512f avx512dq\n", True),
        ("vendor_id : GenuineIntel\nflags : fpu avx2 sse\n", False),
        ("vendor_id : AuthenticAMD\nflags : fpu avx512f avx512dq\n", False),
    ):
        monkeypatch.setattr("pathlib.Path.read_text", lambda path, text=text: text)
        assert product_cpu.is_faster.__wrapped__() == expected


def test_flops_are_counted():
    x, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 100, 64), (64, 48)))
    assert count_flops(product_cpu.product, x, weights) == 2 * 200 * 64 * 48
    x, weights = (jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 8, 8, 64), (3, 3, 64, 48)))
    assert count_flops(lambda x, w: product_cpu.convolution(x, w, 2), x, weights) == 2 * 2 * 16 * 9 * 64 * 48
