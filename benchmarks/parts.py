"""Time of our UNet by kind of layer: records every layer and its shapes, and times each one alone."""

import functools
from collections import Counter
from collections.abc import Callable
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.processes import seconds
from instdiff_jax.models.attention import attention
from instdiff_jax.models.layers import GroupNorm, LayerNorm
from instdiff_jax.models.scaleu import ScaleU

KINDS = {
    nn.Conv: "convolutions",
    nn.Dense: "projections",
    GroupNorm: "norms",
    LayerNorm: "norms",
    ScaleU: "ScaleU",
}


def record_layers(call: Callable[[], Any]) -> Counter:
    """Traces a call and counts its layers, by (kind, module without parent or None, shapes and dtypes)."""
    found: Counter = Counter()

    def shapes(args: tuple) -> tuple:
        return tuple((leaf.shape, jnp.dtype(leaf.dtype)) for leaf in args)

    def layer(run, args, options, context):
        kind = next((kind for made, kind in KINDS.items() if isinstance(context.module, made)), None)
        if kind is not None and context.method_name == "__call__":
            found[kind, context.module.clone(parent=None, name=None), shapes(args)] += 1
        return run(*args, **options)

    def attend(q, k, v, *args, **options):
        found["attention", None, shapes((q, k, v))] += 1
        return attention(q, k, v, *args, **options)

    with (
        nn.intercept_methods(layer),
        mock.patch("instdiff_jax.models.attention.attention", attend),
        mock.patch("instdiff_jax.models.layers.feeds_in_parts", lambda shape: False),  # a loop's layers count once
    ):
        jax.eval_shape(call)
    return found


def time_layers(layers: Counter, repeats: int = 3) -> dict[str, float]:
    """Seconds by kind of layer: every distinct layer is compiled and run alone, and weighted by its count."""
    taken: dict[str, float] = {}
    for (kind, module, shapes), count in layers.items():
        args = [jnp.full(shape, 0.1, dtype) for shape, dtype in shapes]
        if module is None:
            run = functools.partial(jax.jit(attention), *args)
        else:
            variables = jax.jit(module.init)(jax.random.key(0), *args)
            run = functools.partial(jax.jit(module.apply), variables, *args)
        jax.block_until_ready(run())
        best = min(seconds(lambda run=run: jax.block_until_ready(run())) for _ in range(repeats))
        taken[kind] = taken.get(kind, 0.0) + count * best
    return taken
