"""Instance-masked attention: inside a fuser, tokens attend only within their own instances.

    Attention(q, k, v) = softmax(q·kᵀ/√d + M)·v,   M_ij = 0 where tokens i and j share an instance, else −∞

(Paper, "Instance-Masked Attention".) M is never stored. Each token has 32 region bits: bit i says that it belongs to
instance i, bit 31 (`EVERYWHERE`) that every token may attend to it. Kernels compare the bits. `region_bits` computes
them on the host from a grounding.

Axes: b batch, n queries, m keys, h and w sides of the latent grid.
"""

import functools
from typing import Literal, TypedDict

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, UInt32

from instdiff_jax.config import NUM_MAP_TOKENS
from instdiff_jax.grounding import Grounding
from instdiff_jax.layout import MAX_INSTANCES

Orientation = Literal["official", "correct", "strict"]

# A key with this bit is visible to every query.
# (A numpy scalar: a jax one would start the backend at import, before several hosts can join.)
EVERYWHERE = np.uint32(1 << 31)

# Regions of instances without a box under "strict", as fractions of the canvas: the distance around a point, whose
# instance has no known size, and around the points of a scribble, which covers its instance.
POINT_REACH, SCRIBBLE_REACH = 0.125, 0.08

# The fraction of a cell of the latent grid that an instance's mask must cover for the cell to belong to it.
MIN_COVER = 0.25


class Regions(TypedDict):
    """Region bits of the visual and the grounding tokens."""

    visual: UInt32[Array | np.ndarray, "b n"]
    tokens: UInt32[Array | np.ndarray, "b m"]


def visible(
    query_bits: UInt32[Array, "b n"], key_bits: UInt32[Array, "b m"], first: int | Array = 0
) -> Bool[Array, "b 1 n m"]:
    """Which keys each query may attend to: those that share a bit, those with `EVERYWHERE`, and itself.

    Query i is the same token as key `first` + i.
    """
    shared = ((query_bits[:, :, None] | EVERYWHERE) & key_bits[:, None, :]) != 0
    rows = jnp.arange(query_bits.shape[1]) + first
    itself = rows[:, None] == jnp.arange(key_bits.shape[1])[None, :]
    return (shared | itself)[:, None]


def region_bits(
    grounding: Grounding, height: int, width: int, orientation: Orientation, num_map_tokens: int = NUM_MAP_TOKENS
) -> tuple[UInt32[np.ndarray, " {height*width}"], UInt32[np.ndarray, " tokens"]]:
    """Region bits of one layout.

    Args:
        grounding: of one layout.
        height: of the latent grid.
        width: of the latent grid.
        orientation: which cells of the grid are an instance's region.
            "official": its box with x along rows and y along columns, as in the released code.
            "correct": its box, edges rounded half to even; a box that rounds to nothing keeps the cell of its centre.
            Instances without a box are not masked.
            "strict", for models trained with it: the cells of which the mask covers `MIN_COVER`, else the box, else
            the cells within `SCRIBBLE_REACH` of the scribble or `POINT_REACH` of the point. All four tokens of an
            instance are masked.
        num_map_tokens: number of tokens after the four per slot.

    Returns:
        Bits of the visual tokens, row by row, and of the grounding tokens in UniFusion's order. Box and mask tokens
        have their slot's bit, or 0 where the slot is hidden; all other tokens have `EVERYWHERE`. All tokens have it
        where no instance has a region, and where box and mask are both dropped ("strict" uses points there).
    """
    tokens = np.full(4 * MAX_INSTANCES + num_map_tokens, EVERYWHERE, np.uint32)
    visual = np.zeros((height, width), np.uint32)
    masked = np.zeros(MAX_INSTANCES, np.uint32)
    strict, use_boxes = orientation == "strict", bool(grounding["has_box"].any() or grounding["has_mask"].any())
    for slot in np.flatnonzero(grounding["valid"]):
        bit = np.uint32(1 << int(slot))
        cells = _region(grounding, slot, height, width, orientation, use_boxes)
        if cells is not None:
            visual[cells] |= bit
            masked[slot] = bit
        elif orientation != "official":
            masked[slot] = EVERYWHERE
    if not visual.any() or not (use_boxes or strict):
        return np.full(height * width, EVERYWHERE, np.uint32), tokens
    for kind in range(4) if strict else (0, 3):
        tokens[kind * MAX_INSTANCES : (kind + 1) * MAX_INSTANCES] = masked
    return visual.ravel(), tokens


def _region(
    grounding: Grounding, slot: int, height: int, width: int, orientation: Orientation, use_boxes: bool
) -> Bool[np.ndarray, "h w"] | tuple[slice, slice] | None:
    """The cells of one slot, as an index of the grid; None where it has no region. See `region_bits`."""
    strict, box = orientation == "strict", grounding["boxes"][slot]
    if strict and (covered := _covered(grounding, slot, height, width)) is not None:
        return covered
    if (strict and not use_boxes) or not (box[2] > box[0] and box[3] > box[1]):
        return _near(grounding, slot, height, width) if strict else None
    if orientation == "official":
        return _cells(box[[0, 2]], height), _cells(box[[1, 3]], width)
    return _cells(box[[1, 3]], height, keep_one=True), _cells(box[[0, 2]], width, keep_one=True)


def _cells(edges: Float[np.ndarray, " 2"], count: int, keep_one: bool = False) -> slice:
    """The cells of a grid between two edges given as fractions, rounded half to even."""
    first, last = (int(edge) for edge in np.round(edges * count))
    if keep_one and first == last:
        first = min(int(edges.mean() * count), count - 1)
        last = first + 1
    return slice(first, last)


def _covered(grounding: Grounding, slot: int, height: int, width: int) -> Bool[np.ndarray, "h w"] | None:
    """The cells of which a slot's mask covers `MIN_COVER`, at least those it covers most; None without a mask."""
    if not grounding["has_mask"][slot]:
        return None
    mask = (grounding["maps"] >> np.uint32(slot)) & np.uint32(1)
    if not mask.any():
        return None
    down, across = (_overlaps(count, len(mask)) for count in (height, width))
    cover = down @ mask.astype(np.float32) @ across.T
    return cover >= min(MIN_COVER, cover.max() * (1 - 1e-5))


@functools.lru_cache(maxsize=64)
def _overlaps(cells: int, pixels: int) -> Float[np.ndarray, "cells pixels"]:
    """The fraction of each of `cells` equal cells along a side that each of `pixels` equal pixels covers."""
    left, pixel = np.arange(cells)[:, None] / cells, np.arange(pixels) / pixels
    shared = np.minimum(left + 1 / cells, pixel + 1 / pixels) - np.maximum(left, pixel)
    return (np.maximum(shared, 0) * cells).astype(np.float32)


def _near(grounding: Grounding, slot: int, height: int, width: int) -> Bool[np.ndarray, "h w"] | None:
    """The cells whose centres lie near a slot's scribble, or else its point; None without either."""
    scribble, point = (grounding[name][slot].reshape(-1, 2) for name in ("scribbles", "points"))
    if grounding["has_scribble"][slot] and scribble.any():
        points, reach = scribble, SCRIBBLE_REACH
    elif grounding["has_point"][slot]:
        points, reach = point, POINT_REACH
    else:
        return None
    centres = np.stack(np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height), axis=-1)
    return (np.abs(centres[:, :, None] - points).max(axis=-1) <= reach).any(axis=-1)
