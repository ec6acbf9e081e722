"""Scenes of shapes: the same everywhere, true to their annotations and captions, and good COCO."""

import contextlib
import dataclasses
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from instdiff_jax.cli import build_coco as coco
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask
from projects.shapes import render as shapes
from projects.shapes.drawing import (
    BACKGROUND_KINDS,
    BACKGROUNDS,
    OUTLINES,
    TEXTURES,
    draw_background,
    make_stamp,
)
from projects.shapes.render import COLOURS, SHAPES, WORLDS, SceneSettings, render_scene, write_coco
from projects.shapes.scenes import _arrange


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(3, i, 96) for i in range(150)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    for split, count, seed in (("train", 12, 0), ("val", 5, 1)):
        assert write_coco(path, split, count, seed, 64, SceneSettings(max_instances=5))
    return path


def digest(scene):
    parts = [scene.image.tobytes(), repr(scene.captions).encode()]
    parts += [repr((item.caption, item.box)).encode() + item.mask.tobytes() for item in scene.instances]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def load(folder, split):
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(folder / "annotations" / f"instances_{split}.json"))


def test_a_scene_depends_on_its_arguments_alone(scenes):
    again = render_scene(3, 70, 96)
    assert digest(again) == digest(scenes[70])
    others = [render_scene(4, 70, 96), render_scene(3, 70, 128), render_scene(3, 70, 96, SceneSettings(nested=1.0))]
    assert len({digest(scene) for scene in [again, *scenes[:70], *others]}) == 74


def test_scenes_are_the_same_on_every_machine():
    """Written down once: other bytes here mean that datasets made elsewhere are no longer the same."""
    digests = ["899be0271011434f", "b872fda386d6f4a9", "e562572d9d9c9f39"]
    assert [digest(render_scene(0, i, 64)) for i in range(3)] == digests


def test_masks_and_boxes_agree(scenes):
    for scene in scenes:
        assert scene.image.shape == (96, 96, 3) and scene.image.dtype == np.uint8
        total = np.zeros((96, 96), int)
        for z, item in enumerate(scene.instances):
            x0, y0, x1, y1 = box_from_mask(item.mask)
            assert item.box == (x0, y0, x1 - x0, y1 - y0)
            assert item.z == z
            # What training keeps: boxes of at least 1% of the image.
            assert item.box[2] * item.box[3] >= 0.01 * 96 * 96
            total += item.mask
        assert total.max() <= 1, "masks are visible parts, so no pixel has two"


def test_every_attribute_appears(scenes):
    items = [item for scene in scenes for item in scene.instances]
    assert len(SHAPES) >= 8 and len(TEXTURES) >= 4
    assert list(COLOURS) == ["black", "white", "red", "green", "yellow", "blue", "pink", "purple"]
    assert {item.shape for item in items} == set(SHAPES)
    assert {item.colour for item in items} == set(COLOURS)
    assert {item.texture for item in items} == set(TEXTURES)
    assert {len(scene.instances) for scene in scenes} == set(range(1, 11))
    words = " ".join(scene.background for scene in scenes)
    assert all(name in words for name in BACKGROUNDS) and "cloudy" in words and "fading" in words


@pytest.mark.parametrize("world", WORLDS)
def test_ten_instances_always_find_room(world):
    for i in range(25):
        for confusable in (False, True):
            settings = dataclasses.replace(WORLDS[world], min_instances=10, confusable=confusable)
            assert len(render_scene(5, i, 64, settings).instances) == 10


def test_pixels_have_the_colour_of_their_instance(scenes):
    """The nearest of all colours and tones is the instance's own for almost every pixel inside its mask."""
    names = list(COLOURS)
    palette = np.array([rgb for name in names for rgb in COLOURS[name]])
    for scene in scenes:
        for item in scene.instances:
            # One pixel in, past the blended edge; only the tip of another shape can still shine through.
            inner = item.mask.copy()
            for axis in (0, 1):
                inner &= np.roll(inner, 1, axis) & np.roll(inner, -1, axis)
            pixels = scene.image[inner].astype(int)
            if len(pixels) < 10:
                continue
            nearest = ((pixels[:, None] - palette) ** 2).sum(axis=2).argmin(axis=1) // 2
            assert (nearest == names.index(item.colour)).mean() > 0.65, (item.colour, item.texture, item.shape)
            same = (pixels == np.median(pixels, axis=0)).all(axis=1).mean()
            assert same > 0.85 if item.texture == "plain" else same < 0.95, (item.colour, item.texture, item.shape)


def test_colours_stand_out_from_backgrounds():
    for colour, tones in COLOURS.items():
        for name, background in BACKGROUNDS.items():
            assert np.abs(np.subtract(tones[0], background)).max() >= 45, (colour, name)


def test_instance_captions_name_the_instance(scenes):
    wordings = set()
    for item in (item for scene in scenes for item in scene.instances):
        words = item.caption.split()
        assert item.shape in words and item.colour in words
        pattern = {"striped": "stripes", "dotted": "dots", "checkered": "checks", "plain": None}
        for texture, noun in pattern.items():
            assert (texture in words or noun in words) == (item.texture == texture) or texture == "plain"
        wordings.add(item.caption.replace(item.colour, "C").replace(item.shape, "S").replace(item.texture, "T"))
    assert len(wordings) >= 8


def test_image_captions_say_what_is_there(scenes):
    number = {"one": 1, "two": 2, "three": 3, "four": 4, "five": 5, "six": 6, "seven": 7, "eight": 8, "nine": 9}
    for scene in scenes:
        assert len(scene.captions) == 5 and scene.caption == scene.captions[0]
        assert scene.background in scene.caption
        for item in scene.instances:
            assert item.shape in scene.caption and item.colour in scene.caption
        for text in scene.captions:
            # CLIP reads 77 tokens, two of them marks; here a word or a comma is a token.
            assert len(text.replace(",", " ,").split()) <= 75
            words = text.replace(",", "").split()
            for name in SHAPES:
                if name in words or name + "s" in words or name + "es" in words:
                    assert any(item.shape == name for item in scene.instances)
            for name in COLOURS:
                assert name not in words or any(item.colour == name for item in scene.instances)
            for before, after in zip(words, words[1:], strict=False):
                if after in ("shapes", "things") and before in number:
                    assert number[before] == len(scene.instances)


def test_placing_words_are_true():
    """In scenes of two different things the caption's order and direction must fit the boxes."""
    settings = SceneSettings(min_instances=2, max_instances=2, nested=0.0, captions=12)
    seen = set()
    for i in range(80):
        scene = render_scene(11, i, 64, settings)
        first, second = scene.instances
        if first.shape == second.shape:
            continue
        for text in scene.captions:
            for words in (" left of ", " right of ", " above ", " below ", " under ", " in front of "):
                before, found, after = text.partition(words)
                if not found or "background" in before:
                    continue
                one, two = (first, second) if first.shape in before else (second, first)
                assert one.shape in before and two.shape in after
                dx, dy = (one.box[k] + one.box[k + 2] / 2 - two.box[k] - two.box[k + 2] / 2 for k in (0, 1))
                seen.add(words)
                truth = {" left of ": dx < 0, " right of ": dx > 0, " above ": dy < 0, " in front of ": one.z > two.z}
                assert truth.get(words, dy > 0), text
    assert len(seen) == 6


def test_occlusion_is_bounded():
    settings = SceneSettings(min_instances=8, max_instances=8, nested=0.0, max_hidden=0.3)
    fractions = []
    for i in range(40):
        placed, owner, covers = _arrange(64, settings, np.random.default_rng(i))
        for z, item in enumerate(placed):
            fractions.append(1 - np.count_nonzero(owner == z) / item.area)
        for front, back in covers:
            assert front > back and placed[front].plan.colour != placed[back].plan.colour
    assert max(fractions) <= 0.3 and np.mean(np.array(fractions) > 0.05) > 0.1
    apart = SceneSettings(min_instances=4, max_instances=4, nested=0.0, max_hidden=0.0)
    assert not any("in front of" in text for i in range(30) for text in render_scene(2, i, 64, apart).captions)


def test_parts_lie_inside_their_hosts():
    found = 0
    for i in range(30):
        scene = render_scene(8, i, 96, SceneSettings(min_instances=3, max_instances=4, nested=1.0))
        for item in scene.instances:
            if item.inside is None:
                continue
            found += 1
            host = scene.instances[item.inside]
            assert host.z < item.z and host.colour != item.colour
            x, y, w, h = item.box
            hx, hy, hw, hh = host.box
            # Others may hide an edge of the host later, so the boxes have a little play.
            assert hx - 0.4 * hw <= x and x + w <= hx + 1.4 * hw and hy - 0.4 * hh <= y and y + h <= hy + 1.4 * hh
    assert found >= 10


def test_confusable_neighbours_swap_attributes():
    for i in range(20):
        scene = render_scene(1, i, 64, SceneSettings(min_instances=4, max_instances=4, confusable=True))
        a, b, c, d = scene.instances
        assert a.shape == b.shape == c.shape == d.shape
        assert a.colour != b.colour and a.texture != b.texture
        assert (c.colour, c.texture, d.colour, d.texture) == (a.colour, b.texture, b.colour, a.texture)


@pytest.mark.parametrize("shape", OUTLINES)
def test_outlines_fill_their_box(shape):
    stamp = make_stamp(shape, "plain", 40.0, 0.0, 1.0, 8.0, (0.0, 0.0))
    height, width = stamp.mask.shape
    assert 33 <= height <= 42 and 22 <= width <= 42
    assert 0.25 < stamp.mask.mean() <= 1
    if shape != "crescent":
        assert np.abs(stamp.cover.astype(int) - stamp.cover[:, ::-1]).max() <= 4, "mirrored left and right"
    double = make_stamp(shape, "checkered", 80.0, 0.0, 1.0, 16.0, (0.0, 0.0))
    assert abs(double.mask.sum() / stamp.mask.sum() - 4) < 0.3
    assert (double.tone <= double.cover).all() and 0.35 < double.tone.sum() / double.cover.sum() < 0.65


@pytest.mark.parametrize("kind", BACKGROUND_KINDS)
def test_backgrounds_stay_muted(kind):
    image = draw_background(kind, ("teal", "beige"), 64, np.random.default_rng(0)).astype(int)
    low, high = np.minimum((86, 136, 138), (200, 184, 152)) - 10, np.maximum((86, 136, 138), (200, 184, 152)) + 10
    assert (image >= low).all() and (image <= high).all()
    assert (image.std() > 12) or kind == "plain"


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
    coco.main(["--coco_dir", str(folder), "--data_dir", str(tmp_path / "data"), *options])
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


def test_finished_splits_are_kept_and_half_written_ones_replaced(tmp_path):
    settings = SceneSettings(max_instances=2)
    (tmp_path / "a.partial").mkdir()
    (tmp_path / "a.partial" / "rest.png").write_bytes(b"half")
    assert write_coco(tmp_path, "a", 3, 0, 32, settings)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len([path for path in files if path.suffix == ".png"]) == 3
    assert not list(tmp_path.rglob("*.partial"))
    assert not write_coco(tmp_path, "a", 3, 0, 32, settings), "nothing to do"
    # Killed before the last file: made again, to the same bytes.
    (tmp_path / "annotations" / "instances_a.json").unlink()
    next((tmp_path / "a").glob("*.png")).unlink()
    assert write_coco(tmp_path, "a", 3, 0, 32, settings)
    assert files == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match="other settings; pass --overwrite"):
        write_coco(tmp_path, "a", 4, 0, 32, settings)
    assert write_coco(tmp_path, "a", 4, 0, 32, settings, overwrite=True)
    with pytest.raises(InputError, match="seed: expected another one than 0, of which split a"):
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
        shapes.main(["--output", str(tmp_path / "new"), *options])
    assert message in str(caught.value)
    assert not (tmp_path / "new").exists()


def test_shapes_of_a_pixel_are_left_out_where_they_cover_none():
    settings = SceneSettings(min_side=0.05, max_side=0.05, max_turn=180)
    for i in range(40):
        scene = render_scene(2, i, 32, settings)
        assert scene.instances and all(item.mask.any() for item in scene.instances)


def test_a_scene_without_room_for_anything_is_an_error():
    settings = SceneSettings(min_side=0.9, max_side=0.9, max_stretch=2)
    with pytest.raises(InputError, match="^scene: no shape of sides from 0.9 to 0.9 fits into 32 pixels"):
        for i in range(20):
            render_scene(0, i, 32, settings)


def test_a_world_gives_the_settings_that_are_not_given(tmp_path):
    shapes.main(["--output", str(tmp_path), "--count", "2", "--size", "32", "--world", "calm", "--min_side", "0.3"])
    info = json.loads((tmp_path / "annotations" / "info_train.json").read_text())
    assert info["scene"] == dataclasses.asdict(dataclasses.replace(WORLDS["calm"], min_side=0.3))


def test_command_line(tmp_path):
    command = [sys.executable, "-m", "projects.shapes.render", "--output", str(tmp_path), "--size", "32"]
    good = subprocess.run([*command, "--count", "3", "--confusable"], capture_output=True, text=True)
    assert good.returncode == 0 and "written" in good.stdout and "3/3" in good.stderr
    assert len(list((tmp_path / "train").glob("*.png"))) == 3
    bad = subprocess.run([*command, "--count", "4"], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1 and bad.stderr.startswith("error: ")


def test_favoured_shapes_are_drawn_three_times_as_often():
    settings = SceneSettings(min_instances=2, max_instances=2, nested=0.0, max_hidden=0.0, favour="hexagon,ring")
    shapes_drawn = [item.shape for i in range(150) for item in render_scene(4, i, 64, settings).instances]
    share = sum(shape in ("hexagon", "ring") for shape in shapes_drawn) / len(shapes_drawn)
    # 6 choices of 14 instead of 2 of 10; four standard deviations of 300 draws are 0.11.
    assert 0.31 < share < 0.54
    assert dataclasses.replace(settings, favour="").choices == SHAPES
