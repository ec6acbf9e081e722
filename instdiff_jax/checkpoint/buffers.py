"""The noise schedule's buffers, which PyTorch checkpoints carry along; they are computed, never loaded."""

from collections.abc import Mapping

import numpy as np

from instdiff_jax.config import ScheduleConfig
from instdiff_jax.errors import InputError


def schedule_buffers(schedule: ScheduleConfig) -> dict[str, np.ndarray]:
    """The released checkpoint's "diffusion" entry: float32 [timesteps] each, computed in float64 (DDPM, eqs. 4-7)."""
    betas = np.linspace(schedule.linear_start**0.5, schedule.linear_end**0.5, schedule.timesteps, dtype=np.float64) ** 2
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
    }
    return {name: value.astype(np.float32) for name, value in buffers.items()}


def check_schedule(found: Mapping[str, np.ndarray], schedule: ScheduleConfig, source: str) -> None:
    """Checks that a file's buffers match the config. They are computed, never loaded."""
    expected = schedule_buffers(schedule)
    for name, value in found.items():
        if name not in expected:
            raise InputError(f"{source}: diffusion: {name}: not a buffer of the noise schedule")
        if value.shape != expected[name].shape:
            sizes = f"file {list(value.shape)}, config {list(expected[name].shape)}"
            raise InputError(f"{source}: diffusion: {name} ({sizes}): config.model.schedule does not match")
        # Half-precision files round to about 1e-3; other schedules differ by far more.
        if name in ("betas", "alphas_cumprod"):
            error = np.abs(value.astype(np.float64) - expected[name]).max() / expected[name].max()
            if not error < 2e-3:
                raise InputError(f"{source}: diffusion: {name}: differs from config.model.schedule by {error:.1e}")
