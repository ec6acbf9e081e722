"""Muon: the momentum of a matrix, made orthogonal. All matrices at once, split over the devices.

Axes: k matrices of one shape, l the longer side, s the shorter.
"""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from instdiff_jax.parallel.mesh import AXES, BATCH, REPLICATED

# Coefficients of the quintic iteration (Jordan et al. 2024, "Muon"), for singular values in (0, 1].
_QUINTIC = 3.4445, -4.7750, 2.0315
# The Gram matrix's small values, which the iteration enlarges, are lost in products of bfloat16, a TPU's default: for
# singular values from 1 to 1e-4 the result's norm is 16 instead of 1.2 (TF32: 1.3).
_product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)


def is_matrix(path: tuple, leaf: Array) -> bool:
    """Whether Muon updates a parameter: kernels of dense layers and of convolutions over all channels.

    A depthwise convolution has one input channel, so its kernel maps nothing to a space of several dimensions.
    """
    return path[-1].key == "kernel" and leaf.ndim >= 2 and leaf.shape[-2] > 1


def orthogonal(updates: Sequence[Float[Array, "..."]], mesh: Mesh | None = None) -> list[Float[Array, "..."]]:
    """Nearly U·Vᵀ of each update U·S·Vᵀ, as a matrix of all inputs and the outputs, with AdamW's size of a step.

    Jordan et al. 2024, "Muon"; the factor 0.2·sqrt(longer side) is that of Liu et al. 2025, "Muon is scalable", eq. 4:
    the mean square is about that of AdamW's updates, so both take one learning rate.

    Args:
        updates: kernels, [..., in, out]. Those of one shape, turned or not, are computed as one batch.
        mesh: each of its devices computes its share of every batch; None is one device.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    matrices = [_tall(update.reshape(-1, update.shape[-1])) for update in updates]
    for i, matrix in enumerate(matrices):
        groups.setdefault(matrix.shape, []).append(i)
    for members in groups.values():
        batch = _over_devices(jnp.stack([matrices[i] for i in members]), mesh)
        longer = matrices[members[0]].shape[0]
        for i, matrix in zip(members, batch[:, :longer], strict=False):
            shape = updates[i].shape
            matrices[i] = (matrix if math.prod(shape[:-1]) >= shape[-1] else matrix.T).reshape(shape)
    return matrices


def _tall(matrix: Float[Array, "i o"]) -> Float[Array, "l s"]:
    return matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T


def _over_devices(x: Float[Array, "k l s"], mesh: Mesh | None) -> Float[Array, "k2 l2 s"]:
    """`_iterate`, each device with its share; there may be zeros at the ends."""
    if mesh is None or mesh.size == 1:
        return _iterate(x, x.shape[1])
    count, longer, shorter = x.shape
    long, square = 2 * longer * shorter**2, 17 * shorter**3  # products with the matrix, and of its Gram matrix
    # Whole matrices, or the rows of each: a few large ones leave most devices idle.
    by_rows = count * (long / mesh.size + square) < -(-count // mesh.size) * (long + square)
    split = PartitionSpec(None, AXES) if by_rows else BATCH
    missing = [-side % mesh.size * (axis == by_rows) for axis, side in enumerate(x.shape)]
    x = jnp.pad(x, [(0, number) for number in missing])
    x = jax.lax.with_sharding_constraint(x, NamedSharding(mesh, split))
    x = jax.lax.with_sharding_constraint(_iterate(x, longer), NamedSharding(mesh, split))
    # Gathered in one piece: a slice of a split axis would be a transfer for each matrix.
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, REPLICATED))


def _iterate(x: Float[Array, "k l s"], longer: int) -> Float[Array, "k l s"]:
    """The iteration on the smaller side's Gram matrix: the same polynomial, for a third of the products.

    `longer` is the longer side without what was added.
    """
    gram = _product(x.mT, x)
    norm = jnp.trace(gram, axis1=1, axis2=2)[:, None, None] + 1e-12
    gram, identity, factor = gram / norm, jnp.eye(x.shape[-1]), None
    a, b, c = _QUINTIC
    for last in (False,) * 4 + (True,):
        step = a * identity + b * gram + c * _product(gram, gram)
        factor = step if factor is None else _product(step, factor)
        gram = gram if last else _product(_product(step, gram), step)
    return 0.2 * math.sqrt(longer) * _product(x, factor) * jax.lax.rsqrt(norm)
