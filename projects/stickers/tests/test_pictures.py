"""Things have names of their own, and their pictures are recoloured, turned and flipped as asked."""

import itertools

import numpy as np
import pytest
from PIL import Image

from instdiff_jax.errors import InputError
from projects.common.words import plural
from projects.stickers.pictures import COLOURS, Pictures, recolour
from projects.stickers.things import NAMES, THINGS
from tests.support.made_up_pictures import made_up_picture, made_up_pictures, write_made_up_pictures


def test_no_name_means_two_things():
    words = [[name, thing.plural or plural(name), *thing.synonyms] for name, thing in THINGS.items()]
    every = list(itertools.chain(*words))
    assert len(every) == len(set(every)) and len(NAMES) == 64
    assert len({thing.code for thing in THINGS.values()}) == 64


@pytest.mark.parametrize("name", [name for name in NAMES if THINGS[name].hue is not None])
def test_the_eight_colours_are_told_apart(name):
    hue = THINGS[name].hue
    pixels = np.asarray(made_up_picture(hue))
    disc, foot = (20, 14), (34, 20)
    seen = {colour: recolour(pixels, hue, tone)[disc][:3].astype(int) for colour, tone in COLOURS.items()}
    for first, second in itertools.combinations(seen, 2):
        assert np.abs(seen[first] - seen[second]).max() > 50, (first, second)
    # Every hue gives nearly the same colour.
    reference = np.asarray(made_up_picture(0))
    for colour, tone in COLOURS.items():
        out = recolour(pixels, hue, tone)
        assert np.abs(seen[colour] - recolour(reference, 0, tone)[disc][:3].astype(int)).max() < 30, colour
        assert np.array_equal(out[foot], pixels[foot]), "grey parts stay"
        assert np.array_equal(out[..., 3], pixels[..., 3])
        # Shading stays: the brighter half is the brighter one, but for yellow, pink and white, which are bright anyway.
        assert out[20, 14, :3].max() >= out[20, 26, :3].max()


def test_other_hues_stay():
    pixels = np.asarray(made_up_picture(120))
    assert np.array_equal(recolour(pixels, 300, COLOURS["red"]), pixels)


def test_stamps_have_the_side_asked_for_and_face_as_asked():
    pictures = made_up_pictures()
    for side in (12.0, 30.0, 60.0):
        stamp = pictures.stamp("elephant", None, side)
        assert abs(max(stamp.mask.shape) - side) <= 1.5
        assert np.all(stamp.pixels[..., :3] <= stamp.pixels[..., 3:]), "multiplied by alpha"
    left, right = (pictures.stamp("elephant", None, 30.0, 0.0, flip).pixels for flip in (False, True))
    assert np.abs(left[:, ::-1].astype(int) - right).mean() < 3
    assert np.abs(left.astype(int) - right).mean() > 3
    turned = pictures.stamp("elephant", None, 30.0, 90.0)
    assert turned.mask.shape[0] < turned.mask.shape[1], "the foot is on a side"


def test_a_missing_or_broken_picture_is_one_line(tmp_path):
    folder = write_made_up_pictures(tmp_path / "package" / "assets")
    assert Pictures.from_folder(tmp_path).names == NAMES
    (folder / "1f427.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match=r"1f427\.png: expected a picture"):
        Pictures.from_folder(folder)
    (folder / "1f427.png").unlink()
    with pytest.raises(InputError, match=r"--assets: .*1f427\.webp: missing \(penguin\); get the pictures with: npm"):
        Pictures.from_folder(folder)


def test_empty_pictures_are_refused():
    empty = Image.new("RGBA", (8, 8))
    with pytest.raises(InputError, match="penguin: expected a picture with visible pixels"):
        Pictures({"penguin": empty})
