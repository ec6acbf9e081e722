"""The training state: which parameters exist, which of them train, and how each array is sharded.

Parameters are plain nested dicts. Trainable and frozen parameters are two dicts with no leaf in common. Only trainable
parameters have gradients, moments and averages.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
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
    """Everything that a step changes.

    `step` counts all batches and is the loader's position. `skipped` counts the batches whose loss or gradient was not
    finite; `skipped_in_row` counts those since the last update.
    """

    step: Int[Array, ""]
    skipped: Int[Array, ""]
    skipped_in_row: Int[Array, ""]
    params: Params
    optimizer: OptimizerState


def make_networks(model: ModelConfig, settings: TrainSettings) -> Networks:
    """The networks in the run's compute dtype."""
    return networks.make_networks(model, jnp.dtype(settings.dtype), remat=settings.remat == "blocks")


# The networks that each task's loss depends on.
_REACHED = {
    "diffusion": ("unet", "unifusion", "text_encoder"),
    "autoencoder": ("autoencoder",),
    "text": ("text_encoder",),
}


def split_params(params: Mapping[str, Any], settings: TrainSettings) -> tuple[Params, Params]:
    """Splits a parameter tree into trainable and frozen parameters.

    Raises:
        InputError: if no rule of `train.trainable` covers a parameter, if the task's loss does not depend on a
            trainable network, or if nothing trains.
    """
    trainable, frozen = {}, {}
    for path, leaf in flatten(params).items():
        name = "/".join(path)
        trains = match_rule(settings.trainable, name, "config.train.trainable") == "train"
        if trains and path[0] not in _REACHED[settings.task]:
            raise InputError(f"config.train.trainable: the {settings.task} task's loss does not train {name}")
        if trains and path[0] == "text_encoder" and settings.grounding:
            # Phrases are embedded only once, before the run.
            raise InputError(f"config.train.trainable: {name} trains only where config.train.grounding is False")
        (trainable if trains else frozen)[path] = leaf
    if not trainable:
        raise InputError("config.train.trainable: expected at least one parameter that trains")
    return unflatten(trainable), unflatten(frozen)


def merge_params(trainable: Mapping[str, Any], frozen: Mapping[str, Any]) -> Params:
    """Joins the two trees of `split_params`."""
    return unflatten({**flatten(trainable), **flatten(frozen)})


def frozen_dtype(shape: tuple[int, ...], settings: TrainSettings) -> jnp.dtype:
    """The compute dtype for matrices and kernels; float32 for vectors and scalars, which are small and feed norms."""
    return jnp.dtype(settings.dtype if len(shape) >= 2 else "float32")


class ShardingPlan(NamedTuple):
    """Shape and sharding of every array of a run, as ShapeDtypeStructs and PartitionSpecs; holds no arrays.

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
        """A sharding for every leaf of the training state. Moments and averages are sharded like their parameters."""
        scalar = NamedSharding(self.mesh, REPLICATED)
        tree = shardings(self.trainable_specs, self.mesh)
        return TrainState(scalar, scalar, scalar, tree, OptimizerState(scalar, tree, tree, tree))

    def frozen_shardings(self) -> Params:
        """A sharding for every frozen leaf."""
        return shardings(self.frozen_specs, self.mesh)

    def state_shapes(self) -> TrainState:
        """The training state as ShapeDtypeStructs with shardings, for restoring a checkpoint."""
        shapes = jax.eval_shape(init_state, self.trainable)
        return jax.tree.map(with_sharding, shapes, self.state_shardings())

    def frozen_shapes(self) -> Params:
        """The frozen leaves as ShapeDtypeStructs with shardings."""
        return jax.tree.map(with_sharding, self.frozen, self.frozen_shardings())


def with_sharding(shape: jax.ShapeDtypeStruct, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    """The same shape and dtype with a sharding."""
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def make_sharding_plan(
    model: ModelConfig, settings: TrainSettings, parallel: ParallelSettings, mesh: Mesh
) -> ShardingPlan:
    """Computes the shape and sharding of a run's arrays; allocates nothing.

    Raises:
        InputError: if the rules for training or sharding do not cover a parameter.
    """
    initial = functools.partial(_init_params, make_networks(model, settings), model, settings)
    params = jax.eval_shape(initial, jax.eval_shape(lambda: jax.random.key(0)))
    trainable, frozen = split_params(params, settings)
    frozen = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, frozen_dtype(leaf.shape, settings)), frozen)
    # Also checks the rules for frozen parameters, which may go unused.
    parameter_specs(params, parallel.rules, mesh)
    return ShardingPlan(
        params=params,
        trainable=trainable,
        frozen=frozen,
        trainable_specs=parameter_specs(trainable, parallel.rules, mesh),
        frozen_specs=parameter_specs(frozen, parallel.rules if parallel.frozen == "sharded" else None, mesh),
        mesh=mesh,
        initial=initial,
    )


def _init_params(made: Networks, model: ModelConfig, settings: TrainSettings, key: jax.Array) -> Params:
    return networks.init_params(made, model, key, settings.grounding)


def init_state(params: Params) -> TrainState:
    """The state before the first step."""
    zero = jnp.zeros((), jnp.int32)
    # Three arrays: the step donates their buffers, and each can be donated once.
    return TrainState(zero, jnp.copy(zero), jnp.copy(zero), params, init_optimizer(params))


def fresh_params(plan: ShardingPlan, seed: int, paths: set[tuple[str, ...]]) -> tuple[Params, Params]:
    """Initialises the parameters at `paths`, sharded from the start: no unsharded copy ever exists.

    Returns:
        The trainable ones (float32) and the frozen ones (`frozen_dtype`).
    """
    halves = tuple(_at_paths(half, paths) for half in (plan.trainable, plan.frozen))
    specs = tuple(_at_paths(half, paths) for half in (plan.trainable_specs, plan.frozen_specs))
    initial = jax.jit(functools.partial(_initial, plan.initial, halves), out_shardings=shardings(specs, plan.mesh))
    return initial(jax.random.key(seed))


def _at_paths(tree: Params, paths: set[tuple[str, ...]]) -> Params:
    return unflatten({path: leaf for path, leaf in flatten(tree).items() if path in paths})


def _initial(init: Callable[[jax.Array], Params], halves: tuple[Params, ...], key: jax.Array) -> tuple[Params, ...]:
    """Fresh parameters in the structure and the dtypes of `halves`."""
    params = flatten(init(key))
    return tuple(
        unflatten({path: params[path].astype(leaf.dtype) for path, leaf in flatten(half).items()}) for half in halves
    )
