"""The training state: which parameters exist, which of them train, and where they come from.

Parameters are plain nested dicts. What trains and what is frozen are two such dicts that share no leaf, so gradients,
moments and averages exist for the first alone.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.models import networks
from instdiff_jax.models.networks import Networks
from instdiff_jax.parallel.mesh import REPLICATED, ParallelSettings, match_rule, parameter_specs, shardings
from instdiff_jax.training.optimizer import OptimizerState, init_optimizer
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.tree import flatten, unflatten

Params = dict[str, Any]


class TrainState(NamedTuple):
    """All that a step changes.

    `step` counts batches, taken or skipped: it is the loader's position. `skipped` counts the batches whose loss or
    gradient was not finite, `skipped_in_row` those since the last update.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    params: Params
    optimizer: OptimizerState


def make_networks(model: ModelConfig, settings: TrainSettings) -> Networks:
    """The networks in the run's compute dtype."""
    return networks.make_networks(model, jnp.dtype(settings.dtype), remat=settings.remat == "blocks")


# The networks that a task's loss reaches.
_REACHED = {
    "diffusion": ("unet", "unifusion", "text_encoder"),
    "autoencoder": ("autoencoder",),
    "text": ("text_encoder",),
}


def split_params(params: Mapping[str, Any], settings: TrainSettings) -> tuple[Params, Params]:
    """What trains and what is frozen.

    Raises:
        InputError: for a parameter that no rule of `train.trainable` covers, for a network that the task's loss does
            not reach, or where nothing trains.
    """
    trainable, frozen = {}, {}
    for path, leaf in flatten(params).items():
        name = "/".join(path)
        trains = match_rule(settings.trainable, name, "config.train.trainable") == "train"
        if trains and path[0] not in _REACHED[settings.task]:
            raise InputError(f"config.train.trainable: the {settings.task} task's loss does not train {name}")
        if trains and path[0] == "text_encoder" and settings.grounding:
            # The phrases were embedded before the run, with the text encoder as it was.
            raise InputError(f"config.train.trainable: {name} trains only where config.train.grounding is False")
        (trainable if trains else frozen)[path] = leaf
    if not trainable:
        raise InputError("config.train.trainable: expected at least one parameter that trains")
    return unflatten(trainable), unflatten(frozen)


def merge_params(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """One tree again from the two of `split_params`."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def frozen_dtype(shape: tuple[int, ...], settings: TrainSettings) -> jnp.dtype:
    """The compute dtype, but float32 for vectors and scalars: they are small, and norms want them exact."""
    return jnp.dtype(settings.dtype if len(shape) >= 2 else "float32")


class RunLayout(NamedTuple):
    """Shapes and places of a run's arrays: ShapeDtypeStructs and PartitionSpecs, no memory.

    `initial` makes a fresh parameter tree from a key.
    """

    params: Params
    trainable: Params
    frozen: Params
    trainable_specs: Params
    frozen_specs: Params
    mesh: Mesh
    initial: Callable[[jax.Array], Params]

    def state_shardings(self) -> TrainState:
        """A sharding for every leaf of the training state: moments and averages lie where their parameters lie."""
        scalar = NamedSharding(self.mesh, REPLICATED)
        tree = shardings(self.trainable_specs, self.mesh)
        return TrainState(scalar, scalar, scalar, tree, OptimizerState(scalar, tree, tree, tree))

    def frozen_shardings(self) -> Params:
        """A sharding for every frozen leaf."""
        return shardings(self.frozen_specs, self.mesh)

    def state_shapes(self) -> TrainState:
        """The training state's leaves as ShapeDtypeStructs with shardings: what a checkpoint restores into."""
        shapes = jax.eval_shape(init_state, self.trainable)
        return jax.tree.map(with_sharding, shapes, self.state_shardings())

    def frozen_shapes(self) -> Params:
        """The frozen leaves as ShapeDtypeStructs with shardings."""
        return jax.tree.map(with_sharding, self.frozen, self.frozen_shardings())


def with_sharding(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The same shape and dtype, placed."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def make_layout(model: ModelConfig, settings: TrainSettings, parallel: ParallelSettings, mesh: Mesh) -> RunLayout:
    """Works out every shape and place of a run, without memory.

    Raises:
        InputError: for a parameter that the rules for training or placing do not cover.
    """
    made = make_networks(model, settings)

    def initial(key: jax.Array) -> Params:
        return networks.init_params(made, model, key, settings.grounding)

    params = jax.eval_shape(initial, jax.eval_shape(lambda: jax.random.key(0)))
    trainable, frozen = split_params(params, settings)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, frozen_dtype(leaf.shape, settings)), frozen)
    # Trainable parameters always obey the rules; checking all of them here names an uncovered frozen one too.
    parameter_specs(params, parallel.rules, mesh)
    return RunLayout(
        params=params,
        trainable=trainable,
        frozen=frozen,
        trainable_specs=parameter_specs(trainable, parallel.rules, mesh),
        frozen_specs=parameter_specs(frozen, parallel.rules if parallel.frozen == "sharded" else None, mesh),
        mesh=mesh,
        initial=initial,
    )


def init_state(params: Params) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    # Three arrays, not one thrice: the step donates its buffers.
    return TrainState(zero, jnp.copy(zero), jnp.copy(zero), params, init_optimizer(params))


def fresh_params(layout: RunLayout, seed: int, paths: set[tuple[str, ...]]) -> tuple[Params, Params]:
    """Initialises the parameters at `paths`, each born where the layout puts it; no other copy ever exists.

    Returns:
        Those that train (float32) and those that are frozen (the compute dtype).
    """

    def initial(key: jax.Array) -> tuple[Params, Params]:
        params = flatten(layout.initial(key))
        halves = []
        for half in (layout.trainable, layout.frozen):
            leaves = {path: params[path].astype(leaf.dtype) for path, leaf in flatten(half).items() if path in paths}
            halves.append(unflatten(leaves))
        return tuple(halves)

    def chosen(specs: Params) -> Params:
        return unflatten({path: spec for path, spec in flatten(specs).items() if path in paths})

    places = (chosen(layout.trainable_specs), chosen(layout.frozen_specs))
    out = jax.tree.map(
        lambda spec: NamedSharding(layout.mesh, spec), places, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )
    return jax.jit(initial, out_shardings=out)(jax.random.key(seed))
