"""`instdiff sample --layout picture.png`: a picture drawn here is drawn again, from what is noted inside it."""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.presets import PRESETS

if TYPE_CHECKING:
    from instdiff_jax.layout import Layout
    from instdiff_jax.sampling.metadata import Origin


def is_picture(path: Path) -> bool:
    return path.suffix.lower() == ".png"


def follow_picture(args: argparse.Namespace) -> "Origin | None":
    """Sets the flags that are not given: to those of the picture in --layout, else to their defaults.

    Precedence: flag > preset > picture.

    Raises:
        InputError: for a picture that was not drawn here, or is not alone.
    """
    origin = None
    if any(map(is_picture, args.layout or ())):
        from instdiff_jax.sampling.metadata import read_origin

        if len(args.layout) > 1:
            raise InputError(f"--layout: {args.layout[0]}: expected a picture alone: it has its own seed and settings")
        origin = read_origin(args.layout[0])
        for field in dataclasses.fields(SamplingConfig):
            if getattr(args, field.name) is None and field.name not in PRESETS.get(args.preset, {}):
                setattr(args, field.name, getattr(origin.sampling, field.name))
    for name, default in (("seed", 0), ("format", "auto"), ("width", None), ("height", None), ("strength", None)):
        if getattr(args, name) is None:
            setattr(args, name, default if origin is None else getattr(origin, name))
    return origin


def check_inputs(origin: "Origin | None", args: argparse.Namespace, inputs: str) -> None:
    """InputError if a picture was drawn with other images, noise or weights beside the checkpoint than are given now.

    Another checkpoint is said, and used.
    """
    if origin is None:
        return
    from instdiff_jax.sampling.loading import checkpoint_fingerprint

    if origin.inputs and origin.inputs != inputs:
        names = "--init_image, --inpaint_mask, --noise, --lora or --embedding"
        raise InputError(f"--layout: {args.layout[0]}: drawn with other {names}; expected those, or its layout as JSON")
    if origin.fingerprint != checkpoint_fingerprint(args.checkpoint, not args.no_verify):
        print(f"{args.layout[0]}: drawn with another checkpoint; this one draws another picture")


def batch_like(origin: "Origin | None", layouts: "Sequence[Layout]") -> "tuple[list[Layout], int]":
    """What to draw for the same bits, and the place of the first picture that is wanted.

    A picture of a batch is drawn in a batch of the same numbers of rows, so by the same programs; what else is in it
    does not matter. Without a picture, or where there is no such batch, the layouts are drawn as they are.
    """
    if origin is None or len(origin.batch[0]) == 1:
        return list(layouts), 0
    from instdiff_jax.sampling.conditions import separate_instances

    (layout,), (rows, place) = layouts, origin.batch
    slots = separate_instances(layout, origin.format, merge=origin.sampling.merge)
    if max(rows) > 1 and (min(rows) == 1 or not slots):
        return [layout], 0
    others = [
        layout if count == 1 else dataclasses.replace(layout, instances=(layout.instances[slots[0]],) * (count - 1))
        for count in rows
    ]
    return [*others[:place], layout, *others[place + 1 :]], place
