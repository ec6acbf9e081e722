"""Noise that solvers add on the way, keyed by seed and step; and every solver with a known region."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_cases import SCHEDULE, C, H, W, fake_eps, make_images, make_inputs, sample

from common import relative_error
from instdiff_jax.diffusion.loop import Evaluations, Inpaint, denoise, noise_key, start_state, step_noise
from instdiff_jax.diffusion.solvers import SOLVERS, solver_table

STOCHASTIC = [name for name in SOLVERS if solver_table(name, 8, SCHEDULE).coefficients.noise.any()]
KEYS = np.stack([noise_key(seed) for seed in (7, 2**70, 0)])


def test_which_solvers_are_stochastic():
    assert STOCHASTIC == ["dpm++sde", "euler_a", "lcm", "tcd"]
    for name in STOCHASTIC:
        noise = solver_table(name, 8, SCHEDULE).coefficients.noise
        assert (noise[:7] > 0).all() and not noise[7:].any(), "the last step adds none"


def test_noise_is_keyed_by_seed_and_step():
    together = step_noise(KEYS, 3, (H, W, C))
    for key, noise in zip(KEYS, together, strict=True):
        assert np.array_equal(step_noise(key[None], 3, (H, W, C))[0], noise)
        assert abs(np.corrcoef(noise.ravel(), step_noise(key[None], 4, (H, W, C)).ravel())[0, 1]) < 0.3
    assert abs(np.corrcoef(together[0].ravel(), together[1].ravel())[0, 1]) < 0.3
    many = np.asarray(step_noise(KEYS, 0, (100, 100, 4)))
    assert abs(many.mean()) < 0.01 and abs(many.std() - 1) < 0.01


@pytest.mark.parametrize("sampler", STOCHASTIC)
def test_an_image_is_the_same_in_any_batch(sampler):
    params, noise, conditions = make_inputs(3)
    noise = jnp.stack([noise[0]] * 3)  # only the keys differ
    images, table = [make_images((2,))[0]] * 3, solver_table(sampler, 8, SCHEDULE, (0.7, 0.0, 0.3))
    together = sample(fake_eps, params, noise, conditions, images, table, mis_steps=3, keys=KEYS)
    for i in range(3):
        some = slice(i, i + 1)
        alone = sample(fake_eps, params, noise[some], conditions, images[some], table, mis_steps=3, keys=KEYS[some])
        assert relative_error(together[i], alone[0]) <= 1e-5
    assert relative_error(together[0], together[1]) > 1e-2


SEEN = []


def recording_eps(params, latents, timesteps, conditions, alpha):
    jax.debug.callback(SEEN.append, latents, ordered=True)
    return fake_eps(params, latents, timesteps, conditions, alpha)


@pytest.mark.parametrize("sampler", SOLVERS)
def test_a_known_region_is_noised_to_each_step(sampler):
    params, noise, conditions = make_inputs(1)
    rng = np.random.default_rng(7)
    keep = (rng.uniform(size=(1, H, W, 1)) < 0.5).astype(np.float32)
    clean, fixed = rng.standard_normal((2, 1, H, W, C)).astype(np.float32)
    table = solver_table(sampler, 6, SCHEDULE, strength=0.7)
    given = {"text": jax.tree.map(lambda a: a[np.zeros((1, 1), int)], conditions["text"])}
    known = Inpaint(*map(jnp.asarray, (clean, keep, fixed)))
    evaluations = Evaluations(table.coefficients, 0, table.evaluations)
    SEEN.clear()
    state = denoise(recording_eps, params, start_state(noise), given, evaluations, use_fusers=False, inpaint=known)
    jax.effects_barrier()
    assert len(SEEN) == table.evaluations and np.isfinite(state.latents).all()
    inside = np.broadcast_to(keep == 1, clean.shape)
    for start in table.starts[:-1]:
        c = jax.tree.map(lambda column, start=start: column[start], table.coefficients)
        assert c.signal**2 + c.sigma**2 == pytest.approx(1, abs=1e-6)
        expected = c.signal * clean + c.sigma * fixed
        assert relative_error(np.asarray(SEEN[start])[inside], expected[inside]) <= 1e-6
