"""The TPU's flash attention, interpreted on a CPU, against the plain kernel: outputs and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdiff_jax.models.attention import choose_kernel
from instdiff_jax.models.kernels import chunked, cpu, flash_tpu, plain
from instdiff_jax.models.regions import EVERYWHERE

# Several blocks and chunks at small sizes.
BLOCKS = flash_tpu.Blocks(128, 128, 128)


def random_case(n: int, m: int, d: int, bits: str | None = None):
    """q, k, v and a gradient for two rows and two heads, and region bits or nothing."""
    rng = np.random.default_rng(n + m + d)
    arrays = [jnp.asarray(rng.normal(size=(2, length, 2, d)), jnp.float32) for length in (n, m, m, n)]
    if bits is None:
        return arrays, (None, None)
    key_bits = rng.integers(0, 16, (2, m)).astype(np.uint32) & rng.integers(0, 16, (2, m)).astype(np.uint32)
    key_bits[:, : n // 3] = 0  # background: seen by nothing but itself
    key_bits[0, n:] = EVERYWHERE
    if bits == "itself":
        key_bits[:] = 0
    return arrays, (jnp.asarray(key_bits[:, :n]), jnp.asarray(key_bits))


def results(kernel, arrays, bits, **options):
    """The output and the gradients of q, k and v."""
    q, k, v, gradient = arrays

    def run(q, k, v):
        out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, *bits), q, k, v)
        return out, *pull(gradient)

    return jax.jit(run, compiler_options=options)(q, k, v)


def flash(q, k, v, query_bits, key_bits):
    return flash_tpu.attention(q, k, v, query_bits, key_bits, BLOCKS)


@pytest.mark.parametrize(
    ("n", "m", "d", "bits", "scale"),
    [
        (300, 341, 40, "regions", 1),  # odd lengths
        (200, 77, 80, None, 1),  # text
        (130, 150, 160, "regions", 4),  # logits in the hundreds
        (64, 64, 8, "itself", 1),
        (3, 5, 16, None, 1),
    ],
)
def test_equals_plain(n, m, d, bits, scale):
    (q, k, v, gradient), bits = random_case(n, m, d, bits)
    arrays = (scale * q, scale * k, v, gradient)
    names = ("out", "dq", "dk", "dv")
    for name, ours, expected in zip(names, results(flash, arrays, bits), results(plain.attention, arrays, bits)):
        assert bool(jnp.isfinite(ours).all()), name
        largest = float(jnp.abs(expected).max()) or 1.0  # what sees only itself has no gradient of q and k
        np.testing.assert_allclose(ours, expected, atol=2e-6 * scale**2 * largest, err_msg=name)


def test_bfloat16_is_as_close_as_chunked():
    arrays, bits = random_case(256, 300, 40, "regions")
    low = [x.astype(jnp.bfloat16) for x in arrays]
    exact = results(plain.attention, [x.astype(jnp.float32) for x in low], bits)
    # Else XLA leaves out roundings to bfloat16 that a TPU does.
    chunks = results(chunked.attention, low, bits, xla_allow_excess_precision=False)
    for ours, theirs, expected in zip(results(flash, low, bits), chunks, exact):
        distance = [float(jnp.linalg.norm(x.astype(jnp.float32) - expected)) for x in (ours, theirs)]
        assert distance[0] <= 1.1 * distance[1]


def test_skips_chunks_that_no_query_sees():
    """NaN in them reaches nothing."""
    (q, k, v, gradient), _ = random_case(128, 384, 16)
    k, v = (x.at[:, 128:256].set(jnp.nan) for x in (k, v))
    key_bits = jnp.full((2, 384), EVERYWHERE).at[:, 128:256].set(2)
    bits = jnp.full((2, 128), 1, jnp.uint32), key_bits
    out, dq, dk, dv = results(flash, (q, k, v, gradient), bits)
    without = [jnp.delete(x, np.s_[128:256], axis=1) for x in (k, v)]
    expected = results(plain.attention, (q, *without, gradient), (bits[0], jnp.delete(bits[1], np.s_[128:256], axis=1)))
    np.testing.assert_allclose(out, expected[0], atol=2e-6)
    np.testing.assert_allclose(dq, expected[1], atol=2e-6)
    assert not dk[:, 128:256].any() and not dv[:, 128:256].any()


def test_chosen_on_tpus_alone(monkeypatch):
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    shapes = (8, 4096, 8, 40), (8, 4280, 8, 40)
    assert choose_kernel("tpu", *shapes, jnp.bfloat16, True) is flash_tpu.attention
    assert choose_kernel("cpu", *shapes, jnp.bfloat16, True) is chunked.attention
    # Heads that are no whole sublanes, and keys that do not fit VMEM.
    assert choose_kernel("tpu", (8, 64, 8, 4), (8, 64, 8, 4), jnp.bfloat16, False) is chunked.attention
    assert choose_kernel("tpu", (1, 65536, 8, 40), (1, 65536, 8, 40), jnp.bfloat16, False) is chunked.attention
