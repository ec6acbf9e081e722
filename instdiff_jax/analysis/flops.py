"""Counts a function's floating-point operations from its jaxpr.

XLA's own count takes a loop's body once and ignores custom calls. Here matrix products and convolutions count two
operations per multiply-add. Everything else, a few percent, is ignored.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call. The function is only traced: arguments may be `jax.ShapeDtypeStruct`s.

    A scan's body counts for each iteration. A while loop's body (a `fori_loop` with traced bounds) counts once:
    multiply by the number of iterations. Of a conditional's branches the most expensive counts.
    """
    return _count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr)


def _count(jaxpr: core.Jaxpr) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, params = equation.primitive.name, equation.params
        if name == "dot_general":
            (contract, _), _ = params["dimension_numbers"]
            lhs = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contract)
        elif name == "conv_general_dilated":
            kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
            # The kernel's input axis is already per group.
            per_output = math.prod(kernel[axis] for axis in spec[1:])
            total += 2 * math.prod(equation.outvars[0].aval.shape) * per_output
        elif name.startswith("dot_product_attention_"):
            # cuDNN's: two products forward; backward five, of which the first again.
            (b, n, h, d), m = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
            total += (10 if "bwd" in name else 4) * b * n * h * d * m
        elif name == "ffi_call" and params["target_name"] == "instdiff_flash_attention":
            (b, n, h, d), m = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
            total += 4 * b * n * h * d * m
        elif name == "pallas_call" and params["name"] in ("flash_forward", "flash_backward"):
            # `flash_tpu`'s: the same products. Region bits come before the arrays, which are [b, h, d, tokens].
            arrays = [variable.aval.shape for variable in equation.invars if len(variable.aval.shape) == 4]
            total += (10 if params["name"] == "flash_backward" else 4) * math.prod(arrays[0]) * arrays[-1][3]
        elif name == "cond":
            total += max(_count(branch.jaxpr) for branch in params["branches"])
        elif name == "scan":
            total += params["length"] * _count(params["jaxpr"].jaxpr)
        else:
            for value in params.values():
                for inner in value if isinstance(value, (list, tuple)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if isinstance(inner, core.Jaxpr):
                        total += _count(inner)
    return total
