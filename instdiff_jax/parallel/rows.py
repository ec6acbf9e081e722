"""Arrays whose first axis is split over a mesh, one part per device.

By default XLA gathers such arrays wherever a network loops over its batch, as attention's chunks do. Also, a network
must choose its chunks by the rows on its device. So functions of rows are mapped over the devices (`shard_map`). A
sharding of None means one device and no mesh.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Int


def count_devices(sharding: NamedSharding | None) -> int:
    """The number of devices that rows are split over."""
    return 1 if sharding is None else sharding.num_devices


def replicated(sharding: NamedSharding) -> NamedSharding:
    """The same mesh with a whole copy on every device."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def on_each_device(function: Callable, sharding: NamedSharding | None, whole: tuple[int, ...] = ()) -> Callable:
    """Runs the function on each device's part of the arguments. Arguments in `whole` are replicated."""
    if sharding is None:
        return function

    def run(*args: Any) -> Any:
        specs = tuple(PartitionSpec() if i in whole else sharding.spec for i in range(len(args)))
        mapped = jax.shard_map(function, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)
        return mapped(*args)

    return run


def settled(tree: Any, sharding: NamedSharding | None) -> Any:
    """Returns the arrays; on a mesh of CPU devices, first waits until they are ready.

    XLA:CPU's devices share one thread pool. A collective can wait there forever for partners that are busy or queued
    behind another collective. So collectives run one at a time, on inputs that are ready.
    """
    if sharding is not None and sharding.mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(tree)
    return tree


def device_of(params: Any) -> jax.Device | None:
    """The one device that parameters are committed to; None if they are not committed, or to several."""
    leaf = next(iter(jax.tree.leaves(params)), None)
    if not isinstance(leaf, jax.Array) or not leaf.committed or len(leaf.devices()) != 1:
        return None
    return next(iter(leaf.devices()))


def beside(params: Any, tree: Any) -> Any:
    """Commits arrays to the device that parameters are committed to.

    A program's outputs are committed to its parameters' device. If its first inputs were not, it compiles again when
    its outputs become its inputs.
    """
    device = device_of(params)
    return tree if device is None else jax.device_put(tree, device)


def spread(tree: Any, sharding: NamedSharding | None) -> Any:
    """Splits arrays over the mesh. Pads them with zeros to a multiple of the number of devices."""

    def put(a: Any) -> Array:
        short = -len(a) % sharding.num_devices
        if short:
            a = settled(jnp.pad(settled(jnp.asarray(a), sharding), [(0, short), *[(0, 0)] * (a.ndim - 1)]), sharding)
        return settled(jax.device_put(a, sharding), sharding)

    return jax.tree.map(jnp.asarray if sharding is None else put, tree)


def take(tree: Any, index: Int[np.ndarray, "..."], sharding: NamedSharding | None) -> Any:
    """Takes entries of arrays that are split over the mesh; the result is split too.

    Gathers one array at a time.
    """
    if sharding is None:
        return _take(tree, jnp.asarray(index), None)
    index = jax.device_put(index, sharding)
    return jax.tree.map(lambda a: settled(_take(settled(a, sharding), index, sharding), sharding), tree)


@functools.partial(jax.jit, static_argnames="sharding")
def _take(tree: Any, index: Int[Array, "..."], sharding: NamedSharding | None) -> Any:
    def local(tree: Any, index: Int[Array, "..."]) -> Any:
        if sharding is not None:
            tree = jax.tree.map(lambda a: jax.lax.all_gather(a, sharding.spec[0], tiled=True), tree)
        return jax.tree.map(lambda a: a[index], tree)

    return on_each_device(local, sharding)(tree, index)
