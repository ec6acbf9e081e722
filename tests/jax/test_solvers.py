"""Solver tables against the formulas stated one step at a time, and against an exact solution."""

import jax
import numpy as np
import pytest

from common import relative_error
from instdiff_jax.config import ScheduleConfig
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.diffusion import solvers
from instdiff_jax.errors import InputError

SCHEDULE = ScheduleConfig(linear_start=0.00085, linear_end=0.012, timesteps=1000)
STEPS = [1, 2, 3, 7, 30, 37, 50, 101, 1000]


def fake_eps(x, t):
    """A cheap ε that depends on both arguments."""
    return np.tanh(np.roll(x, 1, axis=-1) * (0.5 + t / 2000) + 0.3 * x) - 0.1 * x


def run_table(table, x, eps_fn):
    """Runs every row of a table, one call a row."""
    update = jax.jit(solvers.update)
    x = np.asarray(x, np.float32)
    state = (x, np.zeros_like(x), np.zeros((len(x), 3, *x.shape[1:]), np.float32))
    for i in range(table.evaluations):
        c = jax.tree.map(lambda column, i=i: column[i], table.coefficients)
        eps = np.asarray(eps_fn(np.asarray(state[0]), int(c.timestep)), np.float32)
        state = update(c, *state, eps)
    return np.asarray(state[0])


def sequential_plms(x, steps, eps_fn):
    """PLMS as the release runs it, in float64: a list of past predictions and a loop over steps."""
    alphas = schedules.alphas_cumprod(SCHEDULE)
    times = schedules.uniform_timesteps(steps, 1000)
    past, x = [], np.asarray(x, np.float64)
    for i, t in enumerate(times):
        now, after = alphas[t], alphas[times[i + 1]] if i + 1 < len(times) else alphas[0]

        def move(eps, x=x, now=now, after=after):
            x0 = (x - np.sqrt(1 - now) * eps) / np.sqrt(now)
            return np.sqrt(after) * x0 + np.sqrt(1 - after) * eps

        eps = eps_fn(x, t)
        if len(past) == 0:
            used = (eps + eps_fn(move(eps), times[min(i + 1, len(times) - 1)])) / 2
        elif len(past) == 1:
            used = (3 * eps - past[-1]) / 2
        elif len(past) == 2:
            used = (23 * eps - 16 * past[-1] + 5 * past[-2]) / 12
        else:
            used = (55 * eps - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
        x = move(used)
        past.append(eps)
    return x


def sequential_dpm_solver(x, steps, eps_fn):
    """DPM-Solver++(2M) in the paper's letters, in float64."""
    alphas = np.append(
        schedules.alphas_cumprod(SCHEDULE)[times := schedules.karras_timesteps(steps, SCHEDULE)],
        schedules.alphas_cumprod(SCHEDULE)[0],
    )
    a, s = np.sqrt(alphas), np.sqrt(1 - alphas)
    lam = np.log(a) - np.log(s)
    previous, x = None, np.asarray(x, np.float64)
    for i, t in enumerate(times):
        x0 = (x - s[i] * eps_fn(x, t)) / a[i]
        h, d = lam[i + 1] - lam[i], x0
        if previous is not None and not (i == len(times) - 1 and len(times) < 15):
            r = (lam[i] - lam[i - 1]) / h
            d = (1 + 1 / (2 * r)) * x0 - 1 / (2 * r) * previous
        x = s[i + 1] / s[i] * x - a[i + 1] * (np.exp(-h) - 1) * d
        previous = x0
    return x


@pytest.fixture
def noise():
    return np.random.default_rng(0).standard_normal((2, 4, 6, 4))


@pytest.mark.parametrize("steps", STEPS)
def test_plms_equals_the_sequential_loop(steps, noise):
    table = solvers.solver_table("plms", steps, SCHEDULE)
    assert table.evaluations == table.steps + 1
    assert relative_error(run_table(table, noise, fake_eps), sequential_plms(noise, steps, fake_eps)) <= 1e-5


@pytest.mark.parametrize("steps", STEPS)
def test_ddim_equals_its_formula(steps, noise):
    table = solvers.solver_table("ddim", steps, SCHEDULE)
    alphas, times = schedules.alphas_cumprod(SCHEDULE), schedules.uniform_timesteps(steps, 1000)
    x = noise
    for i, t in enumerate(times):
        now, after = alphas[t], alphas[times[i + 1]] if i + 1 < len(times) else alphas[0]
        eps = fake_eps(x, t)
        x = np.sqrt(after) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now) + np.sqrt(1 - after) * eps
    assert table.evaluations == table.steps == len(times)
    assert relative_error(run_table(table, noise, fake_eps), x) <= 1e-5


@pytest.mark.parametrize("steps", STEPS)
def test_dpm_solver_equals_its_formula(steps, noise):
    table = solvers.solver_table("dpm++", steps, SCHEDULE)
    assert relative_error(run_table(table, noise, fake_eps), sequential_dpm_solver(noise, steps, fake_eps)) <= 1e-5


def gaussian_error(sampler, steps, std, mean):
    """Distance from the exact solution of the probability flow where the data are N(mean, std²)."""
    table = solvers.solver_table(sampler, steps, SCHEDULE)
    alphas = schedules.alphas_cumprod(SCHEDULE)

    def marginal(t):
        return np.sqrt(alphas[t]) * mean, np.sqrt(alphas[t] * std**2 + 1 - alphas[t])

    def eps_fn(x, t):
        centre, spread = marginal(t)
        return np.sqrt(1 - alphas[t]) * (x - centre) / spread**2

    x = np.linspace(-2, 2, 9).reshape(1, 3, 3, 1)
    (centre, spread), (last_centre, last_spread) = marginal(int(table.coefficients.timestep[0])), marginal(0)
    exact = last_centre + last_spread / spread * (x - centre)
    return np.abs(run_table(table, x, eps_fn) - exact).max()


@pytest.mark.parametrize("std, mean", [(1.0, 0.0), (0.5, 1.0), (0.1, 2.0)])
def test_solvers_converge_on_gaussian_data(std, mean):
    for sampler in ("plms", "ddim", "dpm++"):
        errors = [gaussian_error(sampler, steps, std, mean) for steps in (10, 20, 40)]
        assert errors[0] > errors[1] > errors[2], (sampler, errors)
    assert errors[0] > 6 * errors[2]  # DPM-Solver++; a method of first order would give 4
    assert gaussian_error("dpm++", 20, std, mean) < gaussian_error("ddim", 20, std, mean) / 3


@pytest.mark.parametrize("sampler", ["plms", "ddim", "dpm++"])
def test_tables_have_one_shape_and_are_float32(sampler):
    shapes = set()
    for steps in STEPS:
        coefficients = solvers.solver_table(sampler, steps, SCHEDULE).coefficients
        shapes.add(tuple((column.shape, column.dtype) for column in coefficients))
        assert all(np.isfinite(column).all() for column in coefficients)
    assert len(shapes) == 1
    assert {dtype for _, dtype in shapes.pop()} == {np.dtype(np.float32), np.dtype(bool)}


def test_steps_and_evaluations():
    table = solvers.solver_table("plms", 50, SCHEDULE, (0.8, 0.0, 0.2))
    assert (table.steps, table.evaluations, table.coefficients.timestep[0]) == (50, 51, 981)
    assert [table.evaluation_of_step(step) for step in (0, 1, 18, 50)] == [0, 2, 19, 51]
    assert table.fused_evaluations == 41
    np.testing.assert_array_equal(table.coefficients.timestep[:4], [981, 961, 961, 941])
    np.testing.assert_array_equal(table.coefficients.alpha[:51], [1] * 41 + [0] * 10)
    assert solvers.solver_table("ddim", 50, SCHEDULE).evaluation_of_step(18) == 18
    assert solvers.solver_table("plms", 50, SCHEDULE, (1.0, 0.0, 0.0)).fused_evaluations == 51
    assert solvers.solver_table("plms", 50, SCHEDULE, (0.0, 0.0, 1.0)).fused_evaluations == 0


@pytest.mark.parametrize("sampler", ["plms", "ddim", "dpm++"])
def test_strength_runs_the_last_steps(sampler):
    whole = solvers.solver_table(sampler, 20, SCHEDULE, (0.5, 0.0, 0.5))
    part = solvers.solver_table(sampler, 20, SCHEDULE, (0.5, 0.0, 0.5), strength=0.5)
    extra = whole.evaluations - whole.steps
    assert (part.steps, part.evaluations, part.fused_evaluations) == (10, 10 + extra, 5 + extra)
    assert part.coefficients.timestep[0] == whole.coefficients.timestep[10 + extra]
    assert solvers.solver_table(sampler, 20, SCHEDULE, strength=0.001).steps == 1


def test_impossible_settings_are_errors():
    for strength in (0.0, -1.0, 1.5):
        with pytest.raises(InputError, match="strength"):
            solvers.solver_table("plms", 50, SCHEDULE, strength=strength)
    with pytest.raises(InputError, match="sampler"):
        solvers.solver_table("eulr", 50, SCHEDULE)
