"""The small model that ships with the repository: it is whole, small enough, and draws what layouts ask for."""

import json
from pathlib import Path

import numpy as np
import pytest

from instdiff_jax import Layout, Pipeline
from instdiff_jax.checkpoint.folder import read_config
from instdiff_jax.evaluation.metrics import Found, measure_targets
from instdiff_jax.evaluation.segmenter import Segmenter
from instdiff_jax.evaluation.split import Target
from instdiff_jax.layout import Instance

ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT, SEGMENTER = ROOT / "checkpoints" / "shapes", ROOT / "checkpoints" / "shapes_segmenter"
EXAMPLES = ROOT / "examples" / "shapes"
# Of pictures drawn from noise alone, or of the right things in wrong places, far below.
LEAST_IOU, LEAST_COLOURS = 0.5, 0.6


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
        assert layout.width == 64, json.loads(file.read_text())["width"]


def squares(*things: tuple[str, str, tuple[int, int, int, int]]) -> tuple[Layout, list[Target]]:
    """A layout of things with a colour, a shape and a box x0, y0, x1, y1 each, and what should be found."""
    names = [f"a {colour} {shape}" for colour, shape, _ in things]
    instances = tuple(Instance(name, box=tuple(map(float, box))) for name, (_, _, box) in zip(names, things, strict=True))
    layout = Layout(" and ".join(names), 64, 64, instances, name="boxes")
    targets = [
        Target(shape, name, box, None, (0.0, 0.0), np.zeros((20, 2)), {"colour": colour}, True)
        for name, (colour, shape, box) in zip(names, things, strict=True)
    ]
    return layout, targets


@pytest.fixture(scope="module")
def measured():
    scenes = [
        squares(("red", "circle", (4, 20, 28, 44)), ("blue", "square", (36, 20, 60, 44))),
        squares(("blue", "circle", (36, 20, 60, 44)), ("red", "square", (4, 20, 28, 44))),
        squares(("green", "heart", (20, 4, 44, 28)), ("yellow", "star", (20, 36, 44, 60))),
        squares(("purple", "triangle", (4, 4, 28, 28)), ("white", "hexagon", (36, 36, 60, 60))),
    ]
    pipeline = Pipeline.from_checkpoint(CHECKPOINT)
    results = pipeline([layout for layout, _ in scenes], seeds=[0, 1])
    found = Segmenter.from_folder(SEGMENTER).detect(np.stack([result.image for result in results]))
    measures = []
    for k, detections in enumerate(found):
        rows = [Found.from_detection(detection) for detection in detections]
        targets = scenes[k // 2][1]
        measures += zip(targets, measure_targets(targets, rows, 0.25), strict=True)
    return measures


def test_things_stand_in_their_boxes(measured):
    assert np.mean([measure.box_iou for _, measure in measured]) >= LEAST_IOU


def test_things_have_their_colours(measured):
    right = [m.match is not None and m.match.attributes["colour"] == target.attributes["colour"] for target, m in measured]
    assert np.mean(right) >= LEAST_COLOURS
