"""Products of 8-bit numbers; instdiff_jax/models/eight_bits.py."""

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
from instdiff_jax.models import eight_bits
from instdiff_jax.models.unet import UNet
from instdiff_jax.sampling.programs import NoisePredictor


def operands(tokens: int, width: int, features: int):
    rng = np.random.default_rng(tokens)
    x, weights = rng.standard_normal((2, tokens, width), np.float32), rng.standard_normal((width, features), np.float32)
    x[0, 0] = 0  # a token of zeros
    return jnp.asarray(x), jnp.asarray(weights)


@pytest.mark.parametrize(("kind", "most", "step"), [("int8", 127, (1e-3, 0.02)), ("fp8", 448, (1e-3, 0.06))])
def test_a_product_is_that_of_rounded_numbers(kind, most, step):
    """By its definition in float64; how far it is from the exact product depends on the type's steps."""
    x, weights = operands(9, 300, 7)
    exact = np.asarray(x, np.float64), np.asarray(weights, np.float64)
    scales = [
        np.maximum(np.abs(a).max(axis, keepdims=True), 1e-30) / most for a, axis in zip(exact, (-1, 0), strict=True)
    ]
    rounded = [
        np.round(a / scale) if kind == "int8" else eighths(np.asarray(a, np.float32) / scale.astype(np.float32))
        for a, scale in zip(exact, scales, strict=True)
    ]
    expected = rounded[0] @ rounded[1] * scales[0] * scales[1]
    found = eight_bits.product(x, weights, kind)
    assert common.relative_error(found, expected) < 2e-6
    assert step[0] < common.relative_error(found, exact[0] @ exact[1]) < step[1]
    assert not np.asarray(found[0, 0]).any()


def eighths(x: np.ndarray) -> np.ndarray:
    """Rounded to three bits after the leading one, to even; below 2^-6 in steps of 2^-9, as float8_e4m3fn."""
    power = np.exp2(np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-30))), -6) - 3)
    return (np.round(x / power) * power).astype(np.float64)


@pytest.mark.parametrize(("kind", "sums"), [("int8", "int32"), ("fp8", "float32")])
@pytest.mark.parametrize("width", [40, 5120])
def test_a_cpus_sums_are_those_of_8_bit_numbers(monkeypatch, width, kind, sums):
    """Sums of integers are exact; in float32 they are too below 2²⁴."""
    x, weights = operands(6, width, 5)
    here = eight_bits.product(x, weights, kind)
    monkeypatch.setattr(eight_bits, "platform", lambda: "gpu")
    program = str(jax.make_jaxpr(eight_bits.product, static_argnums=2)(x, weights, kind))
    assert f"preferred_element_type={sums}" in program and ("i8[" if kind == "int8" else "f8_e4m3fn[") in program
    there = eight_bits.product(x, weights, kind)
    assert common.relative_error(here, there) <= (0 if width == 40 and kind == "int8" else 1e-6)


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_the_largest_number_stays_a_number(size):
    """float8 has no number beyond 448, and rounding of the scale must not pass it."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((4096, 3), np.float32) * np.float32(size))
    assert np.isfinite(np.asarray(eight_bits.product(x, jnp.eye(3), "fp8"))).all()


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
    layers, taken, product = [], [], eight_bits.product

    def count(run, args, options, context):
        layers.append(context.module.name) if isinstance(context.module, nn.Dense) else None
        return run(*args, **options)

    monkeypatch.setattr(eight_bits, "product", lambda *operands: taken.append(1) or product(*operands))
    with nn.intercept_methods(count):
        jax.eval_shape(NoisePredictor(unet), *given)
    assert len(layers) > 30 and not taken
    jax.eval_shape(NoisePredictor(unet, "int8"), *given)
    assert len(taken) == len(layers)
    assert NoisePredictor(unet) != NoisePredictor(unet, "int8") == NoisePredictor(unet, "int8")


@pytest.mark.slow
def test_the_unet_stays_close(evaluation, quick_compilation):
    unet, given = evaluation
    exact, *rounded = (jax.jit(NoisePredictor(unet, kind))(*given) for kind in (None, "int8", "fp8"))
    far = [common.relative_error(found, exact) for found in rounded]
    assert 0 < far[0] < 0.05 and 0 < far[1] < 0.15


def test_a_pipeline_by_name(tiny_checkpoint):
    for dtype, kind in (("int8", "int8"), ("fp8", "fp8"), ("bfloat16", None)):
        predict = Pipeline.from_checkpoint(tiny_checkpoint, dtype=dtype).predict_noise
        assert predict.eight_bits == kind and predict.unet.dtype == jnp.bfloat16
    with pytest.raises(InputError, match="expected one of float32, bfloat16, float16, int8, fp8"):
        Pipeline.from_checkpoint(tiny_checkpoint, dtype="int4")
