"""Each solver as the rows of its table: one row per UNet evaluation. The top of solvers.py defines the letters.

Latents are √ᾱ·x0 + √(1−ᾱ)·ε throughout. Solvers that are published for x0 + σ·ε (Euler, Heun) are scaled by √ᾱ.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from instdiff_jax.diffusion.grids import Grid

# Weights of the newest prediction and of those before it, Adams–Bashforth of order 1 to 4.
ADAMS_BASHFORTH = (
    (1.0, 0.0, 0.0, 0.0),
    (3 / 2, -1 / 2, 0.0, 0.0),
    (23 / 12, -16 / 12, 5 / 12, 0.0),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
# Below this many steps DPM-Solver++ takes its last, widest step at first order: extrapolation overshoots there.
FEW_STEPS = 15
# LCM's boundary condition: the standard deviation of the data, and the factor of timesteps.
DATA_STD, TIMESTEP_SCALE = 0.5, 10.0
# TCD's γ: 0 adds no noise, 1 renews all of it.
TCD_GAMMA = 0.3


class Row(NamedTuple):
    """One evaluation. `node` is the step at whose beginning the network is evaluated; c may be shorter than 4."""

    node: int
    p: float = 0.0
    q: float = 1.0
    ax: float = 0.0
    aa: float = 0.0
    c: tuple[float, ...] = ()
    noise: float = 0.0
    store: bool = False
    push: bool = True
    blend: bool = True


def ddim(grid: Grid) -> list[Row]:
    """DDIM (Song et al. 2021, eq. 12, η = 0). Euler's method for x0 + σ·ε is the same step."""
    rows = []
    for i in range(len(grid)):
        a, b = _transfer(*grid.levels[i : i + 2])
        rows.append(Row(i, ax=a, c=(b,)))
    return rows


def euler_ancestral(grid: Grid) -> list[Row]:
    """Euler ancestral (k-diffusion): a step to less noise than asked for, and fresh noise for the rest."""
    sigma, rows = np.sqrt((1 - grid.levels) / grid.levels), []
    for i, (now, after) in enumerate(zip(sigma[:-1], sigma[1:], strict=True)):
        up = after * np.sqrt(now**2 - after**2) / now
        down = np.sqrt(after**2 - up**2)
        scale = np.sqrt(grid.levels[i + 1])
        a = scale / np.sqrt(grid.levels[i])
        rows.append(Row(i, ax=a, c=(scale * (down - now),), noise=scale * up))
    return rows


def heun(grid: Grid) -> list[Row]:
    """Heun's method (Karras et al. 2022, algorithm 1): the mean of ε at both ends of a step, which takes two
    evaluations. The last step ends without noise, where there is no ε: one evaluation."""
    rows = []
    for i in range(len(grid)):
        a, b = _transfer(*grid.levels[i : i + 2])
        rows.append(Row(i, ax=a, c=(b,), store=True))
        if i + 1 < len(grid):
            rows.append(Row(i + 1, aa=a, c=(b / 2, b / 2), push=False, blend=False))
    return rows


def plms(grid: Grid) -> list[Row]:
    """Liu et al. 2022, with the released first step: improved Euler, whose second prediction is not kept."""
    a, b = _transfer(*grid.levels[:2])
    # The extra evaluation is at the timestep where the first step ends.
    second = min(1, len(grid) - 1)
    rows = [
        Row(0, ax=a, c=(b,), store=True),
        Row(second, aa=a, c=(b / 2, b / 2), push=False, blend=False),
    ]
    for i in range(1, len(grid)):
        a, b = _transfer(*grid.levels[i : i + 2])
        rows.append(Row(i, ax=a, c=tuple(b * weight for weight in ADAMS_BASHFORTH[min(i, 3)])))
    return rows


def dpm_solver(grid: Grid, stochastic: bool = False) -> list[Row]:
    """DPM-Solver++(2M), Lu et al. 2022, algorithm 2, or its SDE form: the history holds predictions of x0."""
    signal, sigma = np.sqrt(grid.levels), np.sqrt(1 - grid.levels)
    width = np.diff(_log_snr(signal, sigma))
    rows = []
    for i, h in enumerate(width):
        first_order = i == 0 or np.isinf(h) or (i == len(width) - 1 and len(width) < FEW_STEPS)
        ahead = 0.0 if first_order else h / (2 * width[i - 1])  # 1/(2r) of the paper
        gain = -signal[i + 1] * np.expm1(-2 * h if stochastic else -h)
        rows.append(
            Row(
                i,
                p=1 / signal[i],
                q=-sigma[i] / signal[i],
                ax=sigma[i + 1] / sigma[i] * (np.exp(-h) if stochastic else 1.0),
                c=(gain * (1 + ahead), -gain * ahead),
                noise=sigma[i + 1] * np.sqrt(-np.expm1(-2 * h)) if stochastic else 0.0,
            )
        )
    return rows


def dpm_solver_sde(grid: Grid) -> list[Row]:
    """DPM-Solver++(2M) for the stochastic equation (Lu et al. 2022, appendix; midpoint form)."""
    return dpm_solver(grid, stochastic=True)


def unipc(grid: Grid) -> list[Row]:
    """UniPC of order 2 (Zhao et al. 2023, algorithms 5 and 7, B₂), with predictions of x0.

    The corrector replaces the predictor's terms in the latents by its own. Both are linear in predictions that the
    history holds, so it needs no latents of the step before.
    """
    signal, sigma = np.sqrt(grid.levels), np.sqrt(1 - grid.levels)
    width = np.diff(_log_snr(signal, sigma))
    order = [min(2, i + 1, len(grid) - i) for i in range(len(grid))]  # the last step has order 1
    rows = []
    for i, h in enumerate(width):
        shrink = sigma[i + 1] / sigma[i]
        gain = -signal[i + 1] * np.expm1(-h)
        terms = np.zeros(4)  # of x' in d, h1, h2, h3
        if i > 0:
            terms += shrink * _correction(order[i - 1], -signal[i] * np.expm1(-width[i - 1]), width[:i][-2:])
        terms[0] += gain
        if order[i] == 2:
            terms[:2] += gain * h / (2 * width[i - 1]) * np.array([1.0, -1.0])
        rows.append(Row(i, p=1 / signal[i], q=-sigma[i] / signal[i], ax=shrink, c=tuple(terms)))
    return rows


def _correction(order: int, gain: float, width: Float[np.ndarray, "steps"]) -> Float[np.ndarray, "4"]:
    """What UniPC's corrector adds to the latents after a step of this order, in d, h1, h2 and h3.

    Args:
        order: of the step.
        gain: −√ᾱ·B of the step's end.
        width: of the step before (order 2) and of the step, in log-SNR.
    """
    if order == 1:
        return gain / 2 * np.array([1.0, -1.0, 0.0, 0.0])
    h, r = width[-1], -width[-2] / width[-1]
    first = np.expm1(-h) / -h - 1  # h·φ₂ and h·φ₃ of the paper, up to signs
    second = first / -h - 1 / 2
    weights = np.linalg.solve(np.array([[1.0, 1.0], [r, 1.0]]), np.array([first, 2 * second]) / np.expm1(-h))
    past = (weights[0] - 1 / 2) / r  # of (h2 − h1): the corrector's weight instead of the predictor's
    return gain * np.array([weights[1], -weights[1] - past, past, 0.0])


def lcm(grid: Grid) -> list[Row]:
    """Latent consistency models (Luo et al. 2023, algorithm 1): x0 by the consistency function, and all noise anew."""
    signal, sigma, rows = np.sqrt(grid.levels), np.sqrt(1 - grid.levels), []
    for i, t in enumerate(grid.timesteps):
        skip = DATA_STD**2 / ((t * TIMESTEP_SCALE) ** 2 + DATA_STD**2)
        out = t * TIMESTEP_SCALE / np.sqrt((t * TIMESTEP_SCALE) ** 2 + DATA_STD**2)
        x0 = dict(p=1 / signal[i], q=-sigma[i] / signal[i])
        rows.append(Row(i, **x0, ax=signal[i + 1] * skip, c=(signal[i + 1] * out,), noise=sigma[i + 1]))
    return rows


def tcd(grid: Grid) -> list[Row]:
    """Trajectory consistency distillation (Zheng et al. 2024, algorithm 4): DDIM to an earlier timestep, then noise."""
    rows = []
    for i in range(len(grid)):
        now, after = grid.levels[i : i + 2]
        if i == len(grid) - 1:
            a, b = _transfer(now, after)
            rows.append(Row(i, ax=a, c=(b,)))
            continue
        between = max(grid.trained[int((1 - TCD_GAMMA) * grid.timesteps[i + 1])], after)
        a, b = _transfer(now, between)
        scale = np.sqrt(after / between)
        rows.append(Row(i, ax=scale * a, c=(scale * b,), noise=np.sqrt(1 - after / between)))
    return rows


def _transfer(now: float, after: float) -> tuple[float, float]:
    """x' = a·x + b·ε from one ᾱ to the next: the step of DDIM, PLMS and Euler."""
    a = (after / now) ** 0.5
    return a, (1 - after) ** 0.5 - a * (1 - now) ** 0.5


def _log_snr(signal: Float[np.ndarray, "n"], sigma: Float[np.ndarray, "n"]) -> Float[np.ndarray, "n"]:
    """log(√ᾱ/√(1−ᾱ)); infinite where there is no noise."""
    with np.errstate(divide="ignore"):
        return np.log(signal / sigma)
