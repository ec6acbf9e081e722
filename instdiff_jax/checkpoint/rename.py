"""Renames PyTorch state dicts to our parameter tree and back.

The tables (tables.py) list every key. Each key is used exactly once; any other key is an error that names it.
Arrays are transposed as views: nothing is copied, and memory-mapped arrays stay on disk.
"""

import re
from collections.abc import Collection, Mapping
from typing import Any

import numpy as np

from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten, unflatten

# Keys that other programs store with the weights. None of them is a parameter.
IGNORED = {
    "model": (),
    "autoencoder": (r"loss\..*", r"model_ema\..*"),
    "text_encoder": (r"transformer\.text_model\.embeddings\.position_ids",),
}


def from_state_dict(
    part: str,
    state_dict: Mapping[str, np.ndarray],
    config: ModelConfig,
    absent: Collection[str] = (),
    source: str = "state dict",
) -> dict[str, Any]:
    """Renames one state dict of the released checkpoint to our tree. Leaves are views of its arrays.

    Args:
        part: one of PARTS.
        state_dict: arrays by key.
        config: the model's sizes.
        absent: those of `shapes.ADAPTERS` that the state dict lacks.
        source: the file, for errors.

    Returns:
        Our tree: {"unet": …, "unifusion": …}, {"autoencoder": …} or {"text_encoder": …}.

    Raises:
        InputError: with the keys that are missing, extra or of another shape.
    """
    table = rename_table(part, config, absent)
    shapes = {key: tuple(value.shape) for key, value in state_dict.items() if not is_ignored(part, key)}
    check_keys(shapes, {key: entry.torch_shape for key, entry in table.items()}, f"{source}: {part}")
    return unflatten({entry.path: entry.to_ours(state_dict[key]) for key, entry in table.items()})


def to_state_dict(
    part: str, params: Mapping[str, Any], config: ModelConfig, absent: Collection[str] = ()
) -> dict[str, np.ndarray]:
    """The inverse of `from_state_dict`. The arrays are views.

    Raises:
        InputError: with the parameters that are missing, extra or of another shape.
    """
    table = rename_table(part, config, absent)
    roots = {entry.path[0] for entry in table.values()}
    flat = flatten({root: params[root] for root in roots if root in params})
    shapes = {"/".join(path): tuple(np.shape(leaf)) for path, leaf in flat.items()}
    check_keys(shapes, {"/".join(entry.path): entry.shape for entry in table.values()}, f"parameters of {part}")
    return {key: entry.to_torch(np.asarray(flat[entry.path])) for key, entry in table.items()}


def is_ignored(part: str, key: str) -> bool:
    """Whether a key of a state dict is known not to be a parameter."""
    return any(re.fullmatch(pattern, key) for pattern in IGNORED[part])


def check_keys(found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Raises InputError, with the first few keys of each kind, unless both have the same keys and shapes."""
    missing = [key for key in expected if key not in found]
    extra = [key for key in found if key not in expected]
    shapes = [
        f"{key} (file {list(found[key])}, config {list(shape)})"
        for key, shape in expected.items()
        if key in found and found[key] != shape
    ]
    problems = [("of another shape", shapes), ("missing", missing), ("extra", extra)]
    texts = [f"{len(keys)} {kind}: {first_few(keys)}" for kind, keys in problems if keys]
    if texts:
        raise InputError(f"{where}: keys do not match the config's sizes; {'; '.join(texts)}")


def first_few(keys: list[str], count: int = 5) -> str:
    """The first keys of a list, for an error."""
    return ", ".join(keys[:count]) + (", …" if len(keys) > count else "")
