"""The real train step against the official code's four steps, and what it does with numbers that are not finite."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from official_data import official_batch, official_settings
from training_common import make_run, numpy_params, resized, small_model, tiny_batch, tiny_model, tiny_settings
from trees import assert_same_trees

from common import parity, relative_error, state_dict
from common import worst as largest  # of errors; NaN if any is
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.diffusion.schedule import alphas_cumprod, velocity_weights
from instdiff_jax.errors import InputError
from instdiff_jax.models.regions import EVERYWHERE, region_bits
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.start import start_params
from instdiff_jax.training.state import Networks, init_state, make_networks, split_params
from instdiff_jax.training.step import (
    autoencoder_loss,
    batch_keys,
    compile_step,
    diffusion_loss,
    make_train_step,
    make_validation_step,
)
from instdiff_jax.tree import flatten


@pytest.mark.slow
def test_four_steps_match_the_official_code():
    data, model = parity("train_small"), small_model()
    settings = official_settings(data)
    params = {}
    for part, spec in (("model", "unet"), ("autoencoder", "autoencoder"), ("text_encoder", "text_encoder")):
        params |= from_state_dict(part, state_dict(f"{spec}_small", int(data["seed"])), model)
    run = make_run(model, settings)
    trainable, frozen = split_params(params, settings)
    start = flatten(trainable)
    state, frozen = init_state(jax.tree.map(jnp.asarray, trainable)), jax.tree.map(jnp.asarray, frozen)
    step = compile_step(make_train_step(model, settings, run.plan), run.plan)
    batch = jax.tree.map(jnp.asarray, official_batch(data))

    losses, grads, average = [], {}, {path: leaf.astype(np.float64) for path, leaf in start.items()}
    for i in range(4):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
        if i == 0:
            # After one step Adam's first moment is a tenth of the gradient.
            grads = {path: np.multiply(mu, 10) for path, mu in flatten(state.optimizer.mu).items()}
        for path, leaf in flatten(state.params).items():
            average[path] += (1 - float(data["ema_rate"])) * (np.asarray(leaf, np.float64) - average[path])
    print("losses", losses, data["losses"])
    assert np.all(np.abs(losses - data["losses"]) <= 1e-4 * np.abs(data["losses"]))
    assert losses[0] == losses[1]

    table = rename_table("model", model)
    keys = list(data["grad_keys"])
    assert {table[key].path for key in keys} == set(start)
    after, ema = flatten(state.params), flatten(state.optimizer.ema)
    worst = dict(grad=0.0, moved=0.0, ema_moved=0.0, ema=0.0)
    for i, key in enumerate(keys):
        path = table[key].path
        rounding = np.sqrt(start[path].size) * 1.2e-7
        # The stored norms are PyTorch's own, whose float32 sum over millions of numbers is 2e-4 too small.
        norm = float(torch.from_numpy(np.array(table[key].to_torch(grads[path]))).norm())
        moved = np.linalg.norm(np.float64(after[path]) - start[path])
        ema_moved = np.linalg.norm(np.float64(ema[path]) - start[path])
        checks = [
            ("grad", norm, data["grad_norms"][i], 0.0),
            ("moved", moved, data["param_delta_norms"][i], rounding),
            # Both averages were rounded to float32 four times.
            ("ema_moved", ema_moved, data["ema_delta_norms"][i], 4 * rounding),
        ]
        for name, ours, theirs, slack in checks:
            # The map's null vector has no gradient here: both are exactly 0.
            difference, allowed = abs(ours - theirs), 1e-4 * theirs + slack
            worst[name] = largest((worst[name], difference / allowed if allowed else 0.0))
            assert difference <= allowed, (name, key, ours, theirs)
        worst["ema"] = largest((worst["ema"], relative_error(ema[path], average[path])))
    print("worst share of the tolerance", worst)
    assert worst["ema"] <= 1e-4


def run_steps(settings, batches, parallel=None):
    """The state after some batches on one device, and each step's metrics."""
    model = tiny_model()
    run = make_run(model, settings, **(parallel or {}))
    state, frozen = run.start()
    step = compile_step(make_train_step(model, settings, run.plan), run.plan)
    metrics = []
    for batch in batches:
        state, numbers = step(state, frozen, jax.tree.map(jnp.asarray, batch))
        metrics.append({name: float(value) for name, value in numbers.items()})
    return state, metrics


def test_a_batch_that_is_not_finite_is_skipped_and_counted():
    good, bad = [tiny_batch(step) for step in range(3)], tiny_batch(3)
    bad["latent_mean"][0, 0, 0, 0] = np.nan
    state, metrics = run_steps(tiny_settings(), [*good, bad, bad])
    before, _ = run_steps(tiny_settings(), good)
    assert [m["skipped_in_row"] for m in metrics] == [0, 0, 0, 1, 2]
    assert int(state.step) == 5 and int(state.skipped) == 2 and int(state.optimizer.updates) == 3
    assert metrics[3]["learning_rate"] == metrics[4]["learning_rate"]
    assert_same_trees((state.params, state.optimizer), (before.params, before.optimizer))
    _, metrics = run_steps(tiny_settings(), [bad, good[0]])
    assert [m["skipped_in_row"] for m in metrics] == [1, 0]


def test_accumulated_parts_give_the_same_step():
    batches = [tiny_batch(step) for step in range(3)]
    _, whole = run_steps(tiny_settings(), batches)
    _, parts = run_steps(tiny_settings(accumulate=4), batches)
    for name in ("loss", "grad_norm"):
        assert relative_error([m[name] for m in parts], [m[name] for m in whole]) < 1e-5


def test_bfloat16_and_remat_come_close():
    batches = [tiny_batch(step) for step in range(2)]
    _, exact = run_steps(tiny_settings(), batches)
    settings = tiny_settings(dtype="bfloat16", remat="blocks")
    state, rounded = run_steps(settings, batches)
    assert relative_error([m["loss"] for m in rounded], [m["loss"] for m in exact]) < 0.02
    assert {leaf.dtype for leaf in jax.tree.leaves(state.params)} == {jnp.float32.dtype}
    frozen = jax.tree.leaves(make_run(tiny_model(), settings).plan.frozen)
    assert {leaf.dtype for leaf in frozen if leaf.ndim >= 2} == {jnp.bfloat16.dtype}


@pytest.mark.slow
@pytest.mark.parametrize("remat", ["blocks", "dots"])
def test_computing_again_instead_of_keeping_changes_nothing(remat):
    batches = [tiny_batch(step) for step in range(2)]
    _, kept = run_steps(tiny_settings(), batches)
    _, again = run_steps(tiny_settings(remat=remat), batches)
    for name in ("loss", "grad_norm"):
        assert relative_error([m[name] for m in again], [m[name] for m in kept]) < 1e-5


class Echo:
    """A network that predicts a fixed function of what it is given, so that a loss can be worked out by hand."""

    def apply(self, variables, *args, method=None):
        if method == "condition":
            return None
        noisy, timesteps, *_ = args
        return 0.6 * noisy + 1e-3 * timesteps[:, None, None, None]


@pytest.mark.parametrize("limit", [1.5, 20.0])
def test_a_weights_limit_bounds_it(limit):
    schedule = tiny_model().schedule
    weights, limited = velocity_weights(schedule), velocity_weights(schedule, limit)
    np.testing.assert_array_equal(limited, np.minimum(weights, np.float32(limit)))
    assert float(weights.max()) > 200
    with pytest.raises(InputError, match="loss_weight_limit: expected 0 or a positive number"):
        tiny_settings(loss_weight_limit=-1.0).validate()


def test_masked_attention_in_training():
    """Regions that are everywhere change nothing; an instance's bits reach the pixels of its box alone."""
    model = dataclasses.replace(tiny_model(), unet=dataclasses.replace(tiny_model().unet, attention_resolutions=(1,)))
    settings = tiny_settings(masked_attention="correct", batch_size=2)
    networks, batch = make_networks(model, settings), tiny_batch(0, 2)
    batch["grounding"]["boxes"] = np.tile(np.float32([0, 0, 0.5, 0.5]), (2, 30, 1))
    bits = [region_bits({k: v[i] for k, v in batch["grounding"].items()}, 8, 8, "correct") for i in range(2)]
    regions = {"visual": np.stack([w[0] for w in bits]), "tokens": np.stack([w[1] for w in bits])}
    everywhere = jax.tree.map(lambda bits: np.full_like(bits, EVERYWHERE), regions)
    params = numpy_params(make_run(model, settings).plan.params)
    keys = jax.random.split(jax.random.key(0), 2)

    def loss(mode, **more):
        settings = tiny_settings(masked_attention=mode, batch_size=2)
        return float(jax.jit(diffusion_loss(networks, model, settings))(params, batch | more, keys))

    plain = loss("none")
    assert loss("correct", regions=everywhere) == pytest.approx(plain, rel=1e-5)
    assert loss("correct", regions=regions) != pytest.approx(plain, rel=1e-4)
    assert "regions" in batch_keys(settings) and "regions" not in batch_keys(tiny_settings())
    with pytest.raises(InputError, match="masked_attention: expected none where"):
        tiny_settings(masked_attention="correct", grounding=False).validate()


@pytest.mark.parametrize(("weight", "predicts"), [("epsilon", "epsilon"), ("velocity", "epsilon"), ("epsilon", "v")])
def test_the_loss_is_the_mean_squared_error_of_what_its_weight_names(weight, predicts):
    rng, model = np.random.default_rng(0), tiny_model()
    model = dataclasses.replace(model, schedule=dataclasses.replace(model.schedule, prediction=predicts))
    latents, noise = rng.standard_normal((2, 5, 8, 8, 4), np.float32)
    timesteps = np.array([0, 17, 400, 800, 999], np.int32)
    settings = tiny_settings(grounding=False, loss_weight=weight)
    batch = dict(latents=latents, noise=noise, timesteps=timesteps, context=np.zeros((5, 1, 64), np.float32))
    echo = Networks(Echo(), None, None, None)
    loss = diffusion_loss(echo, model, settings)({"unet": {}}, batch, jax.random.split(jax.random.key(0), 5))

    signal, sigma = (
        np.sqrt(share)[timesteps][:, None, None, None]
        for share in (alphas_cumprod(model.schedule), 1 - alphas_cumprod(model.schedule))
    )
    noisy = signal * latents + sigma * noise
    predicted = 0.6 * noisy + 1e-3 * timesteps[:, None, None, None]
    error = predicted - (noise if predicts == "epsilon" else signal * noise - sigma * latents)
    if weight == "velocity":
        clean = (noisy - sigma * predicted) / signal
        error = (signal * predicted - sigma * clean) - (signal * noise - sigma * latents)
    assert float(loss) == pytest.approx(np.mean(np.square(error)), rel=1e-5)


def test_the_released_loss_is_the_default():
    assert TrainSettings(steps=1, batch_size=1).loss_weight == "epsilon"
    with pytest.raises(InputError, match="config.train.loss_weight: expected one of epsilon, velocity"):
        TrainSettings.from_dict(dict(steps=1, batch_size=1, loss_weight="x0"))


def test_captions_alone_train_the_base_and_the_text_encoder():
    rules = ((r"(unet|text_encoder)/.*", "train"), (r"autoencoder/.*", "freeze"))
    settings = tiny_settings(grounding=False, trainable=rules)
    batch = {key: value for key, value in tiny_batch(0).items() if key in batch_keys(settings)}
    assert "grounding" not in batch
    state, metrics = run_steps(settings, [batch] * 6)
    assert not any("fuser" in path or path[0] == "unifusion" for path in flatten(state.params))
    moments = flatten(state.optimizer.mu)
    assert float(jnp.abs(moments["text_encoder", "layer_0", "mlp", "in", "kernel"]).max()) > 0
    assert all(np.isfinite(m["loss"]) for m in metrics)


def test_the_autoencoder_learns_to_reconstruct():
    rules = ((r"autoencoder/.*", "train"), (r".*", "freeze"))
    settings = tiny_settings(task="autoencoder", trainable=rules)
    batch = {"image": tiny_batch(0, pictures=True)["image"]}
    _, metrics = run_steps(settings, [batch] * 12)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]


def test_half_size_latents_should_decode_to_the_half_size_picture():
    """The loss grows by the weight times the error of what the halved latents decode to."""
    rules = ((r"autoencoder/.*", "train"), (r".*", "freeze"))
    settings = tiny_settings(task="autoencoder", trainable=rules, kl_weight=0.0)
    model, batch = tiny_model(), {"image": tiny_batch(0, 2, pictures=True)["image"]}
    networks, keys = make_networks(model, settings), jax.random.split(jax.random.key(0), 2)
    params = numpy_params(make_run(model, settings).plan.params)
    # Latents without noise are the means.
    params["autoencoder"]["quant_conv"]["kernel"][:, model.autoencoder.z_channels :] = 0
    params["autoencoder"]["quant_conv"]["bias"][model.autoencoder.z_channels :] = -30

    def loss(weight):
        weighted = dataclasses.replace(settings, equivariance=weight)
        return float(jax.jit(autoencoder_loss(networks, model, weighted))(params, batch, keys))

    run = lambda x, method: networks.autoencoder.apply({"params": params["autoencoder"]}, x, method=method)  # noqa: E731
    halve = lambda x: (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4  # noqa: E731
    pixels = batch["image"].astype(np.float32) / 127.5 - 1
    mean, _ = run(pixels, "encode")
    decoded = run(halve(mean) * model.autoencoder.scale_factor, "decode")
    error = np.mean(np.square(np.asarray(decoded) - halve(pixels)))
    assert error > 1e-3
    assert loss(0.5) - loss(0.0) == pytest.approx(0.5 * error, rel=1e-3)


def test_gates_begin_where_the_settings_say():
    settings = tiny_settings(gates=0.5)
    leaves = flatten(start_params(make_run(tiny_model(), settings).plan, tiny_model(), settings)[0])
    gates = [float(leaf) for path, leaf in leaves.items() if path[-1].startswith("gate_")]
    assert gates and set(gates) == {0.5}
    with pytest.raises(InputError, match="config.train.gates: expected a finite number"):
        tiny_settings(gates=float("nan")).validate()
    with pytest.raises(InputError, match="config.train.equivariance: expected 0 or a positive number"):
        tiny_settings(equivariance=-1.0).validate()


def test_the_text_encoder_learns_to_hold_the_words():
    rules = ((r"text_encoder/.*", "train"), (r".*", "freeze"))
    settings = tiny_settings(task="text", grounding=False, trainable=rules)
    ids = tiny_batch(0)["caption_ids"]
    _, metrics = run_steps(settings, [{"caption_ids": ids}] * 40)
    assert metrics[-1]["loss"] < 0.8 * metrics[0]["loss"]
    # No loss can be below a uniform one over a caption's words; the end token is none of them.
    end = ids.argmax(axis=1)
    words = [set(row[1:last].tolist()) for row, last in zip(ids, end, strict=True)]
    assert metrics[-1]["loss"] > np.mean([np.log(max(len(row), 1)) for row in words]) - 1e-5


@pytest.mark.slow
def test_pictures_are_encoded_in_the_step():
    model, settings = tiny_model(), tiny_settings()
    run = make_run(model, settings)
    _, frozen = run.start()
    batch = tiny_batch(0, pictures=True)
    networks = make_networks(model, settings)
    pixels = batch["image"].astype(np.float32) / 127.5 - 1
    encode = jax.jit(lambda params, x: networks.autoencoder.apply({"params": params}, x, method="encode"))
    mean, logvar = encode(frozen["autoencoder"], pixels)
    encoded = {key: value for key, value in batch.items() if key != "image"}
    encoded |= dict(latent_mean=np.asarray(mean), latent_logvar=np.asarray(logvar))
    losses = [run_steps(settings, [given])[1][0]["loss"] for given in (batch, encoded)]
    assert abs(losses[0] - losses[1]) < 1e-5 * losses[1]


def test_validation_draws_the_same_noise_every_time():
    model, settings = tiny_model(), tiny_settings()
    run = make_run(model, settings)
    state, frozen = run.start()
    step = jax.jit(make_validation_step(model, settings, run.plan))
    batch = jax.tree.map(jnp.asarray, tiny_batch(0))
    losses = [float(step(state.params, frozen, batch, jnp.int32(i))) for i in (0, 1, 0)]
    assert losses[0] == losses[2] != losses[1]
    # In parts, as the training step takes them, it is the same loss.
    settings = dataclasses.replace(settings, accumulate=2)
    step = jax.jit(make_validation_step(model, settings, run.plan))
    assert float(step(state.params, frozen, batch, jnp.int32(0))) == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (((r"unet/.*", "train"), (r"(auto|text_)encoder/.*", "freeze")), "no rule covers the parameter unifusion"),
        (((r".*", "freeze"),), "at least one parameter that trains"),
        (((r".*", "train"),), "loss does not train autoencoder"),
        (((r"text_encoder/.*", "train"), (r".*", "freeze")), "only where config.train.grounding is False"),
    ],
)
def test_rules_for_what_trains_are_checked(rules, words):
    with pytest.raises(InputError, match=words):
        make_run(tiny_model(), tiny_settings(trainable=rules))


def test_the_papers_set_of_the_released_model_has_the_released_size():
    settings = tiny_settings(dtype="bfloat16")
    run = make_run(resized(), settings)
    counts = {"fusers": 0, "unifusion": 0, "scaleu": 0}
    for path, leaf in flatten(run.plan.trainable).items():
        group = "unifusion" if path[0] == "unifusion" else "fusers" if "fuser" in path else "scaleu"
        counts[group] += int(np.prod(leaf.shape))
    assert counts == {"fusers": 208_018_272, "unifusion": 160_782_669, "scaleu": 11_532}
