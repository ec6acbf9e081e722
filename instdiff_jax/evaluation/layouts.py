"""The layouts of an evaluation's scenes."""

from typing import Any

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.split import Scene, Target
from instdiff_jax.layout import Instance, Layout

FORMATS = ("auto", "box", "point", "scribble", "mask", "mixed")
_MIXED = ("box", "mask", "scribble", "point")


def make_layout(scene: Scene, format: str = "auto") -> Layout:
    """A scene's layout that has only the locations of one format; sample it with `format="auto"`.

    Args:
        scene: what to generate.
        format: "box"; "point": a random pixel of the mask; "scribble": 20 random pixels; "mask": mask and box; "auto":
            box, scribble and mask; "mixed": box, mask, scribble and point in turn. The sampler adds a mask's box and a
            box's centre. An instance without a mask has its box.
    """
    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    instances = []
    for i, target in enumerate(scene.asked):
        # The order differs between images: else foreground and background would have different formats.
        own = _MIXED[(i + scene.image_id) % len(_MIXED)] if format == "mixed" else format
        instances.append(Instance(target.caption, category_name=target.category, **_locations(target, own)))
    return Layout(scene.caption, scene.size, scene.size, tuple(instances), name=str(scene.image_id))


def _locations(target: Target, format: str) -> dict[str, Any]:
    if format == "point":
        return {"point": target.point}
    if format == "scribble":
        return {"scribble": target.scribble}
    mask = target.mask if format in ("mask", "auto") else None
    return {"box": target.box, "mask": mask} | ({"scribble": target.scribble} if format == "auto" else {})


def caption_layout(scene: Scene) -> Layout:
    """A layout whose one instance has no effect while the fusers are off: a layout needs one."""
    instance = Instance(scene.caption, box=(0.0, 0.0, float(scene.size), float(scene.size)))
    return Layout(scene.caption, scene.size, scene.size, (instance,), name=str(scene.image_id))
