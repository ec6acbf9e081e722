"""The denoising loop: any evaluations of any solver, on rows, in one compiled program.

The UNet comes in as a function

    eps_fn(params, latents [n h w c], timesteps [n], conditions, alpha) -> ε [n h w c]

that must be hashable and one object a model, since it is part of the compiled program's key. With
guidance n is rows · 2, each row's conditional and unconditional entry side by side: halves one after
the other would cost collectives when rows are sharded.

Conditions are a dict of groups, each a tree of arrays. All leaves have one leading axis of unique
entries, which rows point into. The group `grounding` is what only the fusers read; it is left out
wherever they are off.

Where deep features are reused between evaluations (DeepCache; Ma et al. 2024), `eps_fn` has two parts besides:
`deep(params, latents, timesteps, conditions, alpha)`, and `finish`, which takes its result after those.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from instdiff_jax.diffusion.solvers import HISTORY, Coefficients, update
from instdiff_jax.parallel.rows import on_each_device

FUSER_GROUP = "grounding"

EpsFn = Callable[[Any, Array, Array, Any, Array | None], Array]


class DenoiseState(NamedTuple):
    """What a solver carries, float32, rows (or images) first; see solvers.py."""

    latents: Float[Array, "rows h w c"]
    anchor: Float[Array, "rows h w c"]
    history: Float[Array, "rows 3 h w c"]


class Inpaint(NamedTuple):
    """An image of which a region is kept. Before each step that region becomes the image, noised to the step.

    `keep` is 1 in the region to keep and 0 where to paint (the `mask` of the official sampler).
    """

    latents: Float[Array, "rows h w c"]
    keep: Float[Array, "rows h w 1"]
    noise: Float[Array, "rows h w c"]


def start_state(latents: Float[Array, "rows h w c"]) -> DenoiseState:
    """The state before a solver's first evaluation."""
    latents = jnp.asarray(latents, jnp.float32)
    history = jnp.zeros((latents.shape[0], HISTORY, *latents.shape[1:]), jnp.float32)
    return DenoiseState(latents, jnp.zeros_like(latents), history)


@functools.partial(jax.jit, static_argnames=("eps_fn", "use_fusers", "sharding"), donate_argnames="state")
def denoise(
    eps_fn: EpsFn,
    params: Any,
    state: DenoiseState,
    conditions: Any,
    coefficients: Coefficients,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    guidance_scale: Float[Array, ""] | float,
    *,
    use_fusers: bool,
    inpaint: Inpaint | None = None,
    sharding: NamedSharding | None = None,
    reuse: Int[Array, ""] | int | None = None,
) -> DenoiseState:
    """Runs evaluations start … stop−1 of a solver's table on every row, in one compiled loop.

    Only shapes, `eps_fn`, `use_fusers`, `sharding` and whether there are `inpaint` and `reuse` decide the program.

    Args:
        eps_fn: the UNet, see the top of the file.
        params: its parameters.
        state: donated.
        conditions: tree of [rows, G, …]; G = 2 with guidance (conditional, negative), 1 without.
        coefficients: the table's.
        start: first evaluation.
        stop: end of the evaluations.
        guidance_scale: g of ε = u + g·(c − u) (classifier-free guidance); not read where G = 1.
        use_fusers: False passes alpha=None to `eps_fn`, which leaves the fusers out of the program.
        inpaint: a region to keep.
        sharding: how the rows axis is split over a mesh.
        reuse: deep features are computed in every `reuse`-th evaluation from `start` on; None, in each.
    """

    def run(params, state, conditions, coefficients, start, stop, guidance_scale, reuse, inpaint):
        groups = jax.tree.leaves(conditions)[0].shape[1]
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), conditions)

        def predict(i, deep, *inputs):
            """ε and the deep features it was made of."""
            if reuse is None:
                return eps_fn(params, *inputs), deep
            fresh = (i - start) % reuse == 0
            deep = jax.lax.cond(fresh, lambda: eps_fn.deep(params, *inputs), lambda: deep)
            return eps_fn.finish(params, *inputs, deep), deep

        def evaluate(i, carry):
            state, deep = carry
            c = jax.tree.map(lambda column: column[i], coefficients)
            x = state.latents
            if inpaint is not None:
                known = c.signal * inpaint.latents + c.sigma * inpaint.noise
                keep = jnp.where(c.blend, inpaint.keep, 0.0)
                x = keep * known + (1.0 - keep) * x
            pairs = jnp.repeat(x, groups, axis=0)
            alpha = c.alpha if use_fusers else None
            eps, deep = predict(i, deep, pairs, jnp.broadcast_to(c.timestep, pairs.shape[:1]), flat, alpha)
            eps = eps.astype(jnp.float32).reshape(-1, groups, *x.shape[1:])
            if groups == 2:
                eps = eps[:, 1] + guidance_scale * (eps[:, 0] - eps[:, 1])
            else:
                eps = eps[:, 0]
            return DenoiseState(*update(c, x, state.anchor, state.history, eps)), deep

        deep = None
        if reuse is not None:  # replaced before it is read
            pairs = jnp.repeat(state.latents, groups, axis=0)
            times = jnp.broadcast_to(coefficients.timestep[0], pairs.shape[:1])
            inputs = params, pairs, times, flat, coefficients.alpha[0] if use_fusers else None
            shape = jax.eval_shape(eps_fn.deep, *inputs)
            deep = jnp.zeros(shape.shape, shape.dtype)
        return jax.lax.fori_loop(start, stop, evaluate, (state, deep))[0]

    numbers = jax.tree.map(jnp.asarray, (coefficients, start, stop, guidance_scale, reuse))
    return on_each_device(run, sharding, whole=(0, 3, 4, 5, 6, 7))(params, state, conditions, *numbers, inpaint)
