"""The CPU's own flash attention against the plain kernel: outputs, gradients, region bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.models.attention import choose_kernel
from instdiff_jax.models.kernels import chunked, cpu, flash_cpu, plain
from instdiff_jax.models.regions import EVERYWHERE
from tests.jax.test_cpu_kernels import WITH_COMPILER


def random_case(n: int, m: int, d: int, bits: str | None = None, scale: float = 1.0):
    """q, k, v and a gradient for two rows and two heads, and region bits or nothing."""
    rng = np.random.default_rng(n + m + d)
    arrays = [rng.normal(size=(2, length, 2, d)).astype(np.float32) for length in (n, m, m, n)]
    arrays[0] *= scale
    if bits is None:
        return arrays, (None, None)
    key_bits = rng.integers(0, 16, (2, m)).astype(np.uint32)
    key_bits[:, : n // 3] = 0  # background: seen by nothing but itself
    key_bits[0, n:] = EVERYWHERE
    if bits == "itself":
        key_bits[:] = 0
    query_bits = np.zeros((2, n), np.uint32)
    query_bits[:, : min(n, m)] = key_bits[:, :n]
    return arrays, (query_bits, key_bits)


def exact(q, k, v, query_bits, key_bits):
    """`plain.attention` in float64."""
    with jax.enable_x64(True):
        return np.asarray(plain.attention(*(jnp.asarray(x, jnp.float64) for x in (q, k, v)), query_bits, key_bits))


@WITH_COMPILER
@pytest.mark.parametrize(
    ("n", "m", "d", "bits", "scale"),
    [
        (300, 341, 40, "regions", 1),  # no whole tiles of queries or keys
        (200, 77, 80, None, 1),  # text
        (130, 150, 160, "regions", 8),  # logits in the hundreds
        (64, 64, 8, "itself", 1),
        (70, 20, 16, "itself", 1),  # the last queries see nothing: the mean
        (3, 5, 13, None, 1),  # a width that fills no registers
        (1, 1, 1, None, 1),
    ],
)
def test_equals_plain_to_rounding(n, m, d, bits, scale):
    """At most three times as far from float64 as the plain kernel, which adds up in blocks."""
    arrays, bits = random_case(n, m, d, bits, scale)
    ours = np.asarray(jax.jit(flash_cpu.attention)(*arrays[:3], *bits))
    theirs = np.asarray(jax.jit(plain.attention)(*arrays[:3], *bits))
    expected = exact(*arrays[:3], *bits)
    distance = [np.abs(x - expected).max() for x in (ours, theirs)]
    assert distance[0] <= 3 * distance[1] + 3e-7 * np.abs(expected).max()


@WITH_COMPILER
def test_gradients_equal_plain():
    (q, k, v, gradient), bits = random_case(100, 130, 24, "regions")
    for bits in ((None, None), bits):
        ours, theirs = (jax.vjp(lambda q, k, v: f(q, k, v, *bits), q, k, v)[1](gradient)
                        for f in (flash_cpu.attention, plain.attention))  # fmt: skip
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, atol=3e-6 * float(jnp.abs(b).max()))


@WITH_COMPILER
def test_what_is_not_finite_stays_so():
    (q, k, v, _), _ = random_case(60, 130, 16)
    q[1, 7, 0, 3] = np.nan
    v[0, 5, 1, 2] = np.inf
    out = np.isfinite(flash_cpu.attention(q, k, v))
    expected = np.isfinite(plain.attention(q, k, v))
    assert (out == expected).all() and not expected.all()


@WITH_COMPILER
def test_rows_of_a_map_and_many_calls_at_once():
    """vmap runs row by row; calls from several threads share the pool without waiting for each other for ever."""
    (q, k, v, _), _ = random_case(150, 170, 16)
    stacked = [np.stack([x, x[:, ::-1]]) for x in (q, k, v)]
    out = jax.jit(jax.vmap(flash_cpu.attention))(*stacked)
    run = jax.jit(flash_cpu.attention)
    for ours, *given in zip(out, *stacked, strict=True):
        assert (np.asarray(ours) == np.asarray(run(*given))).all()
    outs = [run(q, k, v) for _ in range(50)]
    assert all((np.asarray(other) == np.asarray(outs[0])).all() for other in outs)


@WITH_COMPILER
def test_chosen_for_float32_on_one_device(monkeypatch):
    shapes = (2, 256, 8, 40), (2, 333, 8, 40)
    assert choose_kernel("cpu", *shapes, jnp.dtype("float32"), True) is flash_cpu.attention
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    assert choose_kernel("cpu", *shapes, jnp.dtype("bfloat16"), True) is chunked.attention
    assert choose_kernel("cpu", (1, 8, 1, 8), (1, 8, 1, 8), jnp.dtype("float32"), False) is chunked.attention
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert choose_kernel("cpu", *shapes, jnp.dtype("float32"), True) is chunked.attention


def test_flops_are_counted():
    q, k = (jax.ShapeDtypeStruct((2, length, 8, 40), jnp.float32) for length in (256, 333))
    assert count_flops(flash_cpu.attention, q, k, k) == 4 * 2 * 256 * 333 * 8 * 40
