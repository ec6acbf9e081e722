"""Scenes are the same on every machine, and true to their annotations and captions."""

import dataclasses
import hashlib

import numpy as np
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask
from projects.shapes.arrangement import arrange_shapes
from projects.shapes.drawing import (
    BACKGROUNDS,
    COLOURS,
    SHAPES,
    TEXTURES,
)
from projects.shapes.scenes import render_scene
from projects.shapes.worlds import WORLDS, SceneSettings


@pytest.fixture(scope="module")
def scenes():
    return [render_scene(3, i, 96) for i in range(150)]


def digest(scene):
    parts = [scene.image.tobytes(), repr(scene.captions).encode()]
    parts += [repr((item.caption, item.box)).encode() + item.mask.tobytes() for item in scene.instances]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


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
        placed, owner, covers = arrange_shapes(64, settings, np.random.default_rng(i))
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


def test_favoured_shapes_are_drawn_three_times_as_often():
    settings = SceneSettings(min_instances=2, max_instances=2, nested=0.0, max_hidden=0.0, favour="hexagon,ring")
    shapes_drawn = [item.shape for i in range(150) for item in render_scene(4, i, 64, settings).instances]
    share = sum(shape in ("hexagon", "ring") for shape in shapes_drawn) / len(shapes_drawn)
    # 6 choices of 14 instead of 2 of 10; four standard deviations of 300 draws are 0.11.
    assert 0.31 < share < 0.54
    assert dataclasses.replace(settings, favour="").choices == SHAPES
