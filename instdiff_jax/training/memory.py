"""What a training step needs of a device's memory: the compiler's own count, or what shapes tell."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from instdiff_jax.training.state import Params, ShardingPlan, TrainState

_GB = 1e9


class StepMemory(NamedTuple):
    """Bytes of one device.

    Attributes:
        state: trainable parameters, their averages and moments.
        frozen: frozen parameters.
        batch: a batch.
        rest: activations and gradients; of shapes only the gradients are known.
        compiled: whether the compiler counted `rest`.
        limit: what the device has; None if it does not say.
    """

    state: int
    frozen: int
    batch: int
    rest: int
    compiled: bool
    limit: int | None

    @property
    def total(self) -> int:
        return self.state + self.frozen + self.batch + self.rest

    def __str__(self) -> str:
        """In one line, with where the numbers come from."""
        parts = f"state {self.state / _GB:.2f}, frozen {self.frozen / _GB:.2f}, batch {self.batch / _GB:.2f}"
        if self.compiled:
            rest = f"activations and gradients {self.rest / _GB:.2f}; from the compiled step"
        else:
            rest = f"gradients {self.rest / _GB:.2f}; an estimate from shapes without activations"
        has = "" if self.limit is None else f"; the device has {self.limit / _GB:.2f}"
        return f"memory of a step on a device: {self.total / _GB:.2f} GB ({parts}, {rest}{has})"


def count_shapes(state: TrainState, frozen: Params, batch: Any) -> StepMemory:
    """The least that a step needs, from the shapes and shardings of its inputs (arrays or ShapeDtypeStructs)."""
    counts = [sum(map(_local_bytes, jax.tree.leaves(tree))) for tree in (state, frozen, batch, state.params)]
    return StepMemory(*counts, compiled=False, limit=device_limit())


def compile_measured(step: Callable, state: TrainState, frozen: Params, batch: Any) -> tuple[Callable, StepMemory]:
    """Compiles a step for these inputs, and asks the compiler what it needs.

    Args:
        step: a jitted training step.
        state, frozen, batch: its first inputs.

    Returns:
        The compiled step, and its memory; counted from shapes where the backend does not say.
    """
    compiled, memory = step.lower(state, frozen, batch).compile(), count_shapes(state, frozen, batch)
    stats = compiled.memory_analysis()
    if stats is None or not stats.temp_size_in_bytes:
        return compiled, memory
    return compiled, memory._replace(rest=int(stats.temp_size_in_bytes), compiled=True)


def plan_memory(plan: ShardingPlan, batch: Mapping[str, Any]) -> StepMemory:
    """`count_shapes` of a run that does not exist yet."""
    return count_shapes(plan.state_shapes(), plan.frozen_shapes(), batch)


def device_limit() -> int | None:
    """Bytes that jax may use on the first device; None if it does not say."""
    stats = jax.local_devices()[0].memory_stats()
    return stats.get("bytes_limit") if stats else None


def _local_bytes(leaf: Any) -> int:
    """Of one device's part of an array."""
    sharding = getattr(leaf, "sharding", None)
    shape = leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)
    return math.prod(shape) * leaf.dtype.itemsize
