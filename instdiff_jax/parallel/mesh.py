"""Devices: starting on several hosts, the mesh, and how arrays are sharded over it.

The mesh has three axes. Batches are sharded over all. Parameters are sharded over `fsdp` according to the rules, and
replicated over `data` and `slice`. Slices are groups of chips that only the data-centre network (DCN) connects; of all
that a training step sends, only the sum of gradients crosses it.
"""

import dataclasses
import functools
import glob
import importlib.util
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instdiff_jax.config import Settings
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten, unflatten

SLICE, DATA, FSDP = AXES = "slice", "data", "fsdp"
BATCH = PartitionSpec(AXES)
REPLICATED = PartitionSpec()


@dataclasses.dataclass(frozen=True)
class ParallelSettings(Settings):
    """Sizes of the mesh, and the rules that shard parameters.

    Attributes:
        data, fsdp: devices of a slice along each axis; -1 uses all that are left.
        slices: TPU slices, or other groups of devices with slow links between them; -1 is as many as the TPU has.
        rules: ordered (regex over "/"-joined parameter paths, "fsdp" or "replicate"). The first full match decides; a
            parameter without a match is an error. "fsdp" splits the longest axis divisible by the mesh's fsdp size.
        frozen: "replicated" keeps a whole copy of the frozen parameters on every device; "sharded" follows `rules`.
    """

    data: int = -1
    fsdp: int = 1
    slices: int = -1
    rules: tuple[tuple[str, ...], ...] = ((r".*/(kernel|embedding)", "fsdp"), (r".*", "replicate"))
    frozen: str = "replicated"

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.parallel") -> "ParallelSettings":
        settings = super().from_dict(values, where)
        if settings.frozen not in ("replicated", "sharded"):
            raise InputError(f"{where}.frozen: expected replicated or sharded, got {settings.frozen!r}")
        for rule in settings.rules:
            if len(rule) != 2 or rule[1] not in ("fsdp", "replicate"):
                raise InputError(f"{where}.rules: expected pairs (regex, fsdp or replicate), got {rule!r}")
            check_pattern(rule[0], f"{where}.rules")
        return settings


def check_pattern(pattern: str, where: str) -> None:
    """Raises InputError if `pattern` is not a regular expression."""
    try:
        re.compile(pattern)
    except re.error as error:
        raise InputError(f"{where}: expected a regular expression, got {pattern!r} ({error})") from error


# When a process of a sampling job is done, it waits this many seconds for the others: a week.
PATIENCE = 7 * 24 * 3600


def initialize_distributed(patience: int = 300) -> None:
    """Connects this process to the others of its job; does nothing if there is only one.

    The environment defines a job: JAX_COORDINATOR_ADDRESS with JAX_NUM_PROCESSES and JAX_PROCESS_ID (any machine, CPU
    included), Slurm or Open MPI with more than one task, or a TPU host. Call before any use of a device.

    Args:
        patience: seconds that a process waits at its end for the others, which would die when the first one exits.
    """
    if jax.distributed.is_initialized():
        return
    env = os.environ
    if "JAX_COORDINATOR_ADDRESS" in env:
        try:
            count, index = int(env["JAX_NUM_PROCESSES"]), int(env["JAX_PROCESS_ID"])
        except (KeyError, ValueError) as error:
            message = "expected whole numbers in JAX_NUM_PROCESSES and JAX_PROCESS_ID"
            raise InputError(f"JAX_COORDINATOR_ADDRESS is set: {message} ({error})") from error
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(env["JAX_COORDINATOR_ADDRESS"], count, index, shutdown_timeout_seconds=patience)
    elif int(env.get("SLURM_NTASKS", 1)) > 1 or int(env.get("OMPI_COMM_WORLD_SIZE", 1)) > 1 or _is_tpu_host():
        jax.distributed.initialize(shutdown_timeout_seconds=patience)


def first_process_decides(act: Callable[[], Any]) -> None:
    """Calls `act` on the first process of a job. If it raises InputError there, so does this on all processes."""
    message = ""
    if jax.process_index() == 0:
        try:
            act()
        except InputError as error:
            message = str(error)
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        text = np.zeros(4096, np.uint8)
        sent = message.encode()[: text.size]
        text[: len(sent)] = list(sent)
        text = np.asarray(multihost_utils.broadcast_one_to_all(text))
        message = text.tobytes().rstrip(b"\0").decode(errors="ignore")
    if message:
        raise InputError(message)


def _is_tpu_host() -> bool:
    if os.environ.get("JAX_PLATFORMS", "tpu").split(",")[0] != "tpu" or importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def make_mesh(settings: ParallelSettings, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Makes the mesh over all devices of the job.

    Raises:
        InputError: if the product of the sizes is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    found = len({_slice_of(device) for device in devices if device.platform == "tpu"})
    slices = max(found, 1) if settings.slices == -1 else settings.slices
    if slices < 1 or len(devices) % slices or (found > 1 and slices != found):
        expected = f"-1 or {found}, the TPU's slices" if found > 1 else f"a divisor of the {len(devices)} devices"
        raise InputError(f"config.parallel.slices: expected {expected}, got {settings.slices}")
    each = len(devices) // slices
    sizes = [settings.data, settings.fsdp]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) == 1 and known > 0 and each % known == 0:
        sizes[sizes.index(-1)] = each // known
    if min(sizes) < 1 or math.prod(sizes) != each:
        raise InputError(
            f"config.parallel: a mesh of data {settings.data} and fsdp {settings.fsdp} does not match "
            f"the {each} devices{' of a slice' * (slices > 1)}; change --config.parallel.data and "
            f"--config.parallel.fsdp so that their product is {each}; one of them may be -1"
        )
    return Mesh(arrange([slices, *sizes], devices), AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """The devices as an array of `sizes` (slices first), neighbours beside each other where the links allow it."""
    slices = len({_slice_of(device) for device in devices})
    try:
        if slices == sizes[0] > 1:
            return mesh_utils.create_hybrid_device_mesh(
                (1, *sizes[1:]), (sizes[0], 1, 1), devices, allow_split_physical_axes=True
            )
        if sizes[0] == 1:
            return jax.make_mesh(sizes, AXES, devices=devices).devices
    except (NotImplementedError, ValueError):
        pass  # The sizes do not match the links between the chips. Any order works, but more slowly.
    return np.array(sorted(devices, key=_slice_of) if slices == sizes[0] else devices).reshape(sizes)


def _slice_of(device: Any) -> int:
    return getattr(device, "slice_index", None) or 0


def check_batch(batch_size: int, accumulate: int, mesh: Mesh) -> None:
    """Raises InputError unless the batch size is divisible by devices × accumulate."""
    if batch_size % (mesh.size * accumulate):
        raise InputError(
            f"config.train.batch_size: expected a multiple of {mesh.size * accumulate} "
            f"({mesh.size} devices, {accumulate} accumulated parts each), got {batch_size}"
        )


def match_rule(rules: Sequence[Sequence[str]], path: str, where: str) -> str:
    """The value of the first rule whose regex matches all of `path`.

    Raises:
        InputError: if no rule matches.
    """
    for pattern, value in rules:
        if re.fullmatch(pattern, path):
            return value
    raise InputError(f"{where}: no rule covers the parameter {path}")


def parameter_specs(shapes: Mapping[str, Any], rules: Sequence[Sequence[str]] | None, mesh: Mesh) -> dict[str, Any]:
    """A PartitionSpec for every leaf of a parameter tree.

    Args:
        shapes: nested dict whose leaves have a shape.
        rules: as in `ParallelSettings`; None replicates everything.
    """

    def spec(path: tuple[str, ...], shape: tuple[int, ...]) -> PartitionSpec:
        if rules is None or match_rule(rules, "/".join(path), "config.parallel.rules") == "replicate":
            return REPLICATED
        size = mesh.shape[FSDP]
        axes = [axis for axis, length in enumerate(shape) if length % size == 0]
        if size == 1 or not axes:
            return REPLICATED
        longest = max(axes, key=lambda axis: (shape[axis], axis))
        return PartitionSpec(*(FSDP if axis == longest else None for axis in range(longest + 1)))

    return unflatten({path: spec(path, leaf.shape) for path, leaf in flatten(shapes).items()})


def shardings(specs: Any, mesh: Mesh) -> Any:
    """The same tree with a sharding for every PartitionSpec."""
    return jax.tree.map(
        lambda spec: NamedSharding(mesh, spec), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec)
    )


def gather(tree: Any, specs: Any) -> Any:
    """Inside `shard_map`: gathers whole arrays from the devices' parts. Its gradient is summed and split."""

    def whole(leaf: jax.Array, spec: PartitionSpec) -> jax.Array:
        if FSDP not in spec:
            return leaf
        axis = list(spec).index(FSDP)
        if jax.default_backend() == "cpu" and jax.distributed.is_initialized():
            return _gather_whole(leaf, axis)
        return jax.lax.all_gather(leaf, FSDP, axis=axis, tiled=True)

    return jax.tree.map(whole, tree, specs)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_whole(leaf: jax.Array, axis: int) -> jax.Array:
    """`all_gather` whose gradient is a psum and a slice, instead of a reduce-scatter.

    Between processes on CPUs, reduce-scatter is gloo's. It sometimes adds data that its peer has overwritten: one
    gradient in some runs was wrong in the fourth digit (github.com/jax-ml/jax/issues/40830).
    """
    return jax.lax.all_gather(leaf, FSDP, axis=axis, tiled=True)


def _gather_forward(leaf: jax.Array, axis: int) -> tuple[jax.Array, None]:
    return _gather_whole(leaf, axis), None


def _gather_backward(axis: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    size = gradient.shape[axis] // jax.lax.axis_size(FSDP)
    return (jax.lax.dynamic_slice_in_dim(jax.lax.psum(gradient, FSDP), jax.lax.axis_index(FSDP) * size, size, axis),)


_gather_whole.defvjp(_gather_forward, _gather_backward)


def sum_gradients(tree: Any, specs: Any) -> Any:
    """Inside `shard_map`: sums gradients over the axes that `gather` has not summed."""
    return jax.tree.map(lambda leaf, spec: jax.lax.psum(leaf, (SLICE, DATA) if FSDP in spec else AXES), tree, specs)


def put_batch(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays, split over the mesh, from this process's rows (numpy; see `process_rows`)."""
    sharding = NamedSharding(mesh, BATCH)

    def put(leaf: Any) -> jax.Array:
        rows = np.asarray(leaf)
        each = len(rows) // len(sharding.addressable_devices)
        shape = (each * mesh.size, *rows.shape[1:])
        starts = {device: index[0].start or 0 for device, index in _own(sharding, shape).items()}
        places = sorted(starts.values())
        parts = [
            jax.device_put(rows[each * places.index(start) : each * (places.index(start) + 1)], device)
            for device, start in starts.items()
        ]
        return jax.make_array_from_single_device_arrays(shape, sharding, parts)

    return jax.tree.map(put, batch)


def _own(sharding: NamedSharding, shape: tuple[int, ...]) -> dict[jax.Device, tuple[slice, ...]]:
    return sharding.addressable_devices_indices_map(shape)


def process_rows(batch_size: int, mesh: Mesh) -> tuple[int, ...]:
    """The rows of a global batch that this process's devices hold, in order.

    They need not be contiguous: a host of a TPU slice has a square of the chips, and the mesh follows their links.
    """
    spans = [index[0].indices(batch_size) for index in _own(NamedSharding(mesh, BATCH), (batch_size,)).values()]
    return tuple(sorted(row for span in spans for row in range(*span)))
