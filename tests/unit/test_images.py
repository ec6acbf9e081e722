"""Images of any kind are opened upright, as 8-bit RGB; masks are read as meant, or named."""

import numpy as np
import pytest
from coco_fixture import oriented
from PIL import Image

from instdiff_jax.cli import sample
from instdiff_jax.cli.sample_inputs import read_arrays
from instdiff_jax.data.images import Crop
from instdiff_jax.errors import InputError
from instdiff_jax.images import open_image, orientation_note, read_repaint_mask

RNG = np.random.default_rng(0)
# A picture whose corners differ, smooth enough for JPEG.
UPRIGHT = np.zeros((24, 32, 3), np.uint8)
UPRIGHT[:12, :16], UPRIGHT[:12, 16:], UPRIGHT[12:, :16] = (200, 40, 40), (40, 200, 40), (40, 40, 200)
# Turns the upright picture into the one that a camera stores under an orientation.
STORED = {
    1: lambda x: x,
    2: lambda x: x[:, ::-1],
    3: lambda x: x[::-1, ::-1],
    4: lambda x: x[::-1],
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x),
    7: lambda x: x[::-1, ::-1].swapaxes(0, 1),
    8: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("number", STORED)
def test_images_are_upright(number):
    data = oriented(STORED[number](UPRIGHT), number)
    np.testing.assert_array_equal(open_image(data), UPRIGHT)
    np.testing.assert_array_equal(open_image(data, (32, 24)), UPRIGHT)
    assert bool(orientation_note(data, (32, 24))) == (number != 1)


def test_a_size_that_only_fits_the_stored_image():
    stored = STORED[6](UPRIGHT)
    data = oriented(stored, 6)
    np.testing.assert_array_equal(open_image(data, (24, 32)), stored)
    note = orientation_note(data, (24, 32))
    assert "as stored, 24x32" in note and "upright 32x24" in note


def save(path, pixels, **options):
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(path, **options)
    return path


def test_flags_take_upright_images(tmp_path):
    (tmp_path / "a.jpg").write_bytes(oriented(STORED[3](UPRIGHT), 3, "JPEG"))
    mask = np.zeros((24, 32), np.uint8)
    mask[:5, :9] = 255
    (tmp_path / "m.png").write_bytes(oriented(STORED[3](mask), 3))
    flags = ["--init_image", str(tmp_path / "a.jpg"), "--inpaint_mask", str(tmp_path / "m.png")]
    arrays = read_arrays(sample.parse_args(flags))
    assert np.abs(arrays["init_image"].astype(int) - UPRIGHT).mean() < 8
    np.testing.assert_array_equal(arrays["inpaint_mask"], mask > 0)


GRAY = np.tile(np.arange(256, dtype=np.uint8), (4, 1))


@pytest.mark.parametrize(
    ("pixels", "name"),
    [
        (GRAY.astype(np.uint16) * 257, "a.png"),
        (GRAY.astype(np.uint16) * 257, "a.tif"),
        (GRAY.astype(np.int32) * 257, "b.tif"),
        (GRAY.astype(np.float32) / 255, "c.tif"),
        (GRAY.astype(np.float32), "d.tif"),
        (GRAY, "e.png"),
    ],
)
def test_more_than_eight_bits(tmp_path, pixels, name):
    path = save(tmp_path / name, pixels)
    for source in (path, path.read_bytes()):
        np.testing.assert_array_equal(np.asarray(open_image(source)), np.repeat(GRAY[..., None], 3, -1))


@pytest.mark.parametrize(
    "pixels",
    [
        GRAY.astype(np.uint16),  # 8-bit values, or nearly black
        GRAY.astype(np.float32) - 1,
        np.full((4, 4), np.nan, np.float32),
        np.full((4, 4), 2**20, np.int32),
    ],
)
def test_values_of_no_known_range_are_named(tmp_path, pixels):
    with pytest.raises(ValueError, match="expected"):
        open_image(save(tmp_path / "a.tif", pixels))


SHAPE = np.zeros((16, 16), bool)
SHAPE[3:9, 4:12] = True
ONES = SHAPE.astype(np.uint8)
LABELS = np.where(np.arange(16) % 2, ONES, 2 * ONES).astype(np.uint8)


def palette(pixels, colours):
    new = Image.new("P", pixels.shape[::-1])
    new.putdata(pixels.ravel().tolist())
    new.putpalette([value for colour in colours for value in colour])
    return new


def rgba(colour, alpha):
    return np.dstack([np.broadcast_to(np.asarray(colour, np.uint8), (*alpha.shape, 3)), alpha])


MASKS = {
    "black and white": ONES * 255,
    "0 and 1": ONES,
    "one bit": Image.fromarray(ONES * 255).convert("1"),
    "16 bits": ONES.astype(np.uint16) * 65535,
    "16 bits, noise of 300": np.where(SHAPE, 65535, 300).astype(np.uint16),
    "16 bits, 0 and 1": ONES.astype(np.uint16),
    "16 bits, 0 and 255": ONES.astype(np.uint16) * 255,
    "float": ONES.astype(np.float32),
    "red on black": ONES[..., None] * np.array([255, 0, 0], np.uint8),
    "palette of labels": palette(ONES, [(0, 0, 0), (128, 0, 0)]),
    "palette, white first": palette(1 - ONES, [(255, 255, 255), (0, 0, 0)]),
    "palette of 0 and 1": palette(ONES, [(0, 0, 0), (1, 1, 1)]),
    "white shape in alpha": rgba((255, 255, 255), ONES * 255),
    "opaque": rgba((255, 255, 255), np.full_like(ONES, 255)) * np.dstack([ONES, ONES, ONES, np.ones_like(ONES)]),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_read_as_meant(tmp_path, name):
    kind = "tif" if name == "float" else "png"
    path = save(tmp_path / f"m.{kind}", MASKS[name])
    np.testing.assert_array_equal(read_repaint_mask(path, "inpaint_mask"), SHAPE)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (ONES * 0, "nothing to repaint"),
        (ONES * 20, "nothing to repaint"),
        (np.full((16, 16), 300, np.uint16), "nothing to repaint"),
        (ONES * 0 + 255, "nothing is kept"),
        (rgba((255, 255, 255), ONES * 0), "nothing to repaint|either way"),
        (rgba((0, 0, 0), ONES * 255), "either way"),
        (rgba((200, 120, 30), ONES * 255), "alpha channel"),
        (
            palette(ONES + ONES * np.arange(16, dtype=np.uint8) % 3, [(0, 0, 0), (128, 0, 0), (0, 128, 0), (9, 9, 99)]),
            "colours",
        ),
    ],
)
def test_masks_with_two_meanings_are_one_line(tmp_path, pixels, message):
    path = save(tmp_path / "m.png", pixels)
    with pytest.raises(InputError, match=f"^--inpaint_mask: .*m.png: .*({message})"):
        read_arrays(sample.parse_args(["--inpaint_mask", str(path)]))


@pytest.mark.parametrize("size", [(700, 20), (20, 700), (1200, 30)])
def test_thin_images_are_cropped_before_they_are_resized(size):
    # Smooth: resizing clips between its two passes, whose order depends on the size.
    image = Image.fromarray(RNG.integers(0, 256, (size[1] // 5, size[0] // 5, 3), np.uint8)).resize(size)
    crop = Crop(*size, 64)
    x, y = crop.corner
    whole = np.asarray(image.resize(crop.resized, Image.Resampling.BICUBIC))[y : y + 64, x : x + 64]
    assert np.abs(crop.image(image).astype(int) - whole).max() <= 1


def test_a_thin_image_needs_little_memory():
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    crop = Crop(3000, 1, 512)
    assert crop.image(Image.new("RGB", (3000, 1), (9, 8, 7))).shape == (512, 512, 3)
    assert [len(table) for table in crop.grid(512)] == [512, 512]
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # KB
