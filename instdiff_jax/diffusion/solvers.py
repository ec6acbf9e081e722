"""PLMS, DDIM and DPM-Solver++(2M) as tables of coefficients over one loop.

A table has one row per UNet evaluation. x are the latents, `anchor` the latents at the start of the step,
and h1, h2, h3 the latest stored predictions. An evaluation computes

    d        = p·x + q·ε                                    the solver extrapolates this: ε or x0
    x'       = ax·x + aa·anchor + c0·d + c1·h1 + c2·h2 + c3·h3
    anchor'  = x         if store else anchor
    history' = d, h1, h2 if push  else history

One compiled loop serves every solver, number of steps and α. The loop runs in float32; the
coefficients are computed on the host in float64.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from instdiff_jax.config import ScheduleConfig
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.errors import InputError

CAPACITY = 1024  # rows of a padded table: one compiled program runs any number of steps up to 1000
HISTORY = 3

# Weights of the newest prediction and of those before it, Adams–Bashforth of order 1 to 4.
ADAMS_BASHFORTH = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# Below this many steps DPM-Solver++ takes its last, widest step at first order: extrapolation overshoots there.
FEW_STEPS = 15


class Coefficients(NamedTuple):
    """One entry per UNet evaluation, padded to a fixed length. The top of the file defines the letters."""

    timestep: Int[np.ndarray, "n"]  # int32
    alpha: Float[np.ndarray, "n"]  # fuser scale
    signal: Float[np.ndarray, "n"]  # √ᾱ and √(1−ᾱ) at the timestep: they noise a known image to it
    sigma: Float[np.ndarray, "n"]
    blend: Bool[np.ndarray, "n"]  # whether to insert a known image before this evaluation: it begins a step
    p: Float[np.ndarray, "n"]
    q: Float[np.ndarray, "n"]
    ax: Float[np.ndarray, "n"]
    aa: Float[np.ndarray, "n"]
    c: Float[np.ndarray, "n 4"]
    store: Bool[np.ndarray, "n"]
    push: Bool[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, eq=False)
class SolverTable:
    """A solver's coefficients, and how its evaluations form steps (on the host).

    Attributes:
        coefficients: the padded table, numpy float32: an argument of the compiled loop, never a constant.
        steps: steps that run; α and the multi-instance sampler count these.
        evaluations: UNet evaluations of all steps.
        fused_evaluations: the first evaluation at which α is 0 (`evaluations` if there is none).
        first_timestep: where sampling starts; a start image is noised to it.
    """

    coefficients: Coefficients
    steps: int
    evaluations: int
    fused_evaluations: int
    first_timestep: int

    def evaluation_of_step(self, step: int) -> int:
        """UNet evaluations in the first `step` steps. The first step of PLMS has an extra one."""
        return step + (self.evaluations - self.steps) if step > 0 else 0


def solver_table(
    sampler: str,
    steps: int,
    schedule: ScheduleConfig,
    alpha_fractions: Sequence[float] = (1.0, 0.0, 0.0),
    strength: float = 1.0,
) -> SolverTable:
    """Tabulates a solver.

    PLMS and DDIM run on the released uniform grid, whose last step ends at ᾱ of timestep 0.
    DPM-Solver++ runs on the Karras grid and ends there too. (On the uniform grid the last steps are so
    wide in log-SNR that second order gains little: on a Gaussian of unit variance 20 steps are 1.4 times
    as close to the exact solution as DDIM's on the uniform grid, and 5.9 times on this one.)

    Args:
        sampler: plms, ddim or dpm++.
        steps: requested number of steps; the grid may give another, see `schedule.uniform_timesteps`.
        schedule: the model's noise schedule.
        alpha_fractions: fractions of the steps with α one, falling and zero.
        strength: fraction of the steps to run, from the end, in (0, 1]: below 1 sampling starts from an image
            noised to `first_timestep`. At least one step runs.

    Raises:
        InputError: for an unknown sampler or a number out of range.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength: expected a number above 0, at most 1, got {strength!r}")
    if sampler == "dpm++":
        grid = schedules.karras_timesteps(steps, schedule)
    elif sampler in ("plms", "ddim"):
        grid = schedules.uniform_timesteps(steps, schedule.timesteps)
    else:
        raise InputError(f"sampling.sampler: expected one of plms, ddim, dpm++, got {sampler!r}")
    grid = grid[len(grid) - max(1, int(len(grid) * strength)) :]

    cumprod = schedules.alphas_cumprod(schedule).astype(np.float32).astype(np.float64)  # ᾱ is float32 in the release
    levels = np.append(cumprod[grid], cumprod[0])
    rows = {"plms": _plms, "ddim": _ddim, "dpm++": _dpm_solver}[sampler](levels)

    step = np.maximum(np.arange(len(rows)) - (len(rows) - len(grid)), 0)
    alpha = schedules.alpha_schedule(len(grid), alpha_fractions)[step]
    # PLMS's first step has an extra evaluation, at the timestep where the step ends.
    at = grid if len(rows) == len(grid) else np.insert(grid, 1, grid[min(1, len(grid) - 1)])
    signal, sigma = schedules.signal_and_noise(schedule)
    columns = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    columns |= {"timestep": at, "alpha": alpha, "signal": signal[at], "sigma": sigma[at]}
    fused = int(np.argmax(alpha == 0)) if (alpha == 0).any() else len(rows)
    return SolverTable(
        coefficients=_pad(columns),
        steps=len(grid),
        evaluations=len(rows),
        fused_evaluations=fused,
        first_timestep=int(grid[0]),
    )


def update(
    c: Coefficients,
    x: Float[Array, "rows h w c"],
    anchor: Float[Array, "rows h w c"],
    history: Float[Array, "rows 3 h w c"],
    eps: Float[Array, "rows h w c"],
) -> tuple[Float[Array, "rows h w c"], Float[Array, "rows h w c"], Float[Array, "rows 3 h w c"]]:
    """Applies one evaluation's update in float32. `c` is one entry of the table, as scalars.

    Returns:
        The next latents, anchor and history.
    """
    d = c.p * x + c.q * eps
    x_next = c.ax * x + c.aa * anchor + c.c[0] * d
    x_next += c.c[1] * history[:, 0] + c.c[2] * history[:, 1] + c.c[3] * history[:, 2]
    pushed = jnp.concatenate([d[:, None], history[:, :-1]], axis=1)
    return x_next, jnp.where(c.store, x, anchor), jnp.where(c.push, pushed, history)


def _row(p=0.0, q=1.0, ax=0.0, aa=0.0, c=(0.0, 0.0, 0.0, 0.0), store=False, push=True, blend=True) -> dict:
    return dict(p=p, q=q, ax=ax, aa=aa, c=c, store=store, push=push, blend=blend)


def _transfer(now: float, after: float) -> tuple[float, float]:
    """x' = a·x + b·ε from one ᾱ to the next (DDIM, eq. 12, η = 0): the step of both DDIM and PLMS."""
    a = (after / now) ** 0.5
    return a, (1 - after) ** 0.5 - a * (1 - now) ** 0.5


def _ddim(levels: Float[np.ndarray, "levels"]) -> list[dict]:
    rows = []
    for now, after in zip(levels[:-1], levels[1:], strict=True):
        a, b = _transfer(now, after)
        rows.append(_row(ax=a, c=(b, 0.0, 0.0, 0.0)))
    return rows


def _plms(levels: Float[np.ndarray, "levels"]) -> list[dict]:
    """Liu et al. 2022, with the released first step: improved Euler, whose second prediction is not kept."""
    a, b = _transfer(levels[0], levels[1])
    rows = [
        _row(ax=a, c=(b, 0.0, 0.0, 0.0), store=True),
        _row(aa=a, c=(b / 2, b / 2, 0.0, 0.0), push=False, blend=False),
    ]
    for i in range(1, len(levels) - 1):
        a, b = _transfer(levels[i], levels[i + 1])
        rows.append(_row(ax=a, c=tuple(b * weight for weight in ADAMS_BASHFORTH[min(i, 3)])))
    return rows


def _dpm_solver(levels: Float[np.ndarray, "levels"]) -> list[dict]:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2: the history holds predictions of x0."""
    signal, sigma = np.sqrt(levels), np.sqrt(1 - levels)
    width = np.diff(np.log(signal / sigma))
    rows = []
    for i, h in enumerate(width):
        first_order = i == 0 or (i == len(width) - 1 and len(width) < FEW_STEPS)
        ahead = 0.0 if first_order else h / (2 * width[i - 1])  # 1/(2r) of the paper
        gain = -signal[i + 1] * np.expm1(-h)
        rows.append(
            _row(
                p=1 / signal[i],
                q=-sigma[i] / signal[i],
                ax=sigma[i + 1] / sigma[i],
                c=(gain * (1 + ahead), -gain * ahead, 0.0, 0.0),
            )
        )
    return rows


def _pad(columns: dict[str, np.ndarray]) -> Coefficients:
    length = len(columns["timestep"])
    capacity = -(-length // CAPACITY) * CAPACITY
    kinds = {"timestep": np.int32} | dict.fromkeys(("blend", "store", "push"), np.bool_)
    padded = {}
    for name, values in columns.items():
        padded[name] = np.zeros((capacity, *values.shape[1:]), kinds.get(name, np.float32))
        padded[name][:length] = values
    return Coefficients(**padded)
