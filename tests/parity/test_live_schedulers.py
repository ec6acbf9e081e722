"""Every solver against diffusers' scheduler, evaluation by evaluation, with the same noise and a cheap model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_cases import SCHEDULE

from common import relative_error
from instdiff_jax.config import ScheduleConfig
from instdiff_jax.diffusion.loop import Evaluations, denoise, noise_key, start_state, step_noise
from instdiff_jax.diffusion.solvers import solver_table

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SHAPE = (2, 4, 6, 4)
EDM = ("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete")  # their samples are x0 + σ·ε
KARRAS, EXPONENTIAL = dict(use_karras_sigmas=True), dict(use_exponential_sigmas=True)
RELEASED = dict(set_alpha_to_one=False, steps_offset=1)
SDE = dict(algorithm_type="sde-dpmsolver++")
TRAILING = dict(timestep_spacing="trailing")
LINSPACE = dict(timestep_spacing="linspace")
# Sampler, sigmas, diffusers' scheduler and its settings.
CASES = [
    ("plms", "auto", "PNDM", RELEASED | dict(skip_prk_steps=True)),
    ("ddim", "auto", "DDIM", RELEASED | dict(clip_sample=False)),
    ("ddim", "trailing", "DDIM", RELEASED | TRAILING | dict(clip_sample=False)),
    ("euler", "auto", "EulerDiscrete", LINSPACE),
    ("euler", "leading", "EulerDiscrete", dict(timestep_spacing="leading", steps_offset=1)),
    ("euler", "trailing", "EulerDiscrete", TRAILING),
    ("euler", "karras", "EulerDiscrete", KARRAS),
    ("euler", "exponential", "EulerDiscrete", EXPONENTIAL),
    ("euler_a", "auto", "EulerAncestralDiscrete", LINSPACE),
    ("euler_a", "trailing", "EulerAncestralDiscrete", TRAILING),
    ("heun", "auto", "HeunDiscrete", LINSPACE),
    ("heun", "karras", "HeunDiscrete", KARRAS),
    ("dpm++", "uniform", "DPMSolverMultistep", LINSPACE),
    ("dpm++", "trailing", "DPMSolverMultistep", TRAILING),
    ("dpm++", "karras", "DPMSolverMultistep", KARRAS),
    ("dpm++", "exponential", "DPMSolverMultistep", EXPONENTIAL),
    ("dpm++sde", "uniform", "DPMSolverMultistep", SDE | LINSPACE),
    ("dpm++sde", "auto", "DPMSolverMultistep", SDE | KARRAS),
    ("unipc", "auto", "UniPCMultistep", LINSPACE),
    ("unipc", "karras", "UniPCMultistep", KARRAS),
    ("unipc", "trailing", "UniPCMultistep", TRAILING),
    ("lcm", "auto", "LCM", {}),
    ("tcd", "auto", "TCD", {}),
]
V = [case for case in CASES if case[1] in ("auto", "karras") and case[0] != "plms"]
draw_noise = jax.jit(step_noise, static_argnums=2)
STOCHASTIC = ("euler_a", "dpm++sde", "lcm", "tcd")


def predict(np_, x, t):
    """A cheap model of both arguments; `np_` is numpy or jax.numpy."""
    return np_.tanh(np_.roll(x, 1, axis=-1) * (0.5 + t / 2000) + 0.3 * x) + 0.2 * x


def eps_fn(params, latents, timesteps, conditions, alpha):
    return predict(jnp, latents, timesteps[:, None, None, None])


def make_scheduler(name, settings, prediction):
    base = dict(beta_start=SCHEDULE.linear_start, beta_end=SCHEDULE.linear_end, beta_schedule="scaled_linear")
    prediction = {"epsilon": "epsilon", "v": "v_prediction"}[prediction]
    return getattr(diffusers, f"{name}Scheduler")(**base, **settings, prediction_type=prediction)


def evaluate_theirs(scheduler, x, i, timestep, edm):
    """One evaluation by diffusers. `x` and the result are √ᾱ·x0 + √(1−ᾱ)·ε, in which the model takes them."""
    t = scheduler.timesteps[i]
    assert abs(float(t) - timestep) <= 1.0, "diffusers rounds some timesteps, and truncates others"
    before, after = (np.sqrt(scheduler.sigmas[j].double().numpy() ** 2 + 1) if edm else 1.0 for j in (i, i + 1))
    sample = torch.from_numpy((x * before).astype(np.float32))
    given = scheduler.scale_model_input(sample, t)
    output = predict(np, given.numpy(), np.float32(timestep))
    return scheduler.step(torch.from_numpy(output), t, sample).prev_sample.numpy() / after


@pytest.mark.parametrize("steps", [4, 8, 20, 50])
@pytest.mark.parametrize(
    "sampler, sigmas, name, settings, prediction",
    [(*case, "epsilon") for case in CASES] + [(*case, "v") for case in V],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_solver_equals_the_scheduler(sampler, sigmas, name, settings, prediction, steps, monkeypatch):
    schedule = ScheduleConfig(prediction=prediction)
    table = solver_table(sampler, steps, schedule, sigmas=sigmas)
    scheduler = make_scheduler(name, settings, prediction)
    scheduler.set_timesteps(steps)
    assert table.evaluations == len(scheduler.timesteps)
    keys = np.stack([noise_key(seed) for seed in (3, 4)])
    state = start_state(np.random.default_rng(0).standard_normal(SHAPE, dtype=np.float32), keys)
    theirs, drawn = np.asarray(state.latents), []

    def draw(*_, **__):
        drawn.append(i)
        return torch.from_numpy(np.array(draw_noise(keys, i, SHAPE[1:])))

    module = __import__(type(scheduler).__module__, fromlist=["randn_tensor"])
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", draw)
    conditions, coefficients = {"text": jnp.zeros((2, 1, 1))}, jax.tree.map(jnp.asarray, table.coefficients)
    for i in range(table.evaluations):
        state = denoise(eps_fn, None, state, conditions, Evaluations(coefficients, i, i + 1), use_fusers=False)
        theirs = evaluate_theirs(scheduler, theirs, i, table.coefficients.timestep[i], name in EDM)
        assert relative_error(state.latents, theirs) <= 1e-5, i
    assert (len(drawn) >= steps - 1) == (sampler in STOCHASTIC)
