"""Shapes of a model's parameters, as its modules make them; no memory is used."""

import functools
from collections.abc import Collection
from typing import Any

import jax

from instdiff_jax.config import ModelConfig
from instdiff_jax.models.networks import Networks, init_network, make_networks
from instdiff_jax.tree import flatten, unflatten

# What InstanceDiffusion adds to Stable Diffusion 1.5; "trunk" is the ConvNeXt inside UniFusion, "unifusion" the rest.
ADAPTERS = ("fusers", "scaleu", "unifusion", "trunk")

Path = tuple[str, ...]


def parameter_group(path: Path) -> str:
    """What a parameter belongs to: "base" or one of ADAPTERS."""
    if path[0] == "unifusion":
        return "trunk" if path[1] == "trunk" else "unifusion"
    if path[0] == "unet" and "fuser" in path:
        return "fusers"
    if path[0] == "unet" and path[1].startswith("scaleu_"):
        return "scaleu"
    return "base"


def parameter_shapes(
    config: ModelConfig, absent: Collection[str] = (), parts: Collection[str] = Networks._fields
) -> dict[str, Any]:
    """A model's parameter tree with a shape (a tuple) for every leaf.

    Args:
        config: the model's sizes.
        absent: those of ADAPTERS to leave out.
        parts: top-level keys of the tree.
    """
    shapes = {path: shape for part in parts for path, shape in _shapes(part, config).items()}
    return unflatten({path: shape for path, shape in shapes.items() if parameter_group(path) not in absent})


@functools.lru_cache(maxsize=32)
def _shapes(part: str, config: ModelConfig) -> dict[Path, tuple[int, ...]]:
    """Shapes by path; tracing the full UNet takes seconds."""
    networks = make_networks(config)
    tree = jax.eval_shape(lambda: init_network(networks, part, config, jax.random.key(0)))
    return {path: leaf.shape for path, leaf in flatten({part: tree}).items()}
