"""`instdiff benchmark` from annotations to a table with a tiny model: drawn in shards and judged."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import make_tiny_checkpoint

from instdiff_jax.cli import benchmark
from instdiff_jax.files import read_json
from instdiff_jax.geometry.masks import encode_mask


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


def write_coco(folder):
    """One picture with two things, one with none."""
    mask = np.zeros((40, 60), bool)
    mask[10:30, 5:25] = True
    rows = [
        {"id": 1, "image_id": 1, "category_id": 1, "bbox": [5, 10, 20, 20], "segmentation": encode_mask(mask)},
        {"id": 2, "image_id": 1, "category_id": 1, "bbox": [30, 5, 20, 30], "segmentation": []},
    ]
    images = [{"id": k, "width": 60, "height": 40, "file_name": f"{k}.jpg"} for k in (1, 2)]
    data = {"images": images, "annotations": rows, "categories": [{"id": 1, "name": "circle"}]}
    (folder / "instances_val.json").write_text(json.dumps(data))
    return folder / "instances_val.json"


def test_pictures_are_drawn_in_shards_and_judged_by_predictions(checkpoint, tmp_path, capsys):
    data, folder = write_coco(tmp_path), tmp_path / "out"
    flags = ["--data", str(data), "--checkpoint", str(checkpoint), "--size", "64", "--steps", "2", "--mis", "0"]
    flags += ["--output", str(folder), "--draw_only"]
    benchmark.main(["coco-box", *flags, "--shard", "0/2"])
    assert [path.name for path in (folder / "images").iterdir()] == ["1.jpg"]
    with Image.open(folder / "images" / "1.jpg") as picture:
        assert picture.size == (64, 64) and picture.format == "JPEG"
    benchmark.main(["coco-box", *flags])
    assert (folder / "images" / "2.jpg").is_file(), "a picture of nothing is drawn too"
    assert "1 pictures drawn, 1 were there" in capsys.readouterr().out
    settings = read_json(folder / "settings.json")["sampling"]
    assert settings["mis"] == 0 and settings["alpha"][0] == 1 and settings["steps"] == 2
    assert settings["negative_prompt"].startswith("cartoon style"), "the protocol's own"

    # The first thing is found, on the picture's canvas, into which the image is squeezed.
    found = {"image_id": 1, "category_id": 1, "score": 0.9, "bbox": [5 / 60 * 64, 16, 20 / 60 * 64, 32]}
    (tmp_path / "predictions.json").write_text(json.dumps([found]))
    judged = ["--data", str(data), "--output", str(folder), "--size", "64"]
    benchmark.main(["coco-box", *judged, "--detector", f"predictions:{tmp_path / 'predictions.json'}"])
    numbers = read_json(folder / "results.json")["numbers"]
    assert numbers == pytest.approx({"box AP": 51 / 101, "box AP50": 51 / 101, "box AR": 0.5})
    assert "| InstanceDiffusion (printed, 1) | 38.8 | 55.4 | 52.9 |" in capsys.readouterr().out
