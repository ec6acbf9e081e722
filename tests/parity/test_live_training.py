"""Whole training steps against PyTorch: diffusers' UNet, torch's AdamW, and the official average of parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from live_diffusers import ONE_LEVEL, official_key, our_params, their_unet
from training_common import make_run, tiny_batch, tiny_model, tiny_settings

from common import channels_first, relative_error
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.diffusion.schedule import alphas_cumprod
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.training.state import init_state, split_params
from instdiff_jax.training.step import compile_step, make_train_step
from instdiff_jax.tree import flatten, unflatten

torch = pytest.importorskip("torch")

STEPS, ROWS = 4, 2


def test_training_steps_equal_those_of_pytorch():
    """Four steps of the fusers: losses, how far each parameter and its average moved, where the rest stays."""
    tiny = tiny_model()
    model = dataclasses.replace(
        tiny,
        unet=dataclasses.replace(ONE_LEVEL, context_dim=tiny.unet.context_dim),
    )
    settings = tiny_settings(batch_size=ROWS, trainable=((r"unet/.*fuser.*", "train"), (r".*", "freeze")))
    # With Adam's small epsilon, gradients that are nearly 0 move a parameter by their rounding's sign.
    settings = dataclasses.replace(settings, optimizer=dataclasses.replace(settings.optimizer, eps=1e-5))
    run = make_run(model, settings)
    _, rest = run.start()
    leaves = flatten(our_params(model)[0])
    params = {path: np.asarray(leaf) for path, leaf in flatten(rest).items()}
    params |= {("unet", *path): leaf for path, leaf in leaves.items()}
    trainable, frozen = split_params(unflatten(params), settings)
    rng, batch = np.random.default_rng(0), tiny_batch(0, ROWS)
    latents, noise = rng.standard_normal((2, ROWS, 8, 8, 4), np.float32)
    times = np.array([603, 25], np.int32)
    context = rng.standard_normal((ROWS, 77, model.unet.context_dim), np.float32)
    given = dict(latents=latents, noise=noise, timesteps=times, context=context, grounding=batch["grounding"])

    tokens = UniFusion(model.unifusion, model.unet.context_dim).apply(
        {"params": unflatten(params)["unifusion"]}, batch["grounding"]
    )
    theirs = pytorch_steps(model, settings, given, np.asarray(tokens))
    state, frozen = init_state(jax.tree.map(jnp.asarray, trainable)), jax.tree.map(jnp.asarray, frozen)
    step = compile_step(make_train_step(model, settings, run.plan), run.plan)
    losses = []
    for _ in range(STEPS):
        state, metrics = step(state, frozen, jax.tree.map(jnp.asarray, given))
        losses.append(float(metrics["loss"]))
    assert relative_error(losses, theirs["losses"]) <= 1e-5 and losses[0] == losses[1] != losses[2]

    table, start = rename_table("model", model), flatten(trainable)
    assert {table[key].path for key in theirs["params"]} == set(start) and len(start) > 10
    averages = flatten(state.optimizer.ema)
    for name, ours, least in (("params", flatten(state.params), 5e-4), ("averages", averages, 3e-5)):
        for key, expected in theirs[name].items():
            path = table[key].path
            before = table[key].to_torch(start[path])
            moved = table[key].to_torch(np.asarray(ours[path])) - before
            assert np.abs(expected - before).max() > least, (name, key)
            assert relative_error(moved, expected - before) <= 1e-3, (name, key)


def pytorch_steps(model, settings, given: dict, tokens: np.ndarray) -> dict:
    """Losses, and the fusers' parameters and averages after the steps, by their official names."""
    unet, optimizer = their_unet(model.unet), settings.optimizer
    names = {name: official_key(name, model.unet) for name, _ in unet.named_parameters()}
    trained = {names[name]: leaf for name, leaf in unet.named_parameters() if "fuser" in name}
    adamw = torch.optim.AdamW(
        trained.values(), optimizer.learning_rate, (optimizer.beta1, optimizer.beta2), optimizer.eps,
        optimizer.weight_decay,
    )  # fmt: skip
    averages = {key: leaf.detach().clone() for key, leaf in trained.items()}
    share = alphas_cumprod(model.schedule)[given["timesteps"]][:, None, None, None]
    noisy = (np.sqrt(share) * given["latents"] + np.sqrt(1 - share) * given["noise"]).astype(np.float32)
    inputs = [torch.from_numpy(array) for array in (channels_first(noisy), given["timesteps"], given["context"])]
    gligen, losses = {"gligen": {"objs": torch.from_numpy(tokens)}}, []
    for step in range(STEPS):
        for group in adamw.param_groups:
            group["lr"] = optimizer.learning_rate * min(step / optimizer.warmup_steps, 1)
        predicted = unet(*inputs, cross_attention_kwargs=gligen).sample
        loss = torch.square(predicted - torch.from_numpy(channels_first(given["noise"]).copy())).mean()
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        for key, leaf in trained.items():
            averages[key].mul_(optimizer.ema_decay).add_(leaf.detach(), alpha=1 - optimizer.ema_decay)
        losses.append(loss.item())
    return dict(
        losses=losses,
        params={key: leaf.detach().numpy() for key, leaf in trained.items()},
        averages={key: leaf.numpy() for key, leaf in averages.items()},
    )
