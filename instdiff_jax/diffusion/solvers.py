"""Solvers as tables of coefficients over one loop. methods.py has each solver's rows, grids.py its noise levels.

A table has one row per UNet evaluation. x are the latents, `anchor` the latents at the start of the step,
h1, h2, h3 the latest stored predictions, and z is noise. An evaluation computes

    d        = p·x + q·ε                                    the solver extrapolates this: ε or x0
    x'       = ax·x + aa·anchor + c0·d + c1·h1 + c2·h2 + c3·h3 + noise·z
    anchor'  = x         if store else anchor
    history' = d, h1, h2 if push  else history

One compiled loop serves every solver, number of steps and α. The loop runs in float32; the
coefficients are computed on the host in float64. A model that predicts v = √ᾱ·ε − √(1−ᾱ)·x0 has other p and q.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from instdiff_jax.config import ScheduleConfig, Sigmas
from instdiff_jax.diffusion import methods
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.diffusion.grids import Grid, make_grid
from instdiff_jax.errors import InputError

CAPACITY = 1024  # rows of a padded table: one compiled program runs any number of steps up to 1000
HISTORY = 3


class Solver(NamedTuple):
    """A solver's rows, its own noise levels (`sigmas` "auto"), and which grids suit it.

    Attributes:
        rows: from methods.py.
        spacing: of its own grid, see `make_grid`.
        whole: whether the network is given whole timesteps only.
        first: grids whose last step ends at timestep 0 instead of without noise.
        even: whether it needs steps that are equal in timesteps.
    """

    rows: Callable[[Grid], list[methods.Row]]
    spacing: str
    whole: bool = True
    first: tuple[str, ...] = ()
    even: bool = False


_EVEN = ("leading", "trailing", "uniform")
SOLVERS = {
    "plms": Solver(methods.plms, "leading", first=_EVEN, even=True),
    "ddim": Solver(methods.ddim, "leading", first=_EVEN),
    "dpm++": Solver(methods.dpm_solver, "whole karras", first=("whole karras",)),
    "dpm++sde": Solver(methods.dpm_solver_sde, "karras"),
    "unipc": Solver(methods.unipc, "uniform"),
    "euler": Solver(methods.ddim, "uniform", whole=False),
    "euler_a": Solver(methods.euler_ancestral, "uniform", whole=False),
    "heun": Solver(methods.heun, "uniform", whole=False),
    "lcm": Solver(methods.lcm, "distilled"),
    "tcd": Solver(methods.tcd, "distilled", first=("distilled", *_EVEN)),
}


class Coefficients(NamedTuple):
    """One entry per UNet evaluation, padded to a fixed length. The top of the file defines the letters."""

    timestep: Float[np.ndarray, "n"]
    alpha: Float[np.ndarray, "n"]  # fuser scale
    signal: Float[np.ndarray, "n"]  # √ᾱ and √(1−ᾱ) where the step begins: they noise a known image to it
    sigma: Float[np.ndarray, "n"]
    blend: Bool[np.ndarray, "n"]  # whether to insert a known image before this evaluation: it begins a step
    p: Float[np.ndarray, "n"]
    q: Float[np.ndarray, "n"]
    ax: Float[np.ndarray, "n"]
    aa: Float[np.ndarray, "n"]
    c: Float[np.ndarray, "n 4"]
    noise: Float[np.ndarray, "n"]
    store: Bool[np.ndarray, "n"]
    push: Bool[np.ndarray, "n"]


@dataclasses.dataclass(frozen=True, eq=False)
class SolverTable:
    """A solver's coefficients, and how its evaluations form steps (on the host).

    Attributes:
        coefficients: the padded table, numpy float32: an argument of the compiled loop, never a constant.
        starts: the evaluation that begins each step, and the number of all evaluations.
        fused_evaluations: the first evaluation at which α is 0 (`evaluations` if there is none).
    """

    coefficients: Coefficients
    starts: tuple[int, ...]
    fused_evaluations: int

    @property
    def steps(self) -> int:
        """Steps that run; α and the multi-instance sampler count these."""
        return len(self.starts) - 1

    @property
    def evaluations(self) -> int:
        """UNet evaluations of all steps."""
        return self.starts[-1]

    @property
    def first_roots(self) -> tuple[np.float32, np.float32]:
        """√ᾱ and √(1−ᾱ) where sampling starts: they noise a start image to it."""
        return self.coefficients.signal[0], self.coefficients.sigma[0]

    def evaluation_of_step(self, step: int) -> int:
        """UNet evaluations in the first `step` steps. The first step of PLMS has two, and so has each of Heun's."""
        return self.starts[step]

    def step_of_evaluation(self, evaluation: int) -> int:
        """The step, counted from 1, that an evaluation, counted from 0, belongs to."""
        return max(evaluation - (self.evaluations - self.steps), 0) + 1


def solver_table(
    sampler: str,
    steps: int,
    schedule: ScheduleConfig,
    alpha_fractions: Sequence[float] = (1.0, 0.0, 0.0),
    strength: float = 1.0,
    sigmas: Sigmas = "auto",
) -> SolverTable:
    """Tabulates a solver.

    With `sigmas` "auto", PLMS and DDIM run on the released uniform grid, whose last step ends at ᾱ of timestep 0.
    DPM-Solver++ runs on Karras's levels, rounded to whole timesteps, and ends there too. (On the uniform grid the last
    steps are so wide in log-SNR that second order gains little: on a Gaussian of unit variance 20 steps are 1.4 times
    as close to the exact solution as DDIM's on the uniform grid, and 5.9 times on this one.) The other solvers and
    grids are those of diffusers, and most of them end without noise.

    Args:
        sampler: a name in SOLVERS.
        steps: requested number of steps; the grid may give another, see `schedule.uniform_timesteps`.
        schedule: the model's noise schedule, and what it predicts.
        alpha_fractions: fractions of the steps with α one, falling and zero.
        strength: fraction of the steps to run, from the end, in (0, 1]: below 1 sampling starts from an image
            noised to the first of them. At least one step runs.
        sigmas: the noise levels, see grids.py.

    Raises:
        InputError: for an unknown sampler, levels that do not suit it, or a number out of range.
    """
    if not 0 < strength <= 1:
        raise InputError(f"strength: expected a number above 0, at most 1, got {strength!r}")
    if sampler not in SOLVERS:
        raise InputError(f"sampling.sampler: expected one of {', '.join(SOLVERS)}, got {sampler!r}")
    solver = SOLVERS[sampler]
    spacing = solver.spacing if sigmas == "auto" else sigmas
    if solver.even and spacing not in _EVEN:
        raise InputError(f"sampling.sigmas: {sampler} takes equal steps: auto or {', '.join(_EVEN)}, got {sigmas!r}")
    grid = make_grid(spacing, steps, schedule, solver.whole, "first" if spacing in solver.first else "clean")
    grid = grid.last(max(1, int(len(grid) * strength)))

    rows = solver.rows(grid)
    rows = [row._replace(c=(*row.c, *(0.0,) * (HISTORY + 1 - len(row.c)))) for row in rows]
    columns = {name: np.array([getattr(row, name) for row in rows]) for name in methods.Row._fields}
    node, step = columns.pop("node"), np.cumsum(columns["blend"]) - 1
    alpha = schedules.alpha_schedule(len(grid), alpha_fractions)[step]
    columns |= {"timestep": grid.timesteps[node], "alpha": alpha}
    columns |= {"signal": np.sqrt(grid.known)[step], "sigma": np.sqrt(1 - grid.known)[step]}
    if schedule.prediction == "v":  # ε = √ᾱ·v + √(1−ᾱ)·x
        level = grid.levels[node]
        columns["p"] = columns["p"] + columns["q"] * np.sqrt(1 - level)
        columns["q"] = columns["q"] * np.sqrt(level)
    fused = int(np.argmax(alpha == 0)) if (alpha == 0).any() else len(rows)
    starts = (*np.flatnonzero(columns["blend"]).tolist(), len(rows))
    return SolverTable(_pad(columns), starts, fused)


def update(
    c: Coefficients,
    x: Float[Array, "rows h w c"],
    anchor: Float[Array, "rows h w c"],
    history: Float[Array, "rows 3 h w c"],
    eps: Float[Array, "rows h w c"],
) -> tuple[Float[Array, "rows h w c"], Float[Array, "rows h w c"], Float[Array, "rows 3 h w c"]]:
    """Applies one evaluation's update in float32, without its noise. `c` is one entry of the table, as scalars.

    Returns:
        The next latents, anchor and history.
    """
    d = c.p * x + c.q * eps
    x_next = c.ax * x + c.aa * anchor + c.c[0] * d
    x_next += c.c[1] * history[:, 0] + c.c[2] * history[:, 1] + c.c[3] * history[:, 2]
    pushed = jnp.concatenate([d[:, None], history[:, :-1]], axis=1)
    return x_next, jnp.where(c.store, x, anchor), jnp.where(c.push, pushed, history)


def _pad(columns: dict[str, np.ndarray]) -> Coefficients:
    length = len(columns["timestep"])
    capacity = -(-length // CAPACITY) * CAPACITY
    kinds = dict.fromkeys(("blend", "store", "push"), np.bool_)
    padded = {}
    for name, values in columns.items():
        padded[name] = np.zeros((capacity, *values.shape[1:]), kinds.get(name, np.float32))
        padded[name][:length] = values
    return Coefficients(**padded)
