"""The pictures to measure: drawn from layouts, or real ones on the canvas. Finished ones are not made again."""

from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.checkpoint.folder import read_config
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.files import picture_path, write_picture
from instdiff_jax.evaluation.split import Scene, Target
from instdiff_jax.layout import Instance, Layout
from instdiff_jax.sampling.pipeline import Pipeline

FORMATS = ("auto", "box", "point", "scribble", "mask", "mixed")
_MIXED = ("box", "mask", "scribble", "point")


def make_layout(scene: Scene, format: str = "auto") -> Layout:
    """A scene's layout, with no other places of its instances than the format says; sample it with `format="auto"`.

    Args:
        scene: what to draw.
        format: "box"; "point", one random pixel of the mask; "scribble", 20 of them; "mask", and its box; "auto": box,
            scribble and mask; "mixed": box, mask, scribble and point in turn. The sampler adds the box of a mask and
            the centre of a box. An instance without a mask gives its box.
    """

    def places(target: Target, format: str) -> dict[str, Any]:
        if format == "point":
            return {"point": target.point}
        if format == "scribble":
            return {"scribble": target.scribble}
        mask = target.mask if format in ("mask", "auto") else None
        return {"box": target.box, "mask": mask} | ({"scribble": target.scribble} if format == "auto" else {})

    if format not in FORMATS:
        raise InputError(f"format: expected one of {', '.join(FORMATS)}, got {format!r}")
    instances = []
    for i, target in enumerate(scene.asked):
        # Another one first in every image: else instances in the foreground would have other formats than those behind.
        own = _MIXED[(i + scene.image_id) % len(_MIXED)] if format == "mixed" else format
        instances.append(Instance(target.caption, category_name=target.category, **places(target, own)))
    return Layout(scene.caption, scene.size, scene.size, tuple(instances), name=str(scene.image_id))


def sampling_settings(checkpoint: Path, overrides: Mapping[str, Any]) -> SamplingConfig:
    """A checkpoint's sampling settings with some others over them; reads no weights."""
    return SamplingConfig.from_dict(read_settings(checkpoint)[1].to_dict() | dict(overrides), "sampling")


def read_settings(checkpoint: Path) -> tuple[ModelConfig, SamplingConfig]:
    """The sizes and the sampling settings of a checkpoint folder or a training run; reads no weights."""
    if (checkpoint / "checkpoints").is_dir():
        from instdiff_jax.training.export import read_run

        return read_run(checkpoint)[:2]
    return read_config(checkpoint)[:2]


def image_seed(seed: int, image_id: int) -> int:
    """The seed of an image's picture: another one for every pair, the same on every machine."""
    return int(np.random.SeedSequence([seed, image_id]).generate_state(1, np.uint64)[0])


def unfinished(folder: Path, scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes that have no picture yet."""
    return [scene for scene in scenes if not picture_path(folder, scene).exists()]


def generate(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    folder: Path,
    seed: int = 0,
    format: str = "auto",
    caption_only: bool = False,
    drop: Collection[str] = (),
    batch: int = 128,
    report: Callable[[], None] = lambda: None,
    **overrides: Any,
) -> int:
    """Draws a picture of every scene that has none; each is written whole as soon as its batch is done.

    Args:
        pipeline: draws.
        scenes: what to draw.
        folder: the evaluation's; pictures go to images/<image_id>.png.
        seed: a picture's seed follows from this and its image's id, see `image_seed`.
        format: which places the layouts hold, see `make_layout`.
        caption_only: draw from the captions alone, with the base model: without any of the adapters.
        drop: formats that the layouts hold but the model does not see, see `grounding.make_grounding`.
        batch: layouts in memory at a time; the pipeline splits them into programs.
        report: called after every picture.
        overrides: settings of `SamplingConfig`.

    Returns:
        How many pictures were drawn.
    """
    if caption_only:
        pipeline, overrides = pipeline.without_scaleu(), overrides | {"alpha": 0.0, "mis": 0.0}
    waiting, drawn = unfinished(folder, scenes), 0
    for first in range(0, len(waiting), batch):
        part = waiting[first : first + batch]
        layouts = [_without_instances(scene) if caption_only else make_layout(scene, format) for scene in part]
        seeds = [image_seed(seed, scene.image_id) for scene in part]
        results = pipeline.stream(layouts, layout_seeds=seeds, drop=drop, **overrides)
        for scene, result in zip(part, results, strict=True):
            write_picture(picture_path(folder, scene), result.image)
            drawn += 1
            report()
    return drawn


def copy_real(scenes: Sequence[Scene], folder: Path, report: Callable[[], None] = lambda: None) -> int:
    """Puts the real images, on the canvas, where `generate` puts pictures; returns how many were written."""
    waiting = unfinished(folder, scenes)
    for scene in waiting:
        write_picture(picture_path(folder, scene), scene.real_image())
        report()
    return len(waiting)


def _without_instances(scene: Scene) -> Layout:
    """A layout whose one instance does nothing once the fusers are off: a layout has to have one."""
    instance = Instance(scene.caption, box=(0.0, 0.0, float(scene.size), float(scene.size)))
    return Layout(scene.caption, scene.size, scene.size, (instance,), name=str(scene.image_id))
