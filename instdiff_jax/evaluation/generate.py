"""Makes the images to measure: generated from layouts, or real ones. Existing images are kept."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.checkpoint.folder import read_config
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.evaluation.files import image_path, write_image
from instdiff_jax.evaluation.layouts import caption_layout, make_layout
from instdiff_jax.evaluation.split import Scene
from instdiff_jax.sampling.pipeline import Pipeline


def sampling_settings(checkpoint: Path, overrides: Mapping[str, Any]) -> SamplingConfig:
    """A checkpoint's sampling settings with overrides; reads no weights."""
    return SamplingConfig.from_dict(read_settings(checkpoint)[1].to_dict() | dict(overrides), "sampling")


def read_settings(checkpoint: Path) -> tuple[ModelConfig, SamplingConfig]:
    """Model sizes and sampling settings of a checkpoint folder or a training run; reads no weights."""
    if (checkpoint / "checkpoints").is_dir():
        from instdiff_jax.training.export import read_run

        return read_run(checkpoint)[:2]
    return read_config(checkpoint)[:2]


def image_seed(seed: int, image_id: int) -> int:
    """The seed of one image: different for each pair, the same on every machine."""
    return int(np.random.SeedSequence([seed, image_id]).generate_state(1, np.uint64)[0])


def unfinished(folder: Path, scenes: Sequence[Scene]) -> list[Scene]:
    """The scenes that have no image yet."""
    return [scene for scene in scenes if not image_path(folder, scene).exists()]


@dataclasses.dataclass(frozen=True)
class GenerateSettings:
    """What images are generated from, and how.

    Attributes:
        seed: with an image's id it gives the image's seed, see `image_seed`.
        format: the locations in the layouts, see `make_layout`.
        caption_only: generate from captions alone with the base model, without the adapters.
        drop: formats that the layouts have but the model does not see, see `grounding.make_grounding`.
        batch: layouts in memory at a time; the pipeline splits them into programs.
        sampling: settings of `SamplingConfig` that replace the checkpoint's.
    """

    seed: int = 0
    format: str = "auto"
    caption_only: bool = False
    drop: tuple[str, ...] = ()
    batch: int = 128
    sampling: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def generate(
    pipeline: Pipeline,
    scenes: Sequence[Scene],
    folder: Path,
    settings: GenerateSettings,
    report: Callable[[], None] = lambda: None,
) -> int:
    """Generates an image of each scene that has none, FOLDER/images/<image_id>.png, batch by batch.

    `report` is called after each image.

    Returns:
        The number of images generated.
    """
    sampling = dict(settings.sampling)
    if settings.caption_only:
        pipeline, sampling = pipeline.without_scaleu(), sampling | {"alpha": 0.0, "mis": 0.0}
    waiting, drawn = unfinished(folder, scenes), 0
    for first in range(0, len(waiting), settings.batch):
        part = waiting[first : first + settings.batch]
        layouts = [
            caption_layout(scene) if settings.caption_only else make_layout(scene, settings.format) for scene in part
        ]
        seeds = [image_seed(settings.seed, scene.image_id) for scene in part]
        results = pipeline.stream(layouts, layout_seeds=seeds, drop=settings.drop, **sampling)
        for scene, result in zip(part, results, strict=True):
            write_image(image_path(folder, scene), result.array)
            drawn += 1
            report()
    return drawn


def copy_real(scenes: Sequence[Scene], folder: Path, report: Callable[[], None] = lambda: None) -> int:
    """Writes the real images, cropped to the canvas, where `generate` writes its images; returns their number."""
    waiting = unfinished(folder, scenes)
    for scene in waiting:
        write_image(image_path(folder, scene), scene.real_image())
        report()
    return len(waiting)
