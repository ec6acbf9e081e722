"""AdamW, the learning rate schedule and the EMA, as in the paper's training; and Muon, for small models."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

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


def is_matrix(path: tuple, leaf: Array) -> bool:
    """Whether Muon updates a parameter: kernels of dense layers and of convolutions over all channels.

    A depthwise convolution has one input channel, so its kernel maps nothing to a space of several dimensions.
    """
    return path[-1].key == "kernel" and leaf.ndim >= 2 and leaf.shape[-2] > 1


# Coefficients of the quintic iteration (Jordan et al. 2024, "Muon"), for singular values in (0, 1].
_QUINTIC = 3.4445, -4.7750, 2.0315


def orthogonal(update: Float[Array, "*k i o"], iterations: int = 5) -> Float[Array, "*k i o"]:
    """Nearly U·Vᵀ of the update U·S·Vᵀ, as a matrix of all inputs and the outputs, with AdamW's size of a step.

    Jordan et al. 2024, "Muon"; the factor 0.2·sqrt(longer side) is that of Liu et al. 2025, "Muon is scalable", eq. 4:
    the mean square is about that of AdamW's updates, so both take one learning rate.
    """
    matrix = update.reshape(-1, update.shape[-1])
    tall = matrix.shape[0] > matrix.shape[1]
    # The iteration on the smaller side's Gram matrix: the same polynomial, for a third of the products.
    gram = matrix.T @ matrix if tall else matrix @ matrix.T
    norm = jnp.trace(gram) + 1e-12
    gram, identity, factor = gram / norm, jnp.eye(len(gram)), None
    a, b, c = _QUINTIC
    for _ in range(iterations):
        step = a * identity + b * gram + c * gram @ gram
        factor = step if factor is None else step @ factor
        gram = step @ gram @ step
    x = (matrix @ factor if tall else factor @ matrix) * jax.lax.rsqrt(norm)
    return (0.2 * math.sqrt(max(matrix.shape))) * x.reshape(update.shape)


def apply_gradients(
    params: Any,
    grads: Any,
    state: OptimizerState,
    settings: OptimizerSettings,
    rate: Float[Array, ""],
    norm: Float[Array, ""],
    take: Bool[Array, ""],
) -> tuple[Any, OptimizerState]:
    """Updates parameters, moments and average.

    Loshchilov and Hutter 2019, algorithm 2. As in PyTorch, the rate multiplies the decay and ε is outside the root.
    With the settings' name "muon", matrices (`is_matrix`) move by their orthogonalised momentum instead (`orthogonal`).

    Args:
        rate: learning rate of this update.
        norm: global norm of `grads`.
        take: False returns everything unchanged.
    """
    count = (state.updates + 1).astype(jnp.float32)
    # 1 − βᵗ by expm1: in the first steps the plain difference loses half of float32's digits.
    bias1, bias2 = (-jnp.expm1(count * math.log(beta)) if beta else 1.0 for beta in (settings.beta1, settings.beta2))
    scale = jnp.minimum(1.0, settings.clip_norm / (norm + 1e-6)) if settings.clip_norm else 1.0

    def update(path, p, g, mu, nu, ema):
        g = g.astype(jnp.float32) * scale
        if settings.name == "muon" and is_matrix(path, p):
            new_nu, new_mu = nu, settings.momentum * mu + (1 - settings.momentum) * g
            step = orthogonal(settings.momentum * new_mu + (1 - settings.momentum) * g)
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
