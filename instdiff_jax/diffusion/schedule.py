"""Noise schedule, timestep grids and the fuser's schedule.

All values are computed on the host in float64, as in the released model, and rounded to float32 once.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from instdiff_jax.config import ScheduleConfig
from instdiff_jax.errors import InputError

KARRAS_RHO = 7.0


def betas(config: ScheduleConfig) -> Float[np.ndarray, "timesteps"]:
    """Noise added at each timestep, float64: linspace(√linear_start, √linear_end)² (Stable Diffusion's schedule)."""
    return np.linspace(config.linear_start**0.5, config.linear_end**0.5, config.timesteps, dtype=np.float64) ** 2


def alphas_cumprod(config: ScheduleConfig) -> Float[np.ndarray, "timesteps"]:
    """ᾱ, float64: the remaining fraction of the signal's variance at each timestep."""
    return np.cumprod(1.0 - betas(config))


def signal_and_noise(
    config: ScheduleConfig,
) -> tuple[Float[np.ndarray, "timesteps"], Float[np.ndarray, "timesteps"]]:
    """√ᾱ and √(1−ᾱ) at each timestep: roots taken in float64, then rounded to float32, as released."""
    cumprod = alphas_cumprod(config)
    return np.sqrt(cumprod).astype(np.float32), np.sqrt(1.0 - cumprod).astype(np.float32)


def q_sample(
    x0: Float[Array, "b *shape"], noise: Float[Array, "b *shape"], t: Int[Array, "b"], schedule: ScheduleConfig
) -> Float[Array, "b *shape"]:
    """Noises clean latents to timestep t, one timestep per sample: √ᾱ·x0 + √(1−ᾱ)·noise (DDPM, eq. 4), in float32."""
    signal, sigma = (jnp.asarray(root)[t].reshape(-1, *(1,) * (x0.ndim - 1)) for root in signal_and_noise(schedule))
    return signal * x0.astype(jnp.float32) + sigma * noise.astype(jnp.float32)


def prediction_target(
    x0: Float[Array, "b *shape"], noise: Float[Array, "b *shape"], t: Int[Array, "b"], schedule: ScheduleConfig
) -> Float[Array, "b *shape"]:
    """What the network predicts: the noise, or v = √ᾱ·noise − √(1−ᾱ)·x0 (Salimans and Ho 2022), in float32."""
    return noise if schedule.prediction == "epsilon" else q_sample(noise, -x0, t, schedule)


def velocity_weights(config: ScheduleConfig, limit: float = 0.0) -> Float[Array, "timesteps"]:
    """1/ᾱ at each timestep: converts the squared error of ε to that of v = √ᾱ·ε − √(1−ᾱ)·x0.

    Salimans and Ho 2022, section 4 and appendix D. The loss on ε has little weight at high noise, where an
    image's layout is decided: there a network that copies its input is nearly right.

    Args:
        limit: the largest weight; 0 for none. As in Hang et al. 2023 (min-SNR), it keeps any timestep from dominating:
            at the last ones 1/ᾱ is over 200, and the error of a network with normalised features is mostly rounding.
    """
    weights = 1.0 / alphas_cumprod(config)
    return jnp.asarray(np.minimum(weights, limit) if limit else weights, jnp.float32)


def uniform_timesteps(steps: int, timesteps: int) -> Int[np.ndarray, "n"]:
    """The released grid, descending: range(0, timesteps, timesteps // steps) + 1.

    A number of steps that does not divide `timesteps` gives more steps than requested: 30 gives 31.
    If the grid's top would be `timesteps` itself, one past the last trained timestep (37 or 101
    steps of 1000; the released code fails there), the top becomes the last trained timestep, and is
    dropped if the grid already contains it (more than half of `timesteps`).

    Raises:
        InputError: for steps outside 1…timesteps.
    """
    check_steps(steps, timesteps)
    grid = np.arange(0, timesteps, timesteps // steps) + 1
    return np.unique(np.minimum(grid, timesteps - 1))[::-1]


def karras_timesteps(steps: int, schedule: ScheduleConfig) -> Int[np.ndarray, "n"]:
    """Descending timesteps whose noise levels σ = √((1−ᾱ)/ᾱ) are evenly spaced in σ^(1/7), ending before timestep 0.

    Karras et al. 2022, eq. 5, with the levels rounded to trained timesteps, at least one apart. The grid
    goes from the last timestep down to 0, where the last step ends; `timesteps` steps run one fewer.

    Raises:
        InputError: for steps outside 1…timesteps.
    """
    check_steps(steps, schedule.timesteps)
    last = schedule.timesteps - 1
    index = np.arange(min(steps, last) + 1)
    cumprod = alphas_cumprod(schedule)
    sigma = np.sqrt((1.0 - cumprod) / cumprod)
    levels = np.linspace(sigma[0] ** (1 / KARRAS_RHO), sigma[-1] ** (1 / KARRAS_RHO), len(index)) ** KARRAS_RHO
    grid = np.rint(np.interp(np.log(levels), np.log(sigma), np.arange(last + 1))).astype(np.int64)
    grid = np.maximum.accumulate(grid - index) + index
    return np.minimum(grid, last - index[::-1])[:0:-1]


def alpha_schedule(length: int, fractions: Sequence[float]) -> Float[np.ndarray, "length"]:
    """The fuser's scale α at each step: ones, then a linear decay (n−1)/n … 0, then zeros.

    Args:
        length: number of steps.
        fractions: fraction of the steps in each part; the first two lengths are truncated in float64, as
            released (int(0.58 · 50) is 28), the third takes the rest.

    Raises:
        InputError: for fractions that are negative or do not sum to 1.
    """
    if len(fractions) != 3 or min(fractions) < 0 or not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise InputError(f"sampling.alpha: expected three fractions that sum to 1, got {tuple(fractions)!r}")
    ones = int(fractions[0] * length)
    decay = min(int(fractions[1] * length), length - ones)
    falling = np.arange(decay)[::-1] * (1.0 / max(decay, 1))
    return np.concatenate([np.ones(ones), falling, np.zeros(length - ones - decay)])


def check_steps(steps: int, timesteps: int) -> None:
    """Raises InputError for a number of steps outside 1…timesteps."""
    if not 1 <= steps <= timesteps:
        raise InputError(f"sampling.steps: expected a whole number from 1 to {timesteps}, got {steps!r}")
