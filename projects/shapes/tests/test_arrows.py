"""A new shape from pictures without labels: the detector of known answers, and the commands of docs/own_data.md."""

import re
import shlex
import subprocess
import sys

import numpy as np
import pytest

from common import ROOT
from instdiff_jax.cli import annotate
from instdiff_jax.coco import Coco
from instdiff_jax.files import read_json
from instdiff_jax.geometry.masks import decode_mask
from projects.shapes import arrows
from projects.shapes.scenes import render_scene
from projects.shapes.worlds import WORLDS

FINDER = "python:projects.shapes.arrows:Finder"


def test_every_arrow_is_found_and_nothing_else():
    for index in range(20):
        picture = arrows.render(41, index, arrows.SIDE)
        blobs = arrows.find_blobs(picture.image)
        assert sorted(blob.colour for blob in blobs) == sorted(row.attributes["colour"] for row in picture.rows)
        assert {blob.shape for blob in blobs} == {"arrow"} and min(blob.score for blob in blobs) > 0.65
        for box in arrows.Finder().ground(picture.image, "arrow").boxes:
            truth = [(x, y, x + w, y + h) for x, y, w, h in (row.box for row in picture.rows)]
            assert min(np.abs(box - other).max() for other in truth) <= 1
    assert arrows.Finder().ground(picture.image, "heart").boxes.shape == (0, 4)


def test_other_shapes_are_not_arrows():
    """Plain shapes of scenes with few; other textures fall into parts."""
    shapes = []
    for index in range(60):
        scene = render_scene(3, index, 64, WORLDS["calm"])
        plain = [one for one in scene.instances if one.texture == "plain" and len(scene.instances) < 4]
        blobs = arrows.find_blobs(scene.image) if plain else []
        shapes += [(one.shape, blob.shape) for one in plain for blob in blobs if (blob.mask & one.mask).sum() > 20]
    assert len(shapes) == 9 and all(asked == found for asked, found in shapes)


def test_annotate_makes_the_labels_of_the_renderer(tmp_path):
    arrows.main(["--output", str(tmp_path), "--count", "4", "--held_out", "2"])
    flags = ["--images", str(tmp_path / "pictures"), "--output", str(tmp_path / "annotated"), "--tags", "arrow"]
    annotate.main([*flags, "--detector", FINDER, "--segmenter", FINDER, "--captioner", FINDER])
    coco = Coco(tmp_path / "annotated/coco/annotations/instances_train.json")
    for index, image_id in enumerate(coco.image_ids):
        rows = coco.annotations(image_id)
        truth = arrows.render(41, index, arrows.SIDE).rows
        assert sorted(row.caption for row in rows) == sorted(row.caption for row in truth)
        for row in rows:
            mask = decode_mask(row.values["segmentation"], arrows.SIDE, arrows.SIDE, "")
            best = max((mask & one.mask).sum() / (mask | one.mask).sum() for one in truth)
            assert best > 0.85


def commands():
    """The commands of the page's section, in order."""
    text = (ROOT / "docs" / "own_data.md").read_text().split("## From photos to pictures")[1]
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


@pytest.mark.slow
def test_the_page_runs_as_pasted(tmp_path):
    """With 20 steps in place of its 300; two pictures are drawn in place of forty."""
    for name in ("checkpoints", "configs", "projects", "instdiff_jax", "train.py", "examples"):
        if name != "checkpoints":
            (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/shapes").symlink_to(ROOT / "checkpoints/shapes")
    for words in commands():
        assert words[0] == "python"
        words = [sys.executable, *words[1:]]
        words = [re.sub("train.steps=300", "train.steps=20", word) for word in words]
        words = [re.sub("warmup_steps=20", "warmup_steps=2", word) for word in words]
        words += ["--count", "2"] if "evaluate" in words else []
        done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
    assert read_json(tmp_path / "arrows/after/report.json")["metrics"]["images"] == 2
