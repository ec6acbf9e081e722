"""Matrix products of 8-bit numbers, integers or floats: activations and weights are rounded, sums are not.

    y = s_x · s_w · Σ_i round(x_i / s_x) · round(w_i / s_w),   s = max|·| / M

Each token has its own s_x, taken anew in every call, and each output channel its own s_w. int8 rounds to whole numbers
up to M = 127 (as in LLM.int8, Dettmers et al. 2022, without its exceptions); fp8 to float8_e4m3fn, up to M = 448
(Micikevicius et al. 2022). The bias is added in the output's type.

Axes: n tokens, c channels in, f channels out.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from instdiff_jax.models.layers import platform

# The largest number of each type.
MOST = {"int8": 127.0, "fp8": 448.0}
_LEAST = 1e-30  # for a token of zeros; a scale may not become 0


def products(kind: str) -> Callable[..., Any]:
    """For `nn.intercept_methods`: every `nn.Dense` in the call takes its product in 8 bits, `kind` "int8" or "fp8"."""

    def intercept(run: Callable[..., Any], args: tuple, options: dict, context: nn.module.InterceptorContext) -> Any:
        layer = context.module
        if not isinstance(layer, nn.Dense) or context.method_name != "__call__":
            return run(*args, **options)
        params = layer.variables["params"]
        y = product(args[0], params["kernel"], kind).astype(layer.dtype or args[0].dtype)
        return y + params["bias"].astype(y.dtype) if layer.use_bias else y

    return intercept


def product(x: Float[Array, "*n c"], weights: Float[Array, "c f"], kind: str) -> Float[Array, "*n f"]:
    """x·weights in float32, by 8-bit numbers."""
    (x, x_scale), (weights, w_scale) = _rounded(x, -1, kind), _rounded(weights, 0, kind)
    if platform() == "cpu":
        # XLA has no fast 8-bit product there. In float32 products are exact, and sums of integers below 2²⁴ too.
        sums = x.astype(jnp.float32) @ weights.astype(jnp.float32)
    else:
        whole = jnp.int32 if kind == "int8" else jnp.float32
        sums = jnp.matmul(x, weights, preferred_element_type=whole).astype(jnp.float32)
    return sums * x_scale * w_scale


def _rounded(x: Array, axis: int, kind: str) -> tuple[Array, Array]:
    """The 8-bit numbers, and their scale."""
    x = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.abs(x).max(axis, keepdims=True), _LEAST) / MOST[kind]
    if kind == "int8":
        return jnp.round(x / scale).astype(jnp.int8), scale
    # Beyond the largest, float8_e4m3fn has only NaN; rounding of x / scale may pass it by a unit.
    return jnp.clip(x / scale, -MOST[kind], MOST[kind]).astype(jnp.float8_e4m3fn), scale
