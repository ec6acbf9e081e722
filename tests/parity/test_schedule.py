"""The noise schedule, the timestep grids and the fuser's schedule against the released ones."""

import jax.numpy as jnp
import numpy as np
import pytest

from common import parity, relative_error
from instdiff_jax.config import ScheduleConfig
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.errors import InputError

SCHEDULE = ScheduleConfig(linear_start=0.00085, linear_end=0.012, timesteps=1000)


def test_betas_and_alphas_cumprod_are_the_released_ones():
    expected = parity("schedule")
    assert schedules.betas(SCHEDULE).dtype == np.float64
    assert relative_error(schedules.betas(SCHEDULE).astype(np.float32), expected["betas"]) <= 1e-7
    assert relative_error(schedules.alphas_cumprod(SCHEDULE).astype(np.float32), expected["alphas_cumprod"]) <= 1e-7


@pytest.mark.parametrize("steps", [50, 20, 30])
def test_uniform_timesteps_are_the_released_ones(steps):
    expected = parity("schedule")[f"ddim_timesteps_{steps}"]
    np.testing.assert_array_equal(schedules.uniform_timesteps(steps, 1000), expected[::-1])


def test_every_number_of_steps_gives_a_grid():
    for steps in range(1, 1001):
        grid = schedules.uniform_timesteps(steps, 1000)
        assert (np.diff(grid) < 0).all() and grid[0] <= 999 and grid[-1] == 1
        assert len(grid) == min(-(-1000 // (1000 // steps)), 999)


def test_a_grid_past_the_last_timestep_ends_at_it():
    np.testing.assert_array_equal(schedules.uniform_timesteps(3, 1000), [999, 667, 334, 1])
    np.testing.assert_array_equal(schedules.uniform_timesteps(37, 1000)[:3], [999, 973, 946])
    assert len(schedules.uniform_timesteps(101, 1000)) == 112


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_steps_are_an_error(steps):
    with pytest.raises(InputError, match="sampling.steps"):
        schedules.uniform_timesteps(steps, 1000)
    with pytest.raises(InputError, match="sampling.steps"):
        schedules.karras_timesteps(steps, SCHEDULE)


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50, 500, 999, 1000])
def test_karras_timesteps_fall_from_the_top_and_stop_before_zero(steps):
    grid = schedules.karras_timesteps(steps, SCHEDULE)
    assert grid[0] == 999 and grid[-1] > 0 and (np.diff(grid) < 0).all()
    assert len(grid) == min(steps, 999)


@pytest.mark.parametrize("case", range(4))
def test_alpha_schedules_are_the_released_ones(case):
    expected = parity("schedule")
    actual = schedules.alpha_schedule(50, expected[f"alpha_{case}_type"].astype(float).tolist())
    np.testing.assert_allclose(actual, expected[f"alpha_{case}"], rtol=1e-12, atol=0)


def test_alpha_lengths_are_truncated_in_floating_point():
    assert schedules.alpha_schedule(50, (0.58, 0.0, 0.42)).sum() == 28
    np.testing.assert_allclose(schedules.alpha_schedule(4, (0.25, 0.5, 0.25)), [1, 0.5, 0, 0])
    for length in range(1, 200):  # the released code fails for 49 falling steps: arange(0, 1, 1/49) has 50
        falling = schedules.alpha_schedule(length, (0.0, 1.0, 0.0))
        assert len(falling) == length and falling[-1] == 0 and (np.diff(falling) < 0).all()


@pytest.mark.parametrize("fractions", [(1.0,), (0.5, 0.2, 0.2), (1.5, 0.0, -0.5)])
def test_impossible_alpha_is_an_error(fractions):
    with pytest.raises(InputError, match="sampling.alpha"):
        schedules.alpha_schedule(50, fractions)


def test_q_sample_is_the_released_one():
    expected = parity("schedule")
    x0, noise, t = (jnp.asarray(expected[name]) for name in ("q_x", "q_noise", "q_t"))
    actual = schedules.q_sample(x0, noise, t, SCHEDULE)
    assert actual.dtype == jnp.float32
    assert relative_error(actual, expected["q_out"]) <= 1e-7
