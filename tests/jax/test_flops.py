"""The FLOP counter on shapes whose count is known, and what sampling costs by it."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.lax import conv_general_dilated

import common
from instdiff_jax.analysis.flops import count_flops, count_flops_by_module
from instdiff_jax.config import SamplingConfig
from instdiff_jax.diffusion.plan import make_plan
from instdiff_jax.diffusion.rows import bucket_size
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.grounding import null_grounding
from instdiff_jax.models.kernels import flash_tpu
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.sampling.request import sampler_settings

GIGA = 10**9


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def matmul(x, y):
    return jnp.tanh(x @ y)


def test_products_count_two_a_multiply_add():
    assert count_flops(matmul, shape(3, 5), shape(5, 7)) == 2 * 3 * 5 * 7
    batched = functools.partial(jnp.einsum, "bhnd,bhmd->bhnm")
    assert count_flops(batched, shape(2, 3, 5, 7), shape(2, 3, 11, 7)) == 2 * (2 * 3) * 5 * 11 * 7
    assert count_flops(lambda x: x + 1, shape(100)) == 0


def test_flops_belong_to_modules_in_loops_and_gradients():
    class Block(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(7, name="up")(x)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.remat(Block)(name="block")(x).sum()

    net, x = Net(), jnp.ones((3, 5))
    params = net.init(jax.random.key(0), x)

    def steps(params):
        return jax.lax.scan(lambda c, _: (jax.grad(lambda p: net.apply(p, x))(c), None), params, length=4)

    # In each step the product, and that of its kernel's gradient.
    assert count_flops_by_module(steps, params) == {"Net/block/up": 4 * 2 * 2 * 3 * 5 * 7}


@pytest.mark.parametrize("groups", [1, 4])
def test_convolutions(groups):
    def conv(x, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        return conv_general_dilated(x, kernel, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=groups)

    flops = count_flops(conv, shape(2, 16, 12, 8), shape(3, 3, 8 // groups, 20))
    assert flops == 2 * (2 * 8 * 6 * 20) * (9 * 8 // groups)


def test_nested_programs_count():
    once = 2 * 4 * 4 * 4
    x = shape(4, 4)
    assert count_flops(lambda x: jax.jit(matmul)(x, x), x) == once
    assert count_flops(lambda x: jax.checkpoint(lambda y: jax.jit(matmul)(y, y))(x), x) == once
    assert count_flops(jax.vmap(lambda x: matmul(x, x)), shape(5, 4, 4)) == 5 * once

    @jax.custom_jvp
    def custom(x):
        return matmul(x, x)

    custom.defjvp(lambda primals, tangents: (custom(*primals), tangents[0]))
    assert count_flops(custom, x) == once


def test_loops():
    once = 2 * 4 * 4 * 4
    x = shape(4, 4)
    assert count_flops(lambda x: jax.lax.scan(lambda c, _: (matmul(c, x), None), x, None, length=7)[0], x) == 7 * once
    assert count_flops(lambda x: jax.lax.map(lambda row: matmul(row[None], x), x), x) == once

    def loop(x, stop):
        return jax.lax.fori_loop(0, stop, lambda _, y: matmul(y, x), x)

    assert count_flops(loop, x, jnp.int32(9)) == once, "a loop with traced bounds counts once"
    branches = (lambda x: x, lambda x: matmul(x, x), lambda x: matmul(matmul(x, x), x))
    assert count_flops(lambda i, x: jax.lax.switch(i, branches, x), jnp.int32(0), x) == 2 * once


def test_gradients_cost_two_products_more():
    def loss(kernel, x):
        return jnp.tanh(x @ kernel).sum()

    assert count_flops(jax.grad(loss, (0, 1)), shape(5, 7), shape(3, 5)) == 3 * 2 * 3 * 5 * 7


# ---------------------------------------------------------------- what sampling costs


def grounding_shapes(batch: int, side: int) -> dict:
    return {name: shape(*x.shape, dtype=x.dtype) for name, x in null_grounding(side, 768, (batch,)).items()}


@functools.cache
def costs() -> dict[str, int]:
    """FLOPs of one call of the full-size networks on one row at 512×512."""
    rows = 1
    config = common.model_config("full")
    unifusion, unet = UniFusion(config.unifusion), UNet(config.unet)
    inputs = shape(rows, 64, 64, 4), shape(rows, dtype=jnp.int32), shape(rows, 77, 768), shape(rows, 184, 768)

    def init(key, x, t, context, tokens):
        return unet.init_with_output(
            key, x, t, context, tokens, method=lambda m, x, t, c, g: m(x, t, m.condition(c, g), 1.0)
        )[1]

    variables = jax.eval_shape(init, jax.random.key(0), *inputs)
    condition = functools.partial(unet.apply, method="condition")
    conditions = jax.eval_shape(condition, variables, *inputs[2:])
    grounding = grounding_shapes(rows, config.unifusion.map_size)
    fusion = jax.eval_shape(unifusion.init, jax.random.key(0), grounding)

    def denoise(alpha):
        return count_flops(lambda v, x, t, c: unet.apply(v, x, t, c, alpha), variables, *inputs[:2], conditions)

    given = variables, *inputs[:2], conditions, 1.0
    deep = jax.eval_shape(functools.partial(unet.apply, method="deep_features"), *given)
    return dict(
        fused=denoise(1.0),
        unfused=denoise(None),
        finish=count_flops(functools.partial(unet.apply, method="finish"), *given, deep),
        condition=count_flops(condition, variables, *inputs[2:]),
        unifusion=count_flops(unifusion.apply, fusion, grounding),
    )


def test_flops_of_one_forward():
    """One forward of the released model, nothing shared, costs 1,227 GFLOP in the official code; ours queries
    visual tokens only in the fusers, and so saves their attention's share of grounding tokens."""
    one = costs()
    assert 0.98 * 1227 < (one["fused"] + one["condition"] + one["unifusion"]) / GIGA <= 1227
    assert one["unifusion"] / GIGA == pytest.approx(56, rel=0.02)


def test_an_evaluation_that_reuses_deep_features():
    """docs/sampling.md has these shares."""
    share = costs()["finish"] / costs()["fused"]
    assert share == pytest.approx(0.087, abs=5e-4)
    assert (1 + share) / 2 == pytest.approx(0.54, abs=5e-3) and (1 + 2 * share) / 3 == pytest.approx(0.39, abs=5e-3)


def sampling_flops(counts: tuple[int, ...]) -> int:
    """FLOPs of sampling these layouts with the README's settings: conditions once, then the three pieces."""
    settings = SamplingConfig(alpha=(0.8, 0.0, 0.2))
    table = solver_table("plms", settings.steps, common.model_config("full").schedule, settings.alpha)
    rows = {True: sum(1 + n for n in counts), False: len(counts)}
    total = (rows[True] + 1) * (costs()["condition"] + costs()["unifusion"])
    for piece in make_plan(table, sampler_settings(settings, table)).pieces:
        padded = bucket_size(rows[piece.rows == "all"])
        total += (piece.stop - piece.start) * 2 * padded * costs()["fused" if piece.use_fusers else "unfused"]
    return total


def test_one_layout_costs_less_than_the_official_sampler():
    """50 steps, MIS 0.36, four instances: the official sampler takes 254 forwards of 1.227 TFLOP."""
    share = sampling_flops((4,)) / 312e12
    print(f"{share:.3f} of the official FLOPs")
    assert share <= 0.92


@pytest.mark.parametrize("counts", [(1, 4, 13), (0, 30), (2,), (5, 5, 5, 5), (1,) * 9, (30, 1, 1, 1)])
def test_a_batch_is_padded_by_a_fifth_at_most(counts):
    rows = sum(n + 1 for n in counts)
    assert rows <= bucket_size(rows) <= 1.2 * rows


def test_flash_attention_on_tpus_counts_its_products():
    """Two forward and five backward, with and without region bits; padding is not counted."""
    q, k = (jax.ShapeDtypeStruct((2, n, 3, 40), jnp.float32) for n in (100, 130))
    bits = [jax.ShapeDtypeStruct((2, n), jnp.uint32) for n in (100, 130)]
    product = 2 * 2 * 100 * 3 * 40 * 130

    def gradient(q, k, v, *bits):
        out, pull = jax.vjp(lambda *arrays: flash_tpu.attention(*arrays, *bits), q, k, v)
        return pull(out)

    assert count_flops(flash_tpu.attention, q, k, k) == count_flops(flash_tpu.attention, q, k, k, *bits) == 2 * product
    assert count_flops(gradient, q, k, k) == count_flops(gradient, q, k, k, *bits) == 7 * product
