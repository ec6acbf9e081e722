"""Counts a function's floating-point operations from its jaxpr.

XLA's own count takes a loop's body once and ignores custom calls. Here matrix products and convolutions count two
operations per multiply-add. Everything else, a few percent, is ignored.
"""

import math
from collections import Counter
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

from instdiff_jax.analysis.modules import module_path


def count_flops(function: Callable, *args: Any, **kwargs: Any) -> int:
    """FLOPs of one call. The function is only traced: arguments may be `jax.ShapeDtypeStruct`s.

    A scan's body counts for each iteration. A while loop's body (a `fori_loop` with traced bounds) counts once:
    multiply by the number of iterations. Of a conditional's branches the most expensive counts.
    """
    return sum(count_flops_by_module(function, *args, **kwargs).values())


def count_flops_by_module(function: Callable, *args: Any, **kwargs: Any) -> dict[str, int]:
    """FLOPs of one call by the module that they belong to (`modules.module_path`), counted as in `count_flops`."""
    return dict(_count(jax.make_jaxpr(function)(*args, **kwargs).jaxpr, ""))


def _count(jaxpr: core.Jaxpr, scopes: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for equation in jaxpr.eqns:
        params = equation.params
        inside = f"{scopes}/{equation.source_info.name_stack}"
        if own := _own_flops(equation):
            total[module_path(inside)] += own
        elif equation.primitive.name == "cond":
            branches = [_count(branch.jaxpr, inside) for branch in params["branches"]]
            total.update(max(branches, key=lambda branch: branch.total()))
        elif equation.primitive.name == "scan":
            body = _count(params["jaxpr"].jaxpr, inside)
            total.update({path: params["length"] * flops for path, flops in body.items()})
        else:
            for value in params.values():
                for inner in value if isinstance(value, (list, tuple)) else (value,):
                    inner = getattr(inner, "jaxpr", inner)
                    if isinstance(inner, core.Jaxpr):
                        total.update(_count(inner, inside))
    return total


def _own_flops(equation: core.JaxprEqn) -> int:
    """FLOPs of a matrix product, a convolution or a kernel; 0 for anything else."""
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        lhs = equation.invars[0].aval.shape
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(lhs[axis] for axis in contract)
    if name == "conv_general_dilated":
        kernel, spec = equation.invars[1].aval.shape, params["dimension_numbers"].rhs_spec
        # The kernel's input axis is already per group.
        per_output = math.prod(kernel[axis] for axis in spec[1:])
        return 2 * math.prod(equation.outvars[0].aval.shape) * per_output
    if name == "ffi_call":
        return _cpu_kernel_flops(params["target_name"], equation)
    if name.startswith("dot_product_attention_"):
        # cuDNN's: two products forward; backward five, of which the first again.
        (b, n, h, d), m = equation.invars[0].aval.shape, equation.invars[1].aval.shape[1]
        return (10 if "bwd" in name else 4) * b * n * h * d * m
    if name == "pallas_call" and params["name"] in ("flash_forward", "flash_backward"):
        # `flash_tpu`'s: the same products. Region bits come before the arrays, which are [b, h, d, tokens].
        arrays = [variable.aval.shape for variable in equation.invars if len(variable.aval.shape) == 4]
        return (10 if params["name"] == "flash_backward" else 4) * math.prod(arrays[0]) * arrays[-1][3]
    return 0


def _cpu_kernel_flops(name: str, equation: core.JaxprEqn) -> int:
    """FLOPs of one of the CPU's own kernels."""
    shapes = [variable.aval.shape for variable in equation.invars]
    if name in ("instdiff_product", "instdiff_bf16_product"):
        # Every output takes the kernel's weights of one channel.
        return 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(shapes[1][:-1])
    if name == "instdiff_bf16_gradient":
        # And every weight all outputs of its channel.
        weights = equation.outvars[0].aval.shape
        return 2 * math.prod(shapes[1]) * math.prod(weights[:-1])
    if name in ("instdiff_flash_attention", "instdiff_bf16_attention", "instdiff_bf16_attention_gradient"):
        (b, n, h, d), m = shapes[0], shapes[1][1]
        return (10 if name.endswith("gradient") else 4) * b * n * h * d * m
    return 0
