"""Matrix products of 8-bit integers: activations and weights are rounded, sums are whole numbers.

    y = s_x · s_w · Σ_i round(x_i / s_x) · round(w_i / s_w),   s = max|·| / 127

Each token has its own s_x, taken anew in every call, and each output channel its own s_w (as in LLM.int8, Dettmers et
al. 2022, without its exceptions). The bias is added in the output's type.

Axes: n tokens, c channels in, f channels out.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.layers import platform

_MOST = 127
_LEAST = 1e-30  # for a token of zeros; a scale may not become 0


def products(run: Callable[..., Any], args: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
    """For `nn.intercept_methods`: every `nn.Dense` in the call takes its product in 8 bits."""
    layer = context.module
    if type(layer) is not nn.Dense or context.method_name != "__call__":
        return run(*args, **options)
    params = layer.variables["params"]
    y = product(args[0], params["kernel"]).astype(layer.dtype or args[0].dtype)
    return y + params["bias"].astype(y.dtype) if layer.use_bias else y


def product(x: Float[Array, "*n c"], weights: Float[Array, "c f"]) -> Float[Array, "*n f"]:
    """x·weights in float32, by 8-bit integers."""
    (x, x_scale), (weights, w_scale) = _rounded(x, axis=-1), _rounded(weights, axis=0)
    if platform() == "cpu":
        # XLA has no fast integer product there. Whole numbers below 2²⁴ are exact in float32, larger sums to 2⁻²⁴.
        sums = x @ weights
    else:
        whole = x.astype(jnp.int8), weights.astype(jnp.int8)
        sums = jnp.matmul(*whole, preferred_element_type=jnp.int32).astype(jnp.float32)
    return sums * x_scale * w_scale


def _rounded(x: Array, axis: int) -> tuple[Array, Array]:
    """Whole numbers from −127 to 127, as float32, and their scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), _LEAST) / _MOST
    return jnp.round(x / scale), scale
