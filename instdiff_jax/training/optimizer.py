"""AdamW, the learning rate schedule and the EMA, as in the paper's training; and Muon, for small models."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from instdiff_jax.training.muon import is_matrix, orthogonal
from instdiff_jax.training.settings import OptimizerSettings


class OptimizerState(NamedTuple):
    """The optimizer's state. Every tree has the structure of the trainable parameters, in float32.

    `updates` counts the updates; skipped steps do not count. `nu` stays zero where Muon updates a parameter.
    """

    updates: Int[Array, ""]
    mu: Any
    nu: Any
    ema: Any


def init_optimizer(params: Any) -> OptimizerState:
    """The initial state: the moments are zero, the average is a copy of the parameters."""
    return OptimizerState(
        updates=jnp.zeros((), jnp.int32),
        mu=jax.tree.map(jnp.zeros_like, params),
        nu=jax.tree.map(jnp.zeros_like, params),
        # A copy: the step donates its buffers, and a buffer can be donated only once.
        ema=jax.tree.map(jnp.copy, params),
    )


def learning_rate(updates: Int[Array, ""], settings: OptimizerSettings, steps: int) -> Float[Array, ""]:
    """Learning rate after `updates` updates: linear warm-up from 0, then constant or a half cosine to 0.

    As transformers' get_constant_schedule_with_warmup and get_cosine_schedule_with_warmup, used by the official code.
    """
    count = updates.astype(jnp.float32)
    factor = jnp.minimum(count / max(1, settings.warmup_steps), 1.0)
    if settings.schedule == "cosine":
        progress = (count - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        factor = factor * 0.5 * (1 + jnp.cos(math.pi * jnp.clip(progress, 0.0, 1.0)))
    return settings.learning_rate * factor


def global_norm(tree: Any) -> Float[Array, ""]:
    """The L2 norm over all leaves of a tree, in float32."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(jnp.float32))) for leaf in jax.tree.leaves(tree)))


def apply_gradients(
    params: Any,
    grads: Any,
    state: OptimizerState,
    settings: OptimizerSettings,
    rate: Float[Array, ""],
    norm: Float[Array, ""],
    take: Bool[Array, ""],
    mesh: Mesh | None = None,
) -> tuple[Any, OptimizerState]:
    """Updates parameters, moments and average.

    Loshchilov and Hutter 2019, algorithm 2. As in PyTorch, the rate multiplies the decay and ε is outside the root.
    With the settings' name "muon", matrices (`is_matrix`) move by their orthogonalised momentum instead (`orthogonal`).

    Args:
        rate: learning rate of this update.
        norm: global norm of `grads`.
        take: False returns everything unchanged.
        mesh: the devices that share Muon's work.
    """
    count = (state.updates + 1).astype(jnp.float32)
    # 1 − βᵗ by expm1: in the first steps the plain difference loses half of float32's digits.
    bias1, bias2 = (-jnp.expm1(count * math.log(beta)) if beta else 1.0 for beta in (settings.beta1, settings.beta2))
    scale = jnp.minimum(1.0, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm else 1.0

    grads = jax.tree.map(lambda g: g.astype(jnp.float32) * scale, grads)
    muon = _muon(params, grads, state.mu, settings.momentum, mesh) if settings.name == "muon" else {}

    def update(path, p, g, mu, nu, ema):
        if path in muon:
            new_mu, step, new_nu = *muon[path], nu
        else:
            new_mu = settings.beta1 * mu + (1 - settings.beta1) * g
            new_nu = settings.beta2 * nu + (1 - settings.beta2) * jnp.square(g)
            step = (new_mu / bias1) / (jnp.sqrt(new_nu / bias2) + settings.eps)
        new_p = p - rate * (step + settings.weight_decay * p)
        # This form has the rounding error of the difference, not of the product.
        new_ema = ema + (1 - settings.ema_decay) * (new_p - ema)
        # A select instead of a branch: it fuses with the reads and writes, and costs nothing beside them.
        news, olds = (new_p, new_mu, new_nu, new_ema), (p, mu, nu, ema)
        return tuple(jnp.where(take, new, old) for new, old in zip(news, olds, strict=True))

    updated = jax.tree_util.tree_map_with_path(update, params, grads, state.mu, state.nu, state.ema)
    outer, inner = jax.tree.structure(params), jax.tree.structure((0, 0, 0, 0))
    params, mu, nu, ema = jax.tree.transpose(outer, inner, updated)
    return params, OptimizerState(state.updates + take.astype(jnp.int32), mu, nu, ema)


def _muon(params: Any, grads: Any, mu: Any, beta: float, mesh: Mesh | None) -> dict[tuple, tuple[Array, Array]]:
    """The momentum and the step of every matrix, by its path."""
    leaves = zip(jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grads), jax.tree.leaves(mu), strict=True)
    found = {path: (beta * m + (1 - beta) * g, g) for (path, p), g, m in leaves if is_matrix(path, p)}
    steps = orthogonal([beta * m + (1 - beta) * g for m, g in found.values()], mesh)
    return {path: (m, step) for (path, (m, _)), step in zip(found.items(), steps, strict=True)}
