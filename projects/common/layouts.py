"""Example layouts: boxes written by hand, and the instances of rendered scenes in the formats wished for."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.config import Settings
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.geometry.points import sample_scribble
from projects.common.coco_folder import Row, World

Annotations = list[dict[str, Any]]
# Caption and annotations.
Described = tuple[str, Annotations]
Named = dict[str, Described]
# Seed of the scenes; training, validation and evaluation use others.
SEED = 77


def boxes(*instances: tuple[str, int, int, int, int]) -> Annotations:
    """Annotations from (caption, x, y, width, height)."""
    return [{"caption": caption, "bbox": list(box)} for caption, *box in instances]


def scene(world: World, index: int, side: int, settings: Settings, formats: str) -> Described:
    """Caption and annotations of a rendered scene.

    Args:
        world: renders it.
        index: of the scene.
        side: of the canvas in pixels.
        settings: what the scene looks like.
        formats: one letter per instance, repeated: b box, m mask, s scribble, p point.
    """
    picture = world.render(SEED, index, side, settings)
    return picture.captions[0], _annotations(picture.rows, formats, np.random.default_rng([SEED, index]))


def _annotations(instances: Sequence[Row], formats: str, rng: np.random.Generator) -> Annotations:
    annos: Annotations = []
    for i, instance in enumerate(instances):
        anno: dict[str, Any] = {"caption": instance.caption}
        kind = formats[i % len(formats)]
        if kind == "b":
            anno["bbox"] = [int(value) for value in instance.box]
        elif kind == "m":
            anno["mask"] = encode_mask(instance.mask)
        elif kind == "s":
            anno["scribble"] = [round(float(value), 1) for value in sample_scribble(instance.mask, rng).ravel()]
        else:
            rows, columns = np.nonzero(instance.mask)
            # The pixel of the mask that is nearest to its centroid.
            nearest = np.argmin((rows - rows.mean()) ** 2 + (columns - columns.mean()) ** 2)
            anno["point"] = [int(columns[nearest]), int(rows[nearest])]
        annos.append(anno)
    return annos


def write_layouts(folder: Path, side: int, named: Named) -> None:
    """Writes FOLDER/NAME.json for each layout, on a square canvas, and prints the captions."""
    folder.mkdir(exist_ok=True)
    for name, (caption, annos) in named.items():
        values = {"caption": caption, "width": side, "height": side, "annos": annos}
        (folder / f"{name}.json").write_text(json.dumps(values) + "\n", encoding="utf-8")
        print(f"{name}: {caption}")
