"""Checks shapes and types of arrays in every signature of instdiff_jax, in a test run with this flag:

    --jaxtyping-packages=instdiff_jax,shapes_check.check

jaxtyping's import hook puts `check` on every function. Other annotations are left to
mypy: beartype cannot check some of them (`Self`, protocols), and Linen modules take several forms of a dtype. Processes
that a test starts are not checked.
"""

import functools
import operator
import types
from typing import Any, Union, get_args, get_origin

import jax
import numpy as np
from beartype import beartype
from jaxtyping import AbstractArray

# These check what they are given and raise InputError, which tests ask for.
CHECK_THEMSELVES = (
    "Instance.__init__",
    "CompactMask.__set__",
    "Pipeline.__call__",
    "Pipeline.stream",
    "SamplingOptions.__init__",
    "fit_gaussian",
)


def is_array(hint) -> bool:
    """Whether a jaxtyping array is in the hint, for example in `Float[Array, "n d"] | None`."""
    return (isinstance(hint, type) and issubclass(hint, AbstractArray)) or any(map(is_array, get_args(hint)))


def widen(hint):
    """The hint with NumPy arrays allowed for jax's, as jax's own functions do."""
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        return hint.dtype[jax.Array | np.ndarray, hint.dim_str] if hint.array_type is jax.Array else hint
    if not is_array(hint):
        return hint
    origin, args = get_origin(hint), tuple(map(widen, get_args(hint)))
    return functools.reduce(operator.or_, args) if origin in (Union, types.UnionType) else origin[args]


def check(function):
    """The function with its array arguments and results checked."""
    hints = getattr(function, "__annotations__", {})
    if function.__qualname__ in CHECK_THEMSELVES or not any(map(is_array, hints.values())):
        return function
    function.__annotations__ = {name: widen(hint) if is_array(hint) else Any for name, hint in hints.items()}
    return beartype(function)
