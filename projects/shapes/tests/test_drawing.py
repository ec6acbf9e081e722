"""Outlines and backgrounds."""

import numpy as np
import pytest

from projects.shapes.drawing import (
    BACKGROUND_KINDS,
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    draw_background,
    make_stamp,
)


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


def test_colours_stand_out_from_backgrounds():
    for colour, tones in COLOURS.items():
        for name, background in BACKGROUNDS.items():
            assert np.abs(np.subtract(tones[0], background)).max() >= 45, (colour, name)
