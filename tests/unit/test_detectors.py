"""Detectors by name: files of predictions, functions and classes, and names that are none."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import Detection
from instdiff_jax.evaluation.detectors import finds_masks, open_detector, open_features, run_detector
from instdiff_jax.evaluation.split import read_split
from projects.shapes.render import write_coco
from projects.shapes.worlds import SceneSettings

IMAGES = np.zeros((2, 32, 32, 3), np.uint8)


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("detectors")
    write_coco(folder, "val", 2, 55, 32, SceneSettings(max_instances=3, min_side=0.3))
    return read_split(folder, "val")


PREDICTION = {"image_id": 55_000_001, "category_id": 1, "score": 0.5, "bbox": [1, 2, 3, 4]}


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{", "not valid JSON"),
        ("{}", "expected a list of objects"),
        ([{**PREDICTION, "image_id": 7}], "[0].image_id: expected an id of the split's annotations, got 7"),
        ([PREDICTION, {**PREDICTION, "category_id": "cat"}], "[1].category_id: expected an id"),
        ([{**PREDICTION, "score": None}], "[0].score: expected a number, got None"),
        ([{**PREDICTION, "bbox": [1, 2, 3]}], "[0].bbox: expected [x, y, width, height]"),
        ([{**PREDICTION, "bbox": [9, 9, -4, 4]}], "[0].bbox: expected [x, y, width, height]"),
        ([{key: PREDICTION[key] for key in ("image_id", "category_id", "score")}], "[0]: expected a bbox"),
        ([{**PREDICTION, "segmentation": {"size": [9, 9], "counts": "5"}}], "[0].segmentation"),
    ],
)
def test_malformed_predictions(split, tmp_path, content, message):
    path = tmp_path / "predictions.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError) as error:  # when it is opened: before hours of generating images
        open_detector(f"predictions:{path}", split)
    assert str(error.value).startswith(str(path)) and message in str(error.value)


def find(images):
    mask = np.ones(images.shape[1:3], bool)
    return [[Detection("circle", 0.5, (0.0, 0.0, 32.0, 32.0), mask)] for _ in images]


class Finder:
    has_masks = False

    def detect(self, images):
        return find(images)

    def features(self, images):
        return images.reshape(len(images), -1)


@pytest.mark.parametrize(("name", "has_masks"), [("find", True), ("Finder", False), ("finder", False)])
def test_detector_from_a_module(split, monkeypatch, name, has_masks):
    monkeypatch.setitem(sys.modules, "my_detectors", SimpleNamespace(find=find, Finder=Finder, finder=Finder()))
    detector = open_detector(f"python:my_detectors:{name}", split)
    assert [len(found) for found in run_detector(detector, [1, 2], IMAGES)] == [1, 1]
    assert finds_masks(detector) == has_masks
    assert (open_features(None, detector) is not None) == (name != "find")


def test_names_that_are_no_detector(split, monkeypatch):
    monkeypatch.setitem(sys.modules, "my_detectors", SimpleNamespace(number=1))
    monkeypatch.setitem(sys.modules, "projects.common.segmenter", None)  # as where there is no clone
    for name, message in (
        ("yolo", "expected predictions:FILE.json, transformers:NAME, segmenter:FOLDER or python:MODULE:FUNCTION"),
        ("python:my_detectors", "expected python:MODULE:FUNCTION"),
        ("python:nowhere:find", "python:nowhere:find: cannot be imported"),
        ("python:my_detectors:find", "cannot be imported"),
        ("python:my_detectors:number", "expected a function, got int"),
        ("shapes:folder", "shapes: projects.common.segmenter is not installed; it is part of the repository"),
    ):
        with pytest.raises(InputError, match=f"^--detector: .*{message}"):
            open_detector(name, split)
