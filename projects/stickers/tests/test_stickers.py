"""Scenes of things are the same for the same seed, and what is said of them is true."""

import contextlib
import io
import json

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instdiff_jax.cli import build_coco
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError
from projects.stickers import render
from projects.stickers.backgrounds import KINDS, draw_background
from projects.stickers.captions import Seen, image_captions, instance_caption
from projects.stickers.pictures import COLOURS
from projects.stickers.scenes import render_scene
from projects.stickers.things import NAMES, THINGS
from projects.stickers.worlds import SceneSettings
from tests.support.made_up_pictures import made_up_pictures, write_made_up_pictures


@pytest.fixture(scope="module")
def pictures():
    return made_up_pictures()


def test_a_scene_depends_on_its_seed_and_index_alone(pictures):
    first, again, other = (render_scene(p, 3, i) for p, i in ((pictures, 4), (made_up_pictures(), 4), (pictures, 5)))
    assert np.array_equal(first.image, again.image) and first.captions == again.captions
    assert not np.array_equal(first.image, other.image)


def test_what_is_known_of_a_scene_is_true(pictures):
    settings = SceneSettings(min_instances=2, max_instances=6)
    for index in range(25):
        scene = render_scene(pictures, 0, index, 128, settings)
        masks = np.stack([item.mask for item in scene.instances])
        assert 1 <= len(masks) <= 6 and masks.sum(0).max() == 1, "a pixel shows one thing"
        for item in scene.instances:
            x, y, w, h = item.box
            assert item.mask[y : y + h, x : x + w].sum() == item.mask.sum() and w * h >= 0.01 * 128**2
            assert (item.colour is None) == (THINGS[item.name].hue is None)
            assert bool(item.facing) == THINGS[item.name].faces
            assert any(word in item.caption for word in (item.name, *THINGS[item.name].synonyms))
            assert item.colour is None or item.colour in item.caption
            said = {word for word in ("left", "right") if word in item.caption}
            assert said <= {item.facing}
        assert scene.background in scene.caption and len(scene.captions) == settings.captions


def test_confusable_neighbours_differ_in_colour_alone(pictures):
    settings = SceneSettings(min_instances=3, max_instances=4, confusable=True)
    for index in range(5):
        items = render_scene(pictures, 2, index, 128, settings).instances
        assert len({item.name for item in items}) == 1 and len({item.colour for item in items}) == len(items)


def test_captions_name_places_and_counts():
    rng = np.random.default_rng(0)
    car, bee = Seen("car", "red", "left", (20.0, 60.0)), Seen("bee", None, "", (100.0, 60.0))
    captions = image_captions([car, car, bee], [(2, 0)], "on sand under a blue sky", 400, rng)
    assert {"two red cars and a bee on sand under a blue sky", "a bee and two red cars on sand under a blue sky"} & {
        text.replace("bumblebee", "bee") for text in captions
    }
    assert any("in front of a red" in text for text in captions)
    beside = [text for text in captions if "left of" in text or "right of" in text]
    assert beside and not any("bee left of" in text or "bee to the left" in text for text in beside)
    assert any("three things" in text for text in captions)
    texts = {instance_caption(car, rng) for _ in range(200)}
    assert {"a red car", "red car facing left", "an automobile that is red looking left"} <= texts
    assert not any("right" in text for text in texts)
    octopus = {instance_caption(Seen("octopus", None, "", (0, 0)), rng) for _ in range(50)}
    assert octopus == {"an octopus", "octopus"}


@pytest.mark.parametrize("kind", KINDS)
def test_backgrounds_have_words(kind):
    for seed in range(6):
        image, words = draw_background(kind, 64, np.random.default_rng(seed))
        assert image.shape == (64, 64, 3) and image.dtype == np.uint8
        assert words.split()[0] in ("on", "in") and " a evening" not in words
        assert image.std() > 0 or kind == "plain"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("stickers")
    assets = write_made_up_pictures(path / "assets")
    render.main(["--assets", str(assets), "--output", str(path / "coco"), "--count", "6", "--max_instances", "4"])
    return path


def test_the_command_writes_coco(folder, pictures):
    with contextlib.redirect_stdout(io.StringIO()):
        table = COCO(str(folder / "coco" / "annotations" / "instances_train.json"))
    assert [row["name"] for row in table.loadCats(table.getCatIds())] == list(NAMES)
    for index, number in enumerate(table.getImgIds()):
        scene = render_scene(pictures, 0, index, 128, SceneSettings(max_instances=4))
        image = table.loadImgs([number])[0]
        assert np.array_equal(np.asarray(Image.open(folder / "coco" / "train" / image["file_name"])), scene.image)
        for row, item in zip(table.loadAnns(table.getAnnIds([number])), scene.instances, strict=True):
            np.testing.assert_array_equal(table.annToMask(row).astype(bool), item.mask)
            assert NAMES[row["category_id"] - 1] == item.name
            assert row["attributes"] == ({"colour": item.colour} if item.colour in COLOURS else {})


def test_the_dataset_builder_takes_it_whole(folder, tmp_path, capsys):
    captions = folder / "coco" / "annotations" / "instance_captions.json"
    options = ["--instance_captions", str(captions), "--workers", "1"]
    build_coco.main(["--coco_dir", str(folder / "coco"), "--data_dir", str(tmp_path / "data"), *options])
    assert "skipped: nothing" in capsys.readouterr().out
    dataset = InstanceDataset(tmp_path / "data", "train")
    assert len(dataset) == 6
    known = set(json.loads(captions.read_text()).values())
    assert all(item.caption in known for record in (dataset[k] for k in range(6)) for item in record.instances)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--count", "0"], "count: expected a whole number from 1"),
        (["--count", "2", "--size", "32"], "size: expected a whole number from 64 to 2048, got 32"),
        (["--count", "2", "--max_turn", "400"], "scene.max_turn: expected a number from 0 to 180, got 400"),
        (["--count", "2", "--favour", "car,cra"], "scene.favour: expected things out of penguin, turtle"),
        (["--count", "2", "--assets", "nowhere"], "--assets: nowhere/1f427.webp: missing"),
    ],
)
def test_bad_input_is_one_line(options, message, folder, tmp_path):
    with pytest.raises(InputError, match="^[^\n]*$") as caught:
        render.main(["--assets", str(folder / "assets"), "--output", str(tmp_path / "new"), *options])
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()
