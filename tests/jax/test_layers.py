"""Layers whose form depends on the platform, against the plain form."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.ad_checkpoint import print_saved_residuals

import common
from instdiff_jax.models import layers
from instdiff_jax.models.blocks import ResBlock
from instdiff_jax.models.kernels import flash_tpu
from instdiff_jax.models.unet import KEEP


@pytest.mark.parametrize("norm", [layers.GroupNorm(), layers.LayerNorm()])
@pytest.mark.parametrize("mean", [0.0, 5.0])
def test_statistics_in_one_pass_equal_those_in_two(monkeypatch, norm, mean):
    x = mean + jnp.asarray(np.random.default_rng(0).normal(size=(2, 8, 8, 64)), jnp.float32)
    params = norm.init(jax.random.key(0), x)
    run = jax.value_and_grad(lambda x: (norm.apply(params, x) ** 3).sum())
    expected, two = norm.apply(params, x), run(x)
    monkeypatch.setattr(layers, "platform", lambda: "tpu")
    # The rounding error of one pass: (mean² / variance + 1) · 2⁻²⁴, a few times.
    bound = 4 * (mean**2 + 1) * 2**-24
    np.testing.assert_allclose(norm.apply(params, x), expected, atol=4 * bound)
    np.testing.assert_allclose(run(x)[1], two[1], atol=100 * bound)
    # All equal, and large: a variance that rounding could make negative.
    assert jnp.isfinite(norm.apply(params, jnp.full_like(x, 1000.1))).all()


def test_gelu_is_exact_and_keeps_its_tail_in_bfloat16():
    x = jnp.linspace(-6, 6, 1001)
    # erf near −1 is rounded to 2⁻²⁴, once in it and once in the sum; times |x| / 2.
    np.testing.assert_allclose(layers.gelu(x), nn.gelu(x, approximate=False), rtol=1e-6, atol=1e-6)
    low = x.astype(jnp.bfloat16)
    exact = nn.gelu(low.astype(jnp.float32), approximate=False)
    np.testing.assert_allclose(layers.gelu(low).astype(jnp.float32), exact, rtol=2**-8, atol=1e-6)


def test_recomputation_keeps_convolutions_and_attention(capsys):
    """Of a res block's convolutions only the first is needed again, and it is kept; so is flash attention's output."""
    block, x, time = ResBlock(32, jnp.float32), jnp.ones((1, 8, 8, 32)), jnp.ones((1, 8))
    params = block.init(jax.random.key(0), x, time)

    def kept_arrays(function, x):
        print_saved_residuals(jax.checkpoint(function, policy=KEEP), x)
        return [line.split()[0] for line in capsys.readouterr().out.splitlines() if "named 'kept'" in line]

    assert kept_arrays(lambda x: block.apply(params, x, time).sum(), x) == ["f32[1,8,8,32]"]
    q = jnp.ones((1, 16, 1, 8))
    assert kept_arrays(lambda q: jnp.sin(flash_tpu.attention(jnp.sin(q), q, q)).sum(), q) == [
        "f32[1,1,8,16]",
        "f32[1,1,1,16]",
    ]


@pytest.mark.parametrize("shape", [(2, 12, 32), (3, 8, 32), (1, 10, 32)])
def test_a_feed_forward_in_parts_is_the_same(monkeypatch, shape):
    """Values and gradients; ten tokens are no whole number of parts of eight."""
    layer, rng = layers.GEGLU(32, jnp.float32), np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal(shape), jnp.float32)
    variables = layer.init(jax.random.key(0), x)

    def total(variables, x):
        return jnp.square(layer.apply(variables, x)).sum()

    whole = jax.value_and_grad(total, argnums=(0, 1))(variables, x)
    monkeypatch.setattr(layers, "_TOKENS", 8)
    monkeypatch.setattr(layers, "_LARGE", 1)
    assert jax.tree.structure(layer.init(jax.random.key(0), x)) == jax.tree.structure(variables)
    assert ("scan" in str(jax.make_jaxpr(total)(variables, x))) == (shape != (1, 10, 32))
    parts = jax.value_and_grad(total, argnums=(0, 1))(variables, x)
    for a, b in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert common.relative_error(a, b) < 2e-6
