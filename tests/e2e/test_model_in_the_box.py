"""The small model in the repository: complete, small enough, and its images follow their layouts."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from instdiff_jax import Layout, Pipeline
from instdiff_jax.checkpoint.folder import read_config
from instdiff_jax.layout import Instance
from projects.common.segmenter import Segmenter
from projects.shapes.drawing import COLOURS
from projects.shapes.scenes import render_scene
from projects.shapes.worlds import WORLDS

ROOT = Path(__file__).resolve().parent.parent.parent
CHECKPOINT, SEGMENTER = ROOT / "checkpoints" / "shapes", ROOT / "checkpoints" / "shapes_segmenter"
EXAMPLES = ROOT / "examples" / "shapes"
# By chance, one colour in eight is right. A pixel this far from the background in RGB belongs to an instance.
LEAST_COLOURS, THING, LEAST_OVERLAP = 0.9, 60.0, 0.7


def test_it_is_whole_and_small():
    model, _, absent = read_config(CHECKPOINT)
    assert absent == ()
    files = [path for folder in (CHECKPOINT, SEGMENTER) for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 40e6
    assert model.canvas_stride <= 64


def test_every_example_fits_it():
    model, _, _ = read_config(CHECKPOINT)
    files = sorted(EXAMPLES.glob("*.json"))
    assert len(files) >= 12
    for file in files:
        layout = Layout.from_json(file)
        assert layout.width % model.canvas_stride == layout.height % model.canvas_stride == 0
        assert (layout.width, layout.height) == (64, 64)


def boxes(*things: tuple[str, str, tuple[int, int, int, int]]) -> Layout:
    """A layout of instances, each with a colour, a shape and a box x0, y0, x1, y1."""
    names = [f"a {colour} {shape}" for colour, shape, _ in things]
    instances = tuple(
        Instance(name, box=tuple(map(float, box))) for name, (_, _, box) in zip(names, things, strict=True)
    )
    return Layout(" and ".join(names), 64, 64, instances, name="boxes")


SCENES = [
    [("red", "circle", (4, 20, 28, 44)), ("blue", "square", (36, 20, 60, 44))],
    [("blue", "circle", (4, 20, 28, 44)), ("red", "square", (36, 20, 60, 44))],
    [("green", "heart", (20, 4, 44, 28)), ("yellow", "star", (20, 36, 44, 60))],
    [("purple", "hexagon", (4, 4, 28, 28)), ("white", "square", (36, 36, 60, 60))],
]


@pytest.fixture(scope="module")
def generated():
    """Two images of each scene, [scenes, seeds, 64, 64, 3]."""
    results = Pipeline.from_checkpoint(CHECKPOINT)([boxes(*scene) for scene in SCENES], seeds=[0, 1])
    return np.stack([result.array for result in results]).reshape(len(SCENES), 2, 64, 64, 3).astype(float)


def test_things_have_their_colours_in_their_boxes(generated):
    """The middle of a box is nearer to the requested colour than to the seven others."""
    names, palette = list(COLOURS), np.array([pair[0] for pair in COLOURS.values()], float)
    right = []
    for scene, images in zip(SCENES, generated, strict=True):
        for colour, _, (x0, y0, x1, y1) in scene:
            for image in images:
                seen = np.median(image[y0 + 6 : y1 - 6, x0 + 6 : x1 - 6].reshape(-1, 3), axis=0)
                right.append(names[np.linalg.norm(palette - seen, axis=1).argmin()] == colour)
    assert np.mean(right) >= LEAST_COLOURS


def test_things_stand_in_their_boxes(generated):
    """The pixels that differ from the background are about those of the boxes."""
    overlaps = []
    for scene, images in zip(SCENES, generated, strict=True):
        inside = np.zeros((64, 64), bool)
        for _, _, (x0, y0, x1, y1) in scene:
            inside[y0:y1, x0:x1] = True
        for image in images:
            distance = np.linalg.norm(image - np.median(image[~inside], axis=0), axis=-1)
            things = distance > THING
            overlaps.append((things & inside).sum() / (things | inside).sum())
    assert np.mean(overlaps) >= LEAST_OVERLAP


def overlaps_of(scenes, images) -> np.ndarray:
    """Best mask IoU of each instance with a detection of its shape and colour; 0 without one."""
    best = []
    for scene, detections in zip(scenes, Segmenter.from_folder(SEGMENTER).detect(images), strict=True):
        for item in scene.instances:
            same = [d for d in detections if d.category == item.shape and d.attributes["colour"] == item.colour]
            best.append(max(((d.mask & item.mask).sum() / (d.mask | item.mask).sum() for d in same), default=0.0))
    return np.array(best)


@pytest.mark.parametrize("place, least_found, least_overlap", [("box", 0.55, 0.48), ("mask", 0.7, 0.58)])
def test_scenes_are_generated_from_their_layouts(place, least_found, least_overlap):
    """The detector finds the instances of held-out layouts, with their colours, in the right place."""
    settings = dataclasses.replace(WORLDS["calm"], min_instances=2, max_instances=4)
    scenes = [render_scene(77, index, 64, settings) for index in range(16)]

    def asked(item) -> Instance:
        x, y, width, height = item.box
        places = {"mask": item.mask, "box": (x, y, x + width, y + height)}
        return Instance(item.caption, **{place: places[place]})

    layouts = [Layout("", 64, 64, tuple(map(asked, scene.instances))) for scene in scenes]
    pipeline = Pipeline.from_checkpoint(CHECKPOINT)
    images = np.stack([result.array for result in pipeline(layouts)])
    best = overlaps_of(scenes, images)
    assert (best >= 0.5).mean() >= least_found and best.mean() >= least_overlap
    # Not by chance: images of other layouts have almost none of them.
    assert (overlaps_of(scenes, np.roll(images, 1, axis=0)) >= 0.5).mean() <= 0.1


def test_the_detector_finds_what_is_there():
    """On held-out rendered scenes it finds most instances, with their colours."""
    settings = dataclasses.replace(WORLDS["calm"], min_instances=2, max_instances=4)
    scenes = [render_scene(55, index, 64, settings) for index in range(16)]
    overlaps = overlaps_of(scenes, np.stack([scene.image for scene in scenes]))
    assert (overlaps >= 0.5).mean() >= 0.95 and overlaps.mean() >= 0.88
