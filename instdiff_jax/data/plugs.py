"""Opens what a flag names: a function of the user's, or a model of the transformers library. Nothing is downloaded."""

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from typing import Any

from instdiff_jax.errors import InputError


def import_plug(flag: str, name: str) -> Any:
    """What `python:MODULE:FUNCTION` names: a function, or an object with methods."""
    module, _, function = name.removeprefix("python:").partition(":")
    if not module or not function:
        raise InputError(f"{flag}: expected python:MODULE:FUNCTION, got {name!r}")
    if os.getcwd() not in sys.path:  # it may be a module of the working folder
        sys.path.append(os.getcwd())
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise InputError(f"{flag}: {name}: cannot be imported: {error}") from error


def require_transformers(flag: str) -> Any:
    """The library; InputError where it or PyTorch is not installed."""
    try:
        import torch  # noqa: F401
        import transformers
    except ImportError as error:
        raise InputError(f"{flag}: expected PyTorch and transformers to be installed ({error})") from error
    return transformers


@contextlib.contextmanager
def loading_model(flag: str, name: str) -> Iterator[None]:
    """Turns any error of loading a model into one line."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # safetensors raises its own class for a broken file
        reason = str(error).split("\n")[0][:200]
        raise InputError(f"{flag}: {name}: cannot be loaded from this machine: {reason}") from error
