"""Products of 8-bit integers; instdiff_jax/models/int8.py."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import tiny_config
from training_common import numpy_params

import common
from instdiff_jax import Pipeline
from instdiff_jax.errors import InputError
from instdiff_jax.models import int8
from instdiff_jax.models.unet import UNet
from instdiff_jax.sampling.programs import NoisePredictor


def operands(tokens: int, width: int, features: int):
    rng = np.random.default_rng(tokens)
    x, weights = rng.standard_normal((2, tokens, width), np.float32), rng.standard_normal((width, features), np.float32)
    x[0, 0] = 0  # a token of zeros
    return jnp.asarray(x), jnp.asarray(weights)


def test_a_product_is_that_of_rounded_numbers():
    """By its definition in float64; each rounding is at most half a step of 1/127 of the largest."""
    x, weights = operands(9, 300, 7)
    exact = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    scales = [
        np.maximum(np.abs(a).max(axis, keepdims=True), 1e-30) / 127 for a, axis in zip(exact, (-1, 0), strict=True)
    ]
    rounded = [np.round(a / scale) for a, scale in zip(exact, scales, strict=True)]
    expected = rounded[0] @ rounded[1] * scales[0] * scales[1]
    found = int8.product(x, weights)
    assert common.relative_error(found, expected) < 2e-6
    assert 1e-3 < common.relative_error(found, exact[0] @ exact[1]) < 0.02
    assert not np.asarray(found[0, 0]).any()


@pytest.mark.parametrize("width", [40, 5120])
def test_a_cpus_sums_are_those_of_integers(monkeypatch, width):
    """Integers are exact; float32 is too below 2²⁴."""
    x, weights = operands(6, width, 5)
    here = int8.product(x, weights)
    monkeypatch.setattr(int8, "platform", lambda: "gpu")
    assert "preferred_element_type=int32" in str(jax.make_jaxpr(int8.product)(x, weights))
    there = int8.product(x, weights)
    assert common.relative_error(here, there) <= (0 if width == 40 else 1e-6)


@pytest.fixture(scope="module")
def evaluation():
    """A tiny UNet with its inputs."""
    config, rng = tiny_config(), np.random.default_rng(0)
    unet, width = UNet(config.unet), config.unet.context_dim
    context, tokens = (jnp.asarray(rng.standard_normal((2, n, width)), jnp.float32) for n in (77, 184))
    latents, times = jnp.asarray(rng.standard_normal((2, 16, 16, 4)), jnp.float32), jnp.full(2, 500)

    def run(unet, context, tokens):
        return unet(latents, times, unet.condition(context, tokens), 1.0)

    shapes = jax.eval_shape(lambda key: unet.init(key, context, tokens, method=run), jax.random.key(0))["params"]
    params = numpy_params(shapes)
    condition = jax.jit(lambda params: unet.apply({"params": params}, context, tokens, method="condition"))
    conditions = condition(params)
    return unet, (params, latents, times, conditions, 1.0)


def test_every_projection_of_the_unet_and_nothing_else(evaluation, monkeypatch):
    """As many products as the program has dense layers; off by default, there is none."""
    unet, given = evaluation
    layers, taken, product = [], [], int8.product

    def count(run, args, options, context):
        layers.append(context.module.name) if type(context.module) is nn.Dense else None
        return run(*args, **options)

    monkeypatch.setattr(int8, "product", lambda *operands: taken.append(1) or product(*operands))
    with nn.intercept_methods(count):
        jax.eval_shape(NoisePredictor(unet), *given)
    assert len(layers) > 30 and not taken
    jax.eval_shape(NoisePredictor(unet, int8=True), *given)
    assert len(taken) == len(layers)
    assert NoisePredictor(unet) != NoisePredictor(unet, True) == NoisePredictor(unet, True)


@pytest.mark.slow
def test_the_unet_stays_close(evaluation, quick_compilation):
    unet, given = evaluation
    exact, whole = (jax.jit(NoisePredictor(unet, on))(*given) for on in (False, True))
    assert 0 < common.relative_error(whole, exact) < 0.05


def test_a_pipeline_by_name(tiny_checkpoint):
    for dtype in ("int8", "bfloat16"):
        predict = Pipeline.from_checkpoint(tiny_checkpoint, dtype=dtype).predict_noise
        assert predict.int8 == (dtype == "int8") and predict.unet.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="expected one of float32, bfloat16, float16, int8"):
        Pipeline.from_checkpoint(tiny_checkpoint, dtype="int4")
