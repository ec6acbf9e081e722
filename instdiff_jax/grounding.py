"""Groundings: a layout as arrays of 30 slots, the same for sampling and for training."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, TypedDict

import numpy as np
from jaxtyping import Float, UInt32

from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask, resize_map
from instdiff_jax.geometry.points import MASK_POINTS, SCRIBBLE_POINTS, mask_points, normalize_points, resample_scribble
from instdiff_jax.layout import MAX_INSTANCES, Instance, Layout

Format = Literal["auto", "box", "point", "scribble", "mask"]

# The four formats, in the order of UniFusion's tokens: the array that holds each, and its numbers per slot.
ARRAYS = {"box": "boxes", "point": "points", "scribble": "scribbles", "mask": "mask_points"}
COORDINATES = {"box": 4, "point": 2, "scribble": 2 * SCRIBBLE_POINTS, "mask": 2 * MASK_POINTS}
FORMATS = tuple(ARRAYS)

# The formats that each released config keeps; it drops the others (reference configs test_box, test_point, ...).
KEPT = {
    "box": ("box", "point"),
    "point": ("point",),
    "scribble": ("box", "point", "scribble", "mask"),
    "mask": ("box", "point", "mask"),
}
FORMAT_CHOICES = ("auto", *KEPT)


class Grounding(TypedDict):
    """One layout as arrays, or a batch of layouts with leading axes; n is the number of slots, at most 30.

    Coordinates are fractions of the canvas, x before y. `valid` is 1 where a slot holds an instance. `has_*` is 1 where
    the features of that format are used and 0 where the learned null vector replaces them; `has_map` holds for the
    whole layout. Bit i of `maps` is slot i's mask. `phrase_embeddings` are zeros until the text encoder has run.
    """

    boxes: Float[Any, "*b n 4"]
    points: Float[Any, "*b n 2"]
    scribbles: Float[Any, "*b n 40"]
    mask_points: Float[Any, "*b n 512"]
    maps: UInt32[Any, "*b s s"]
    phrase_embeddings: Float[Any, "*b n e"]
    valid: Float[Any, "*b n"]
    has_box: Float[Any, "*b n"]
    has_point: Float[Any, "*b n"]
    has_scribble: Float[Any, "*b n"]
    has_mask: Float[Any, "*b n"]
    has_map: Float[Any, "*b"]


def null_grounding(map_size: int, context_dim: int, batch: tuple[int, ...] = ()) -> Grounding:
    """The grounding without instances, for the unconditional pass: zeros, with leading axes `batch`."""
    slots = (*batch, MAX_INSTANCES)
    return Grounding(
        **{array: np.zeros((*slots, COORDINATES[name]), np.float32) for name, array in ARRAYS.items()},
        **{flag: np.zeros(slots, np.float32) for flag in ("valid", *(f"has_{name}" for name in FORMATS))},
        maps=np.zeros((*batch, map_size, map_size), np.uint32),
        phrase_embeddings=np.zeros((*slots, context_dim), np.float32),
        has_map=np.zeros(batch, np.float32),
    )


def fill_slot(grounding: Grounding, slot: int, coordinates: Mapping[str, np.ndarray], used: Collection[str]) -> None:
    """Puts an instance into a slot: its coordinates, and which formats it has.

    The released rule: features are null where a format is dropped, or where the sum of coordinates and `valid` is
    zero. So a format that is used has features of zeros, not the null vector, for an instance without coordinates.

    Args:
        grounding: changed in place.
        slot: from 0 to 29.
        coordinates: format to fractions of the canvas; zeros where it is missing.
        used: the formats whose features are used.
    """
    grounding["valid"][slot] = 1
    for name, array in ARRAYS.items():
        if name in coordinates:
            grounding[array][slot] = np.ravel(coordinates[name])
        grounding[f"has_{name}"][slot] = name in used


def set_has_map(grounding: Grounding) -> None:
    """Sets `has_map`: whether the map of any slot whose mask is used has a pixel."""
    used = np.flatnonzero(grounding["has_mask"]).astype(np.uint32)
    bits = np.bitwise_or.reduce(np.uint32(1) << used, initial=np.uint32(0))
    grounding["has_map"] = np.array((grounding["maps"] & bits).any(), np.float32)


def make_grounding(
    layout: Layout, config: ModelConfig, format: Format = "auto", drop: Collection[str] = ()
) -> Grounding:
    """Converts a layout to arrays.

    Args:
        layout: a checked layout.
        config: of the model; only `unifusion.map_size` and `unet.context_dim` are read.
        format: "auto" uses what each instance has, plus its box from a mask and its center point from a box; what it
            lacks is null. The four others reproduce the released configs: formats that the config drops are null for
            all instances; a format that it keeps but an instance lacks is Fourier of zeros. Points fall back to the
            center of the box.
        drop: of box, point, scribble and mask (its points and its map), those to be null for all instances as well.
            Boxes still place masked attention and the crop merge. With all four dropped there are no instances, as in
            training samples without grounding.

    Raises:
        InputError: for an unknown format.
    """
    if format not in FORMAT_CHOICES:
        raise InputError(f"format: expected one of {', '.join(FORMAT_CHOICES)}, got {format!r}")
    if unknown := sorted(set(drop) - set(FORMATS)):
        raise InputError(f"drop: expected some of {', '.join(FORMATS)}, got {unknown[0]!r}")
    grounding = null_grounding(config.unifusion.map_size, config.unet.context_dim)
    if set(drop) == set(FORMATS):
        return grounding
    kept = KEPT.get(format, FORMATS)
    for slot, instance in enumerate(layout.instances):
        coordinates = _coordinates(instance, layout, format, kept)
        used = {name for name in coordinates if name not in drop} if format == "auto" else set(kept) - set(drop)
        fill_slot(grounding, slot, coordinates, used)
        if "mask" in used and instance.mask is not None:
            grounding["maps"] |= resize_map(instance.mask, len(grounding["maps"])).astype(np.uint32) << np.uint32(slot)
    set_has_map(grounding)
    return grounding


def _coordinates(instance: Instance, layout: Layout, format: Format, kept: Collection[str]) -> dict[str, np.ndarray]:
    """The instance's coordinates in the formats kept, as fractions of the canvas; only those that it has."""
    size = layout.width, layout.height
    found = {}
    box = instance.box
    if box is None and format == "auto" and instance.mask is not None:
        box = box_from_mask(instance.mask)
    if box is not None:
        found["box"] = np.reshape(box, (2, 2)) / size
    if instance.point is not None:
        found["point"] = np.array(instance.point) / size
    elif box is not None:
        found["point"] = found["box"].mean(axis=0)
    if instance.scribble is not None:
        found["scribble"] = normalize_points(resample_scribble(instance.scribble, size=size), *size)
    if instance.mask is not None and "mask" in kept:
        found["mask"] = normalize_points(mask_points(instance.mask), *size)
    return {name: values for name, values in found.items() if name in kept}


def instance_groundings(grounding: Grounding) -> list[Grounding]:
    """One grounding per valid instance, with the instance in slot 0: what the multi-instance sampler denoises alone."""
    separate = []
    for slot in np.flatnonzero(grounding["valid"]):
        single = null_grounding(grounding["maps"].shape[-1], grounding["phrase_embeddings"].shape[-1])
        for key in (*ARRAYS.values(), "phrase_embeddings", "valid", *(f"has_{name}" for name in FORMATS)):
            single[key][0] = grounding[key][slot]
        single["maps"] = (grounding["maps"] >> np.uint32(slot)) & np.uint32(1)
        set_has_map(single)
        separate.append(single)
    return separate


def stack(groundings: Sequence[Grounding]) -> Grounding:
    """Groundings as one, with a leading batch axis."""
    return {key: np.stack([grounding[key] for grounding in groundings]) for key in groundings[0]}
