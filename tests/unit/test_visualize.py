"""Drawings: size, what is drawn where, and that no caption or place breaks them."""

import numpy as np
import pytest
from hypothesis import given, settings
from layout_cases import layouts, mixed_layout

from instdiff_jax.layout import Instance, Layout
from instdiff_jax.sampling.visualize import _color, contact_sheet, draw_layout, enlarge


def has_color(pixels, color):
    return (pixels == np.array(color)).all(axis=-1).any()


def test_every_instance_shows_in_its_color():
    layout = mixed_layout()
    picture = draw_layout(layout)
    assert picture.shape == (300, 400, 3) and picture.dtype == np.uint8
    for i in range(5):
        assert has_color(picture, _color(i)), i


@pytest.mark.parametrize("size", [(256, 256), (512, 768), (1024, 1024)])
def test_the_layout_is_scaled_to_the_picture(size):
    image = np.zeros((*size, 3), np.uint8)
    before = image.copy()
    layout = Layout("", 100, 100, (Instance("x", box=(50, 50, 100, 100)),))
    picture = draw_layout(layout, image)
    np.testing.assert_array_equal(image, before)
    height, width = size
    assert picture.shape == image.shape
    assert not picture[: height // 2 - 2].any() and not picture[:, : width // 2 - 2].any()
    right = picture[height * 3 // 4, width * 3 // 4 :]
    assert has_color(right, _color(0))


def test_masks_are_see_through_with_a_solid_rim():
    mask = np.zeros((200, 200), bool)
    mask[:, :100] = True
    picture = draw_layout(Layout("", 200, 200, (Instance("m", mask=mask),)), np.full((200, 200, 3), 90, np.uint8))
    inside, outside = picture[150, 50], picture[150, 150]
    assert (outside == 90).all() and not (inside == 90).all() and not (inside == _color(0)).all()
    assert has_color(picture[150, 97:100], _color(0))


def test_thirty_colors_differ():
    colors = [_color(i) for i in range(30)]
    distances = [np.abs(np.subtract(a, b)).sum() for i, a in enumerate(colors) for b in colors[:i]]
    assert min(distances) > 20


def test_labels_do_not_cover_points_or_each_other():
    layout = Layout("", 256, 256, (Instance("corner", point=(250, 250)), Instance("left", point=(5, 128))))
    picture = draw_layout(layout)
    assert (picture[250, 250] == _color(0)).all() and (picture[128, 5] == _color(1)).all()


@pytest.mark.parametrize(
    "caption",
    ["word " * 200, "w" * 500, "w" * 2_000_000, "語" * 100_000, "日本語 🐶 café", "two\nlines\tand a tab", "-"],
)
def test_captions_of_any_kind(caption):
    for size in (8, 64, 512):
        draw_layout(Layout(caption, size, size, (Instance(caption, box=(0, 0, size, size)),)))


@settings(max_examples=100, deadline=None)
@given(layouts())
def test_any_layout_can_be_drawn(layout):
    assert draw_layout(layout).shape == (layout.height, layout.width, 3)


def test_contact_sheet():
    images = [np.full((64, 64, 3), 10 * i, np.uint8) for i in range(5)] + [np.full((32, 96, 3), 200, np.uint8)]
    sheet = contact_sheet(images)
    assert sheet.dtype == np.uint8 and sheet.shape[1] > 3 * 96 and sheet.shape[0] < 3 * 96
    for image in images:
        assert (sheet == image[0, 0]).all(axis=-1).sum() >= image[..., 0].size
    assert contact_sheet(images, columns=6).shape[0] < 96
    assert contact_sheet(images, columns=1).shape[1] < 2 * 96
    assert contact_sheet(images, captions=["a caption"] * 6).shape[0] > sheet.shape[0]
    assert contact_sheet(images[:1]).shape[0] >= 64
    with pytest.raises(ValueError, match="at least one"):
        contact_sheet([])
    with pytest.raises(ValueError, match="expected 6 captions, got 1"):
        contact_sheet(images, ["one"])


def test_small_pictures_are_enlarged_by_a_whole_factor():
    small = np.zeros((48, 80, 3), np.uint8)
    small[:, 40:] = 255
    large = enlarge(small)
    assert large.shape == (288, 480, 3)
    assert (large[:, :228] < 30).all() and (large[:, 252:] > 225).all()
    kept = np.zeros((256, 300, 3), np.uint8)
    assert enlarge(kept) is kept
