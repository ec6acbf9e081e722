"""The denoising loop: one compiled program runs any evaluations of any solver on rows.

The UNet comes in as a function

    eps_fn(params, latents [n h w c], timesteps [n], conditions, alpha) -> ε [n h w c]

It must be hashable, and the same object for the same model: it is part of the compiled program's key. With guidance,
n is 2 · rows, and each row's conditional and unconditional entries are adjacent. As two halves they would need
collectives when rows are sharded.

Conditions are a dict of groups, each a tree of arrays whose first axis is the rows'. Only the fusers read the group
`grounding`; it is left out when they are off.

To reuse deep features between evaluations (DeepCache; Ma et al. 2024), `eps_fn` also has two parts:
`deep(params, latents, timesteps, conditions, alpha)`, and `finish`, which takes its result as one more argument.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry2x32_p
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int, UInt32

from instdiff_jax.diffusion.solvers import HISTORY, Coefficients, update
from instdiff_jax.parallel.rows import on_each_device

FUSER_GROUP = "grounding"

Keys = UInt32[Array, "rows 2"] | UInt32[np.ndarray, "rows 2"]
EpsFn = Callable[[Any, Array, Array, Any, Array | None], Array]


class DenoiseState(NamedTuple):
    """What a solver carries, float32, rows (or images) first; see solvers.py. `keys` are those of each row's noise."""

    latents: Float[Array, "rows h w c"]
    anchor: Float[Array, "rows h w c"]
    history: Float[Array, "rows 3 h w c"]
    keys: UInt32[Array, "rows 2"]


class Inpaint(NamedTuple):
    """An image with a region to keep. Before each step, that region is set to the image noised to that step.

    `keep` is 1 in the region to keep and 0 in the region to paint (the `mask` of the official sampler).
    """

    latents: Float[Array, "rows h w c"]
    keep: Float[Array, "rows h w 1"]
    noise: Float[Array, "rows h w c"]


class Evaluations(NamedTuple):
    """Evaluations start … stop−1 of a solver's table. All values are traced: new values reuse the compiled program.

    Attributes:
        coefficients: the table's.
        start: first evaluation.
        stop: end of the evaluations.
        guidance_scale: g of ε = u + g·(c − u) (classifier-free guidance); not read without unconditional entries.
        reuse: compute deep features in every `reuse`-th evaluation from `start` on. None computes them in each one,
            with another program.
    """

    coefficients: Coefficients
    start: Int[Array, ""] | int
    stop: Int[Array, ""] | int
    guidance_scale: Float[Array, ""] | float = 1.0
    reuse: Int[Array, ""] | int | None = None


def start_state(latents: Float[Array, "rows h w c"], keys: Keys | None = None) -> DenoiseState:
    """The state before a solver's first evaluation.

    Args:
        latents: noise, or a noised image.
        keys: of the noise that stochastic solvers add (`noise_key`); without them all rows get the same.
    """
    latents = jnp.asarray(latents, jnp.float32)
    keys = jnp.zeros((len(latents), 2), jnp.uint32) if keys is None else jnp.asarray(keys)
    history = jnp.zeros((latents.shape[0], HISTORY, *latents.shape[1:]), jnp.float32)
    return DenoiseState(latents, jnp.zeros_like(latents), history, keys)


def noise_key(seed: int) -> UInt32[np.ndarray, "2"]:
    """The key of the noise that an image with this seed gets on the way; with a step's number it gives that noise."""
    return np.random.SeedSequence(seed).generate_state(2)


def step_noise(keys: Keys, i: Int[Array, ""] | int, shape: tuple[int, ...]) -> Float[Array, "rows *shape"]:
    """Unit normal noise of evaluation i for each row: the same random bits in any batch, mesh and platform.

    Threefry of the row's key and the counter (number of the element, i). (`jax.random.normal` with a key for each row
    takes the compiler four times as long.)
    """
    keys, count = jnp.asarray(keys), math.prod(shape)
    element = jnp.broadcast_to(jnp.arange(count, dtype=jnp.uint32), (len(keys), count))
    first, second = (jnp.broadcast_to(keys[:, n, None], element.shape) for n in (0, 1))
    bits, _ = threefry2x32_p.bind(first, second, element, jnp.full_like(element, i))
    uniform = ((bits >> 9).astype(jnp.float32) + 0.5) * 2.0**-22 - 1  # inside (−1, 1)
    return (math.sqrt(2) * jax.lax.erf_inv(uniform)).reshape(-1, *shape)


@functools.partial(jax.jit, static_argnames=("eps_fn", "use_fusers", "sharding"), donate_argnames="state")
def denoise(
    eps_fn: EpsFn,
    params: Any,
    state: DenoiseState,
    conditions: Any,
    evaluations: Evaluations,
    *,
    use_fusers: bool,
    inpaint: Inpaint | None = None,
    sharding: NamedSharding | None = None,
) -> DenoiseState:
    """Runs evaluations of a solver on every row, in one compiled loop.

    The program depends only on shapes, `eps_fn`, `use_fusers`, `sharding`, and whether `inpaint` and `reuse` are given.

    Args:
        eps_fn: the UNet, see the top of the file.
        params: its parameters.
        state: donated.
        conditions: tree of [rows, G, …]; G = 2 with guidance (conditional, negative), 1 without.
        evaluations: which ones to run.
        use_fusers: False passes alpha=None to `eps_fn`, which leaves the fusers out of the program.
        inpaint: region to keep.
        sharding: how the rows axis is split over a mesh.
    """
    run = functools.partial(_denoise_part, eps_fn, use_fusers)
    evaluations = jax.tree.map(jnp.asarray, evaluations)
    return on_each_device(run, sharding, whole=(0, 3))(params, state, conditions, evaluations, inpaint)


def _denoise_part(
    eps_fn: EpsFn,
    use_fusers: bool,
    params: Any,
    state: DenoiseState,
    conditions: Any,
    evaluations: Evaluations,
    inpaint: Inpaint | None,
) -> DenoiseState:
    """`denoise` on the rows of one device."""
    coefficients, start, stop, scale, reuse = evaluations
    groups = jax.tree.leaves(conditions)[0].shape[1]
    flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), conditions)

    def inputs(c: Coefficients, x: Array) -> tuple:
        """Inputs of `eps_fn`: each row once per group."""
        latents = jnp.repeat(x, groups, axis=0)
        return latents, jnp.broadcast_to(c.timestep, latents.shape[:1]), flat, c.alpha if use_fusers else None

    def evaluate(i: Array, carry: tuple[DenoiseState, Array | None]) -> tuple[DenoiseState, Array | None]:
        state, deep = carry
        c = _entry(coefficients, i)
        x = state.latents if inpaint is None else _keep_known(c, state.latents, inpaint)
        if reuse is None:
            eps = eps_fn(params, *inputs(c, x))
        else:
            fresh = (i - start) % reuse == 0
            deep = jax.lax.cond(fresh, lambda: eps_fn.deep(params, *inputs(c, x)), lambda: deep)
            eps = eps_fn.finish(params, *inputs(c, x), deep)
        eps = _guide(eps.astype(jnp.float32).reshape(-1, groups, *x.shape[1:]), scale)
        x, anchor, history = update(c, x, state.anchor, state.history, eps)
        return DenoiseState(_add_noise(c, x, state.keys, i), anchor, history, state.keys), deep

    deep = None
    if reuse is not None:  # zeros of the right shape: the first evaluation replaces them
        shape = jax.eval_shape(eps_fn.deep, params, *inputs(_entry(coefficients, 0), state.latents))
        deep = jnp.zeros(shape.shape, shape.dtype)
    return jax.lax.fori_loop(start, stop, evaluate, (state, deep))[0]


def _entry(coefficients: Coefficients, i: Array | int) -> Coefficients:
    return jax.tree.map(lambda column: column[i], coefficients)


def _keep_known(c: Coefficients, x: Float[Array, "rows h w c"], inpaint: Inpaint) -> Float[Array, "rows h w c"]:
    """Sets the region to keep to the known image, noised to the step."""
    known = c.signal * inpaint.latents + c.sigma * inpaint.noise
    keep = jnp.where(c.blend, inpaint.keep, 0.0)
    return keep * known + (1.0 - keep) * x


def _add_noise(
    c: Coefficients, x: Float[Array, "rows h w c"], keys: UInt32[Array, "rows 2"], i: Array
) -> Float[Array, "rows h w c"]:
    """Adds a stochastic solver's noise. It is drawn in a branch: the others take no time for it."""
    return jax.lax.cond(c.noise != 0, lambda: x + c.noise * step_noise(keys, i, x.shape[1:]), lambda: x)


def _guide(eps: Float[Array, "rows groups h w c"], scale: Float[Array, ""]) -> Float[Array, "rows h w c"]:
    """Classifier-free guidance (Ho and Salimans 2022), if there is an unconditional prediction."""
    return eps[:, 1] + scale * (eps[:, 0] - eps[:, 1]) if eps.shape[1] == 2 else eps[:, 0]
