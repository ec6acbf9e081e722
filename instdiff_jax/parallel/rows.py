"""Arrays whose first axis is split over a mesh, every device with a part of its own.

Left to itself XLA gathers such arrays wherever a network loops over its batch, as attention's chunks do, and a network
could not choose its chunks by the rows that it really has: so whatever runs on rows is mapped over devices. A sharding
of None is one device and no mesh.
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
    """Devices that rows are split over."""
    return 1 if sharding is None else sharding.num_devices


def replicated(sharding: NamedSharding) -> NamedSharding:
    """The same mesh with a whole copy on every device."""
    return NamedSharding(sharding.mesh, PartitionSpec())


def on_each_device(function: Callable, sharding: NamedSharding | None, whole: tuple[int, ...] = ()) -> Callable:
    """The function, run by every device on its part of all arguments; of those numbered in `whole` each has a copy."""
    if sharding is None:
        return function

    def run(*args: Any) -> Any:
        specs = tuple(PartitionSpec() if i in whole else sharding.spec for i in range(len(args)))
        mapped = jax.shard_map(function, mesh=sharding.mesh, in_specs=specs, out_specs=sharding.spec, check_vma=False)
        return mapped(*args)

    return run


def settled(tree: Any, sharding: NamedSharding | None) -> Any:
    """The arrays; on a mesh of CPU devices it waits until they are ready, and elsewhere for nothing.

    XLA:CPU's devices share one pool of threads: a collective that waits in some of them for partners that are still
    busy, or queue behind another collective, never ends. So collectives run there on inputs that are ready, one at a
    time.
    """
    if sharding is not None and sharding.mesh.devices.flat[0].platform == "cpu":
        jax.block_until_ready(tree)
    return tree


def device_of(params: Any) -> jax.Device | None:
    """The one device that parameters are bound to; None where they are not bound, or to several."""
    leaf = next(iter(jax.tree.leaves(params)), None)
    if not isinstance(leaf, jax.Array) or not leaf.committed or len(leaf.devices()) != 1:
        return None
    return next(iter(leaf.devices()))


def beside(params: Any, tree: Any) -> Any:
    """The arrays, bound to the one device that parameters are bound to.

    What a program gives out is bound to its parameters' device. One that is given its own output next compiles once
    more if what it was given first was not.
    """
    device = device_of(params)
    return tree if device is None else jax.device_put(tree, device)


def spread(tree: Any, sharding: NamedSharding | None) -> Any:
    """Splits arrays over the mesh, padded to a multiple of its devices with zeros that nothing reads."""

    def put(a: Any) -> Array:
        short = -len(a) % sharding.num_devices
        if short:
            a = settled(jnp.pad(settled(jnp.asarray(a), sharding), [(0, short), *[(0, 0)] * (a.ndim - 1)]), sharding)
        return settled(jax.device_put(a, sharding), sharding)

    return jax.tree.map(jnp.asarray if sharding is None else put, tree)


def take(tree: Any, index: Int[np.ndarray, "..."], sharding: NamedSharding | None) -> Any:
    """The entries that `index` names of arrays that are split over the mesh; so is the result.

    One array at a time is whole on every device, and only until its entries are taken.
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
