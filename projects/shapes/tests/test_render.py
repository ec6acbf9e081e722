"""A rendered folder is valid COCO, complete or not there, and the command reports bad input."""

import contextlib
import dataclasses
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instdiff_jax.cli import build_coco
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError
from projects.shapes import render
from projects.shapes.drawing import (
    SHAPES,
)
from projects.shapes.render import write_coco
from projects.shapes.scenes import render_scene
from projects.shapes.worlds import WORLDS, SceneSettings


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    for split, count, seed in (("train", 12, 0), ("val", 5, 1)):
        assert write_coco(path, split, count, seed, 64, SceneSettings(max_instances=5))
    return path


def load(folder, split):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "annotations" / f"instances_{split}.json"))


def test_pycocotools_reads_it(folder):
    table = load(folder, "train")
    assert len(table.getImgIds()) == 12
    assert [row["name"] for row in table.loadCats(table.getCatIds())] == list(SHAPES)
    for index, number in enumerate(table.getImgIds()):
        scene = render_scene(0, index, 64, SceneSettings(max_instances=5))
        image = table.loadImgs([number])[0]
        assert np.array_equal(np.asarray(Image.open(folder / "train" / image["file_name"])), scene.image)
        rows = table.loadAnns(table.getAnnIds([number]))
        for row, item in zip(rows, scene.instances, strict=True):
            np.testing.assert_array_equal(table.annToMask(row).astype(bool), item.mask)
            assert row["area"] == item.mask.sum() and row["bbox"] == list(item.box) and row["iscrowd"] == 0
            assert SHAPES[row["category_id"] - 1] == item.shape
            assert row["attributes"] == {"colour": item.colour, "texture": item.texture}
            assert row["caption"] == item.caption
    captions = json.loads((folder / "annotations" / "captions_train.json").read_text())["annotations"]
    assert len(captions) == 60 and len({row["id"] for row in captions}) == 60


def test_dataset_builder_takes_it_whole(folder, tmp_path, capsys):
    options = ["--instance_captions", str(folder / "annotations" / "instance_captions.json"), "--workers", "1"]
    build_coco.main(["--coco_dir", str(folder), "--data_dir", str(tmp_path / "data"), *options])
    assert "skipped: nothing" in capsys.readouterr().out
    for split, count, seed in (("train", 12, 0), ("val", 5, 1)):
        dataset = InstanceDataset(tmp_path / "data", split)
        assert len(dataset) == count
        for k in range(count):
            record = dataset[k]
            scene = render_scene(seed, (record.image_id - 1) % 10**6, 64, SceneSettings(max_instances=5))
            assert record.captions == scene.captions
            assert [item.caption for item in record.instances] == [item.caption for item in scene.instances]
            assert [item.category for item in record.instances] == [item.shape for item in scene.instances]


def test_finished_splits_are_kept_and_half_written_ones_replaced(tmp_path, monkeypatch):
    settings = SceneSettings(max_instances=2)

    def interrupted(seed, index, *rest):
        if index == 2:
            raise KeyboardInterrupt
        return render_scene(seed, index, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(render, "render_scene", interrupted)
        write_coco(tmp_path, "a", 3, 0, 32, settings)
    assert not list(tmp_path.rglob("*.png"))
    assert write_coco(tmp_path, "a", 3, 0, 32, settings)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len([path for path in files if path.suffix == ".png"]) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"a", "annotations"}
    assert not write_coco(tmp_path, "a", 3, 0, 32, settings), "nothing to do"
    # Killed before the last file: made again, to the same bytes.
    (tmp_path / "annotations" / "instances_a.json").unlink()
    next((tmp_path / "a").glob("*.png")).unlink()
    assert write_coco(tmp_path, "a", 3, 0, 32, settings)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="other settings; pass --overwrite"):
        write_coco(tmp_path, "a", 4, 0, 32, settings)
    assert write_coco(tmp_path, "a", 4, 0, 32, settings, overwrite=True)
    with pytest.raises(InputError, match="seed: expected another one than 0, which split a has"):
        write_coco(tmp_path, "b", 3, 0, 32, settings)
    (tmp_path / "c").mkdir()
    with pytest.raises(InputError, match="did not make"):
        write_coco(tmp_path, "c", 3, 5, 32, settings)


def test_workers_change_nothing(tmp_path):
    for name, workers in (("one", 1), ("two", 2)):
        write_coco(tmp_path / name, "a", 6, 0, 32, workers=workers)
    one, two = (
        {
            path.relative_to(tmp_path / name): path.read_bytes()
            for path in (tmp_path / name).rglob("*")
            if path.is_file()
        }
        for name in ("one", "two")
    )
    assert one == two


@pytest.mark.parametrize(
    "options, message",
    [
        (["--count", "0"], "count: expected a whole number from 1"),
        (["--count", "2", "--size", "8"], "size: expected a whole number from 32 to 2048, got 8"),
        (["--count", "2", "--seed", "-1"], "seed: expected a whole number from 0"),
        (["--count", "2", "--split", "a/b"], "split: expected a name"),
        (["--count", "2", "--min_instances", "5", "--max_instances", "3"], "scene.max_instances: expected a number"),
        (["--count", "2", "--world", "calm", "--max_side", "0.2"], "scene.max_side: expected a number from 0.24"),
        (["--count", "2", "--min_periods", "5"], "scene.max_periods: expected a number from 5"),
        (["--count", "2", "--favour", "ring,hexagn"], "scene.favour: expected shapes out of circle, square"),
        (["--count", "2", "--max_hidden", "nan"], "scene.max_hidden: expected a number from 0 to 0.9, got nan"),
    ],
)
def test_bad_input_is_one_line(options, message, tmp_path):
    with pytest.raises(InputError, match="^[^\n]*$") as caught:
        render.main(["--output", str(tmp_path / "new"), *options])
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_a_world_gives_the_settings_that_are_not_given(tmp_path):
    render.main(["--output", str(tmp_path), "--count", "2", "--size", "32", "--world", "calm", "--min_side", "0.3"])
    info = json.loads((tmp_path / "annotations" / "info_train.json").read_text())
    assert info["scene"] == dataclasses.asdict(dataclasses.replace(WORLDS["calm"], min_side=0.3))


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "projects.shapes.render", "--output", str(tmp_path), "--size", "32"]
    good = subprocess.run([*command, "--count", "3", "--confusable"], capture_output=True, text=True)
    assert good.returncode == 0 and "written" in good.stdout and "3/3" in good.stderr
    assert len(list((tmp_path / "train").glob("*.png"))) == 3
    bad = subprocess.run([*command, "--count", "4"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("error: ")
