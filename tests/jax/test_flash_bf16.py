"""Attention of bfloat16 on CPUs against the plain kernel: outputs, gradients, region bits."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.models.attention import choose_kernel
from instdiff_jax.models.kernels import chunked, cpu, flash_bf16, plain
from instdiff_jax.models.regions import visible
from tests.jax.test_cpu_kernels import WITH_BF16
from tests.jax.test_flash_cpu import random_case

BF16 = jnp.dtype("bfloat16")

CASES = [
    (300, 341, 40, "regions", 1),  # no whole blocks of queries or keys
    (200, 77, 80, None, 1),  # text
    (130, 150, 160, "regions", 8),  # logits in the hundreds
    (64, 64, 8, "itself", 1),
    (70, 20, 16, "itself", 1),  # the last queries see nothing: the mean
    (70, 20, 1, "itself", 1),  # a scale above 1
    (70, 20, 256, "itself", 1),
    (3, 5, 13, None, 1),
    (1, 1, 1, None, 1),
    (600, 700, 32, "regions", 1),  # several parts of the queries in the gradient
]


def exact(q, k, v, gradient, bits):
    """Attention and its gradients in float64."""
    q, k, v, gradient = (np.asarray(x, np.float64) for x in (q, k, v, gradient))
    mask = True if bits[0] is None else np.asarray(visible(*bits))
    logits = np.einsum("bnhd,bmhd->bhnm", q, k) / np.sqrt(q.shape[-1])
    weights = np.where(mask, logits, np.finfo(np.float32).min)
    weights = np.exp(weights - weights.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    of_weights = np.einsum("bnhd,bmhd->bhnm", gradient, v)
    of_logits = weights * (of_weights - (of_weights * weights).sum(-1, keepdims=True)) / np.sqrt(q.shape[-1])
    of_logits = np.where(mask, of_logits, 0)
    outs = [("bhnm,bmhd->bnhd", weights, v), ("bhnm,bmhd->bnhd", of_logits, k)]
    outs += [("bhnm,bnhd->bmhd", of_logits, q), ("bhnm,bnhd->bmhd", weights, gradient)]
    return [np.einsum(*out) for out in outs]


@WITH_BF16
@pytest.mark.parametrize(("n", "m", "d", "bits", "scale"), CASES)
def test_as_close_to_the_truth_as_plain(n, m, d, bits, scale):
    """Outputs and gradients: at most 1.5 times as far from float64 as the plain kernel in bfloat16, or a rounding."""
    arrays, bits = random_case(n, m, d, bits, scale)
    arrays = [jnp.asarray(x, BF16) for x in arrays]
    expected = exact(*arrays, bits)
    distances = []
    for kernel in (flash_bf16.attention, plain.attention):

        @jax.jit
        def run(q, k, v, gradient, kernel=kernel):
            out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, *bits), q, k, v)
            return out, *pull(gradient)

        found = [np.asarray(x, np.float64) for x in run(*arrays)]
        assert all(np.isfinite(x).all() for x in found)
        distances.append([np.abs(x - y).max() for x, y in zip(found, expected, strict=True)])
    for ours, theirs, truth in zip(*distances, expected, strict=True):
        assert ours <= 1.5 * theirs + 2.0**-8 * np.abs(truth).max()


@WITH_BF16
def test_large_keys_do_not_multiply_rounding():
    """A channel whose keys are all alike and large has no gradient; the plain kernel's is noise, 7 times the rest."""
    (q, k, v, gradient), _ = random_case(64, 77, 32)
    q, k, v = q / 10, k / 10, v / 10
    q[..., 0], k[..., 0] = 1, -565
    arrays = [jnp.asarray(x, BF16) for x in (q, k, v, gradient)]
    found = jax.jit(lambda q, k, v, g: jax.vjp(flash_bf16.attention, q, k, v)[1](g))(*arrays)
    for ours, truth in zip(found, exact(*arrays, (None, None))[1:], strict=True):
        assert np.abs(np.asarray(ours, np.float64) - truth).max() <= 0.02 * np.abs(truth).max()


@WITH_BF16
def test_what_is_not_finite_stays_so():
    (q, k, v, _), _ = random_case(60, 130, 16)
    q[1, 7, 0, 3] = np.nan
    v[0, 5, 1, 2] = np.inf
    q, k, v = (jnp.asarray(x, BF16) for x in (q, k, v))
    out, expected = (np.isfinite(np.asarray(f(q, k, v), np.float32)) for f in (flash_bf16.attention, plain.attention))
    assert (out == expected).all() and not expected.all()


@WITH_BF16
def test_rows_of_a_map_and_many_calls_at_once():
    (q, k, v, _), _ = random_case(150, 170, 16)
    q, k, v = (jnp.asarray(x, BF16) for x in (q, k, v))
    stacked = [jnp.stack([x, x[:, ::-1]]) for x in (q, k, v)]
    out = jax.jit(jax.vmap(flash_bf16.attention))(*stacked)
    run = jax.jit(flash_bf16.attention)
    for ours, *given in zip(out, *stacked, strict=True):
        assert (np.asarray(ours) == np.asarray(run(*given))).all()
    outs = [run(q, k, v) for _ in range(50)]
    assert all((np.asarray(other) == np.asarray(outs[0])).all() for other in outs)


@WITH_BF16
def test_chosen_for_bfloat16_on_one_device(monkeypatch):
    shapes = (2, 256, 8, 40), (2, 333, 8, 40)
    assert choose_kernel("cpu", *shapes, BF16, True) is flash_bf16.attention
    assert choose_kernel("cpu", (1, 8, 1, 8), (1, 8, 1, 8), BF16, False) is chunked.attention
    monkeypatch.setattr(jax, "device_count", lambda: 8)
    assert choose_kernel("cpu", *shapes, BF16, True) is chunked.attention
    monkeypatch.undo()
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    assert choose_kernel("cpu", *shapes, BF16, True) is chunked.attention


@WITH_BF16
def test_flops_are_counted():
    q, k = (jax.ShapeDtypeStruct((2, length, 8, 40), BF16) for length in (256, 333))
    assert count_flops(flash_bf16.attention, q, k, k) == 4 * 2 * 256 * 333 * 8 * 40

    def gradients(q, k, v):
        y, pull = jax.vjp(flash_bf16.attention, q, k, v)
        return pull(y)

    # Forward two products; the logits again, and one each of the weights' gradient, q's, k's and v's.
    assert count_flops(gradients, q, k, k) == 14 * 2 * 256 * 333 * 8 * 40
