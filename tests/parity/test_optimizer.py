"""AdamW, the learning rate and the average against PyTorch's and transformers'."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from common import relative_error
from instdiff_jax.errors import InputError
from instdiff_jax.training.muon import is_matrix, orthogonal
from instdiff_jax.training.optimizer import apply_gradients, global_norm, init_optimizer, learning_rate
from instdiff_jax.training.settings import TRAINABLE, OptimizerSettings, TrainSettings

STEPS = 12


def gradients(step):
    rng = np.random.default_rng(step)
    return {"kernel": rng.standard_normal((5, 7), np.float32), "bias": rng.standard_normal(7).astype(np.float32)}


def run(settings, taken=lambda step: True, steps=STEPS):
    """Parameters, optimizer state and rates after some steps."""
    params = jax.tree.map(jnp.asarray, gradients(100))
    state, rates = init_optimizer(params), []
    update = jax.jit(apply_gradients, static_argnums=3)
    for step in range(steps):
        grads = jax.tree.map(jnp.asarray, gradients(step))
        rates.append(float(learning_rate(state.updates, settings, STEPS)))
        rate = learning_rate(state.updates, settings, STEPS)
        params, state = update(params, grads, state, settings, rate, global_norm(grads), jnp.bool_(taken(step)))
    return params, state, rates


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(weight_decay=0.1),
        dict(beta1=0.0),
        dict(clip_norm=0.5),
        dict(schedule="cosine", weight_decay=0.01, beta2=0.95, warmup_steps=3),
    ],
    ids=str,
)
def test_updates_are_pytorchs(changes):
    settings = dataclasses.replace(OptimizerSettings(learning_rate=0.01, warmup_steps=4, ema_decay=0.9), **changes)
    tensors = {name: torch.nn.Parameter(torch.from_numpy(value)) for name, value in gradients(100).items()}
    betas = (settings.beta1, settings.beta2)
    optimizer = torch.optim.AdamW(tensors.values(), settings.learning_rate, betas, settings.eps, settings.weight_decay)
    if settings.schedule == "cosine":
        schedule = get_cosine_schedule_with_warmup(optimizer, settings.warmup_steps, STEPS)
    else:
        schedule = get_constant_schedule_with_warmup(optimizer, settings.warmup_steps)
    rates, averages = [], {name: value.astype(np.float64) for name, value in gradients(100).items()}
    for step in range(STEPS):
        for name, grad in gradients(step).items():
            tensors[name].grad = torch.from_numpy(grad)
        if settings.clip_norm:
            torch.nn.utils.clip_grad_norm_(list(tensors.values()), settings.clip_norm)
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        for name, tensor in tensors.items():
            averages[name] += (1 - settings.ema_decay) * (tensor.detach().numpy() - averages[name])
    params, state, ours = run(settings)
    np.testing.assert_allclose(ours, rates, rtol=1e-6, atol=1e-10)
    assert ours[0] == 0
    for name, tensor in tensors.items():
        assert relative_error(params[name], tensor.detach().numpy()) < 1e-6
        assert relative_error(state.ema[name], averages[name]) < 1e-6


@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (3, 3, 8, 24), (1, 1, 40, 8), (96, 12)])
def test_orthogonal_is_optaxs_muon(shape):
    update = jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))
    matrix = {"w": update.reshape(-1, shape[-1])}
    muon = optax.contrib.muon(1.0, beta=0.0, nesterov=False, weight_decay=0.0, consistent_rms=0.2)
    (theirs,) = jax.tree.leaves(muon.update(matrix, muon.init(matrix), matrix)[0])
    ours = np.asarray(orthogonal([update])[0]).reshape(theirs.shape)
    assert relative_error(ours, -np.asarray(theirs)) < 1e-4
    singular = np.linalg.svd(ours / (0.2 * math.sqrt(max(ours.shape))))[1]
    assert 0.5 < singular.min() and singular.max() < 1.25


def test_matrices_of_one_shape_are_one_batch():
    """Turned ones too; each is what it is alone."""
    rng = np.random.default_rng(1)
    shapes = [(12, 5), (5, 12), (3, 4, 5), (7, 7), (12, 5)]
    updates = [jnp.asarray(rng.standard_normal(shape, np.float32)) for shape in shapes]
    found = jax.jit(orthogonal)(updates)
    for one, update in zip(found, updates, strict=True):
        assert one.shape == update.shape
        assert relative_error(one, orthogonal([update])[0]) < 1e-5
    # 19 products for each of two shapes: nothing is computed matrix by matrix, or twice.
    jaxpr = str(jax.make_jaxpr(orthogonal)(updates))
    assert jaxpr.count("dot_general[") == 2 * 19


def test_small_singular_values_survive_the_products_of_a_tpu():
    """A product whose precision is left to the device rounds to bfloat16 there."""
    with jax.default_matmul_precision("default"):  # not as in the other tests
        equations = jax.make_jaxpr(orthogonal)([jnp.ones((6, 4))]).eqns
    while not (products := [one for one in equations if one.primitive.name == "dot_general"]):
        equations = [
            inner for one in equations for value in one.params.values() for inner in getattr(value, "eqns", [])
        ]
    highest = (jax.lax.Precision.HIGHEST,) * 2
    assert all(one.params["precision"] == highest for one in products)


def test_muon_moves_matrices_and_adamw_the_rest():
    settings = OptimizerSettings(name="muon", learning_rate=0.01, warmup_steps=0, weight_decay=0.1, momentum=0.9)
    params, state, rates = run(settings)
    plain, of_adamw, _ = run(dataclasses.replace(settings, name="adamw"))
    np.testing.assert_array_equal(params["bias"], plain["bias"])
    kernel, momentum = gradients(100)["kernel"].astype(np.float64), np.zeros((5, 7))
    for step, rate in enumerate(rates):
        gradient = gradients(step)["kernel"]
        momentum = 0.9 * momentum + 0.1 * gradient
        ahead = jnp.asarray(0.9 * momentum + 0.1 * gradient, jnp.float32)
        kernel -= rate * (np.asarray(orthogonal([ahead])[0]) + 0.1 * kernel)
    assert relative_error(params["kernel"], kernel) < 1e-5
    assert not state.nu["kernel"].any() and of_adamw.nu["kernel"].any()


def test_muon_leaves_depthwise_kernels_to_adamw():
    shapes = {"dense": (8, 4), "conv": (3, 3, 8, 4), "depthwise": (7, 7, 1, 4), "from_one": (1, 4)}
    leaves = {name: {"kernel": np.zeros(shape)} for name, shape in shapes.items()}
    leaves["table"] = {"embedding": np.zeros((8, 4))}
    found = jax.tree_util.tree_map_with_path(is_matrix, leaves)
    assert {name for name, leaf in found.items() if any(leaf.values())} == {"dense", "conv"}


def test_a_skipped_update_changes_nothing_and_does_not_count():
    settings = OptimizerSettings(learning_rate=0.01, warmup_steps=4, ema_decay=0.9)
    params, state, rates = run(settings, taken=lambda step: step < 5)
    assert int(state.updates) == 5
    assert rates[5:] == [rates[5]] * (STEPS - 5)
    again, kept, _ = run(settings, steps=5)
    for ours, theirs in zip(jax.tree.leaves((params, state)), jax.tree.leaves((again, kept)), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_the_average_follows_slow_changes():
    # At the paper's decay an average in float32 takes steps near its own rounding.
    settings = OptimizerSettings(learning_rate=1e-4, warmup_steps=1, ema_decay=0.9999)
    params = {"w": jnp.full((1000,), 1.0)}
    state, exact = init_optimizer(params), 1.0
    update = jax.jit(apply_gradients, static_argnums=3)
    for _ in range(300):
        rate = learning_rate(state.updates, settings, 300)
        params, state = update(params, {"w": jnp.ones(1000)}, state, settings, rate, jnp.float32(1), jnp.bool_(True))
        exact += 1e-4 * (float(params["w"][0]) - exact)
    assert relative_error(state.ema["w"], np.full(1000, exact)) < 1e-4


def test_settings_say_what_they_expect():
    base = dict(steps=10, batch_size=2)
    assert TrainSettings.from_dict(base | dict(trainable="all")).trainable == TRAINABLE["all"]
    bad = {
        "some": dict(trainable="some"),
        "pairs": dict(trainable=(("unet/.*", "maybe"),)),
        "nothing reads": dict(lerning_rate=1.0),
        "at least 1": dict(batch_size=0),
        "warmup_steps": dict(optimizer=dict(schedule="cosine", warmup_steps=10)),
        "ema_decay": dict(optimizer=dict(ema_decay=1.0)),
    }
    for words, change in bad.items():
        with pytest.raises(InputError, match=words):
            TrainSettings.from_dict(base | change)


@pytest.mark.parametrize(
    ("name", "value"),
    [("beta1", 1.0), ("beta2", -0.1), ("learning_rate", -1e-3), ("eps", math.nan), ("weight_decay", math.inf)],
)
def test_settings_out_of_range(name, value):
    with pytest.raises(InputError, match=f"config.train.optimizer.{name}: expected"):
        TrainSettings.from_dict(dict(steps=10, batch_size=1, optimizer={name: value, "warmup_steps": 1}))
