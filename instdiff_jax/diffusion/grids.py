"""Where a solver's steps begin and end: timesteps and noise levels.

A grid is spaced evenly in timesteps (leading, trailing, uniform: Lin et al. 2023, table 2), in σ^(1/7) (Karras et al.
2022, eq. 5) or in log σ (exponential), with σ = √((1−ᾱ)/ᾱ). The names are those of diffusers and k-diffusion.
"""

import dataclasses
from typing import Self

import numpy as np
from jaxtyping import Float

from instdiff_jax.config import ScheduleConfig
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.errors import InputError

# Consistency models (LCM, TCD) are distilled at so many evenly spaced timesteps, and run at some of them.
DISTILLED_STEPS = 50


@dataclasses.dataclass(frozen=True, eq=False)
class Grid:
    """The steps of a solver, on the host in float64.

    Attributes:
        timesteps: where each step begins, descending; what the network is given. Between two trained timesteps it may
            be a fraction.
        levels: ᾱ where each step begins, and where the last one ends. At trained timesteps it is rounded to float32
            (as released).
        known: ᾱ to which a known image is noised where each step begins.
        trained: ᾱ at all trained timesteps.
    """

    timesteps: Float[np.ndarray, "n"]
    levels: Float[np.ndarray, "n+1"]
    known: Float[np.ndarray, "n"]
    trained: Float[np.ndarray, "timesteps"]

    def __len__(self) -> int:
        return len(self.timesteps)

    def last(self, count: int) -> Self:
        """The last steps."""
        first = len(self) - count
        cut = {name: getattr(self, name)[first:] for name in ("timesteps", "levels", "known")}
        return dataclasses.replace(self, **cut)


def make_grid(spacing: str, steps: int, schedule: ScheduleConfig, whole: bool, end: str) -> Grid:
    """A grid of about `steps` steps.

    Args:
        spacing: leading (the released grid), trailing, uniform, karras or exponential; or "whole karras" (Karras levels
            rounded to trained timesteps) and "distilled" (of consistency models), which only solvers' defaults use.
        steps: requested number of steps.
        schedule: the model's noise schedule.
        whole: the network takes whole timesteps only. Then karras and exponential keep their levels, and round what
            the network is given.
        end: where the last step ends: "clean" (no noise) or "first" (ᾱ of timestep 0).

    Raises:
        InputError: for a number of steps out of range.
    """
    schedules.check_steps(steps, schedule.timesteps)
    exact = schedules.alphas_cumprod(schedule)
    trained = exact.astype(np.float32).astype(np.float64)  # ᾱ is float32 in the release
    final = trained[0] if end == "first" else 1.0
    if spacing in ("karras", "exponential") or (spacing == "uniform" and not whole):
        times, sigma = _noise_levels(spacing, steps, np.sqrt((1 - trained) / trained))
        levels = 1 / (1 + sigma**2)
        return Grid(np.rint(times) if whole else times, np.append(levels, final), levels, trained)
    index = _whole_timesteps(spacing, steps, schedule)
    return Grid(index.astype(np.float64), np.append(trained[index], final), exact[index], trained)


def _noise_levels(spacing: str, steps: int, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Timesteps and σ of grids that do not keep to trained timesteps; `trained` is σ at these."""
    numbers = np.arange(len(trained))
    if spacing == "uniform":
        times = np.linspace(len(trained) - 1, 0, steps)
        return times, np.interp(times, numbers, trained)
    if spacing == "karras":
        rho = schedules.KARRAS_RHO
        sigma = np.linspace(trained[-1] ** (1 / rho), trained[0] ** (1 / rho), steps) ** rho
    else:
        sigma = np.exp(np.linspace(np.log(trained[-1]), np.log(trained[0]), steps))
    return np.interp(np.log(sigma), np.log(trained), numbers), sigma


def _whole_timesteps(spacing: str, steps: int, schedule: ScheduleConfig) -> np.ndarray:
    """Descending trained timesteps."""
    total = schedule.timesteps
    if spacing == "leading":
        return schedules.uniform_timesteps(steps, total)
    if spacing == "whole karras":
        return schedules.karras_timesteps(steps, schedule)
    if spacing == "trailing":
        return np.rint(total - np.arange(steps) * (total / steps)).astype(np.int64) - 1
    if spacing == "uniform":  # from the last timestep to 0, where the last step ends
        return np.unique(np.rint(np.linspace(0, total - 1, steps + 1)).astype(np.int64))[:0:-1]
    taught = min(DISTILLED_STEPS, total)
    if steps > taught:
        raise InputError(f"sampling.steps: expected at most {taught} with lcm and tcd, got {steps}")
    distilled = (np.arange(1, taught + 1) * (total // taught) - 1)[::-1]
    return distilled[np.linspace(0, taught, steps, endpoint=False).astype(np.int64)]
