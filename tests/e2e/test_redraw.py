"""A picture holds what it was drawn from, and is drawn again from that."""

import json
import re

import numpy as np
import pytest
from PIL import Image, PngImagePlugin
from tiny_checkpoint import make_layout

from instdiff_jax.cli import sample
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.metadata import read_origin

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def draw(tiny_checkpoint):
    return lambda *flags: sample.main(["--checkpoint", str(tiny_checkpoint), *map(str, flags)])


@pytest.fixture(scope="module")
def drawn(draw, tmp_path_factory):
    """A picture of a layout with masks, with settings that are not the checkpoint's."""
    folder = tmp_path_factory.mktemp("drawn")
    make_layout(2, mask=True).to_json(folder / "scene.json")
    flags = ("--steps", 3, "--sampler", "dpm++", "--guidance_scale", 2, "--alpha", 0.5, "--format", "mask")
    draw("--layout", folder / "scene.json", "--output", folder, "--seed", 7, *flags, "--negative_prompt", "ünscharf")
    return folder / "scene" / "7.png"


def pixels(path):
    return np.asarray(Image.open(path))


def test_a_picture_says_what_it_was_drawn_from(drawn):
    origin = read_origin(drawn)
    assert origin.layout == make_layout(2, mask=True) and origin.seed == 7 and origin.format == "mask"
    assert (origin.sampling.steps, origin.sampling.sampler, origin.sampling.alpha) == (3, "dpm++", (0.5, 0.0, 0.5))
    text = Image.open(drawn).info["parameters"]
    assert text.splitlines()[:2] == ["a scene of 2", "Negative prompt: ünscharf"]
    assert re.fullmatch(
        r"Steps: 3, Sampler: dpm\+\+, CFG scale: 2.0, Seed: 7, Size: 32x32, Model hash: [0-9a-f]{10}, "
        r"Version: instdiff \d\.\d\.\d",
        text.splitlines()[2],
    )


def test_it_is_drawn_again_bit_for_bit(draw, drawn, tmp_path):
    draw("--layout", drawn, "--output", tmp_path)
    assert (pixels(tmp_path / "7" / "7.png") == pixels(drawn)).all()
    assert read_origin(tmp_path / "7" / "7.png") == read_origin(drawn)


@pytest.mark.parametrize("mis", [0, 0.5])
def test_a_picture_of_a_batch_too(draw, tmp_path, mis):
    for count, seed in ((1, 0), (3, 1), (2, 2), (3, 3)):
        make_layout(count, seed=seed, mask=count == 2).to_json(tmp_path / f"scene{seed}.json")
    draw("--layout", tmp_path, "--output", tmp_path / "all", "--steps", 2, "--mis", mis)
    for seed in (1, 2):
        picture = tmp_path / "all" / f"scene{seed}" / "0.png"
        assert len(read_origin(picture).batch[0]) > 1
        draw("--layout", picture, "--output", tmp_path / f"again{seed}")
        again = tmp_path / f"again{seed}" / "0" / "0.png"
        assert (pixels(again) == pixels(picture)).all() and read_origin(again) == read_origin(picture)


def test_flags_change_some_of_it(draw, drawn, tmp_path):
    draw("--layout", drawn, "--output", tmp_path, "--seed", 8, "--preset", "fast", "--guidance_scale", 3)
    origin = read_origin(tmp_path / "7" / "8.png")
    assert origin.seed == 8 and origin.format == "mask" and origin.sampling.alpha == (0.5, 0.0, 0.5)
    assert (origin.sampling.steps, origin.sampling.guidance_scale) == (20, 3.0)


def test_another_canvas_and_a_start_image_are_noted(draw, drawn, tmp_path):
    start = tmp_path / "start.png"
    Image.new("RGB", (48, 32), "teal").save(start)
    flags = ("--init_image", start, "--strength", 0.5)
    draw("--layout", drawn, "--output", tmp_path / "a", "--width", 48, *flags)
    picture = tmp_path / "a" / "7" / "7.png"
    draw("--layout", picture, "--output", tmp_path / "b", "--init_image", start)
    assert (pixels(tmp_path / "b" / "7" / "7.png") == pixels(picture)).all() and pixels(picture).shape == (32, 48, 3)
    with pytest.raises(InputError, match="7.png: drawn with other --init_image"):
        draw("--layout", picture, "--output", tmp_path / "c")
    assert not (tmp_path / "c").exists()


def with_text(path, text):
    info = PngImagePlugin.PngInfo()
    info.add_text("instdiff", text)
    Image.new("RGB", (32, 32)).save(path, pnginfo=info)
    return path


def test_other_pictures_are_named(draw, drawn, tmp_path):
    values = json.loads(Image.open(drawn).info["instdiff"])
    cases = {
        "found no text 'instdiff'": None,
        "instdiff: expected JSON": "{",
        "instdiff: expected an object": "[]",
        "instdiff.seed: missing": json.dumps({"layout": {}}),
        "instdiff.layout: annos": json.dumps(values | {"layout": values["layout"] | {"annos": []}}),
        "instdiff.sampling.steps": json.dumps(values | {"sampling": {"steps": "many"}}),
        "instdiff.format": json.dumps(values | {"format": "boxes"}),
        "instdiff.seed: expected": json.dumps(values | {"seed": -1}),
        "instdiff.batch: expected": json.dumps(values | {"batch": [[1, 1], 2]}),
        "instdiff.width": json.dumps(values | {"width": 1e9}),
    }
    for words, text in cases.items():
        path = tmp_path / "other.png"
        Image.new("RGB", (8, 8)).save(path) if text is None else with_text(path, text)
        with pytest.raises(InputError, match=f"other.png: .*{re.escape(words)}|other.png: {re.escape(words)}"):
            draw("--layout", path, "--output", tmp_path / "out")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(InputError, match="expected a PNG"):
        draw("--layout", tmp_path / "text.png", "--output", tmp_path / "out")
    with pytest.raises(InputError, match="expected a picture alone"):
        draw("--layout", drawn, drawn, "--output", tmp_path / "out")
    assert not (tmp_path / "out").exists()
