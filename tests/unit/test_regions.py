"""The region bits of masked attention against the official masks, and which cells each instance may attend to."""

import numpy as np
import pytest
from layout_cases import CONFIG, SMALL_CONFIG

from common import parity
from instdiff_jax.grounding import make_grounding, null_grounding
from instdiff_jax.layout import Instance, Layout
from instdiff_jax.models.regions import EVERYWHERE, region_bits


def box_grounding(boxes):
    grounding = null_grounding(512, 768)
    for slot, box in enumerate(boxes):
        grounding["boxes"][slot] = box
        grounding["valid"][slot] = grounding["has_box"][slot] = 1
    return grounding


@pytest.mark.parametrize("name", ["attention_masks", "unet_small_masked_attention"])
def test_official_regions_parity(name):
    data = parity(name)
    boxes, expected = data["boxes"], data["att_masks"]
    if name != "attention_masks":
        boxes, expected = boxes[0][data["masks"][0] > 0], expected[0]
    visual, tokens = region_bits(box_grounding(boxes), 64, 64, "official")
    for slot in range(len(boxes)):
        np.testing.assert_array_equal((visual >> np.uint32(slot) & 1).reshape(64, 64), expected[slot])
        assert tokens[slot] == tokens[90 + slot] == np.uint32(1 << slot)
    hidden = np.r_[len(boxes) : 30, 90 + len(boxes) : 120]
    assert not tokens[hidden].any()
    assert (tokens[np.r_[30:90, 120:184]] == EVERYWHERE).all() and len(tokens) == 184
    assert not (visual & EVERYWHERE).any()


def official_mask(att_masks, num_tokens=184):
    """Which pairs the released code allows, written out: [visual, visual + tokens]."""
    flat = att_masks.reshape(30, -1).astype(int)
    n = flat.shape[1]
    allowed = np.ones((n, n + num_tokens), bool)
    allowed[:, :n] = flat.T @ flat > 0
    allowed[:, n : n + 30] = allowed[:, n + 90 : n + 120] = flat.T > 0
    return allowed | np.eye(n, n + num_tokens, dtype=bool)


def test_words_allow_the_same_pairs_as_the_official_mask():
    rng = np.random.default_rng(0)
    for _ in range(5):
        corners = np.sort(rng.uniform(0, 1, (7, 2, 2)), axis=1).reshape(7, 4)
        visual, tokens = region_bits(box_grounding(corners), 16, 16, "official")
        att_masks = np.zeros((30, 16, 16), bool)
        for slot, box in enumerate(corners.astype(np.float32)):
            x0, y0, x1, y1 = (int(np.round(edge * 16)) for edge in box)
            att_masks[slot, x0:x1, y0:y1] = True
        keys = np.concatenate([visual, tokens])
        ours = ((visual | EVERYWHERE)[:, None] & keys) != 0
        np.testing.assert_array_equal(ours | np.eye(*ours.shape, dtype=bool), official_mask(att_masks))


def test_correct_orientation_on_a_canvas_that_is_not_square():
    visual, _ = region_bits(box_grounding([(0.25, 0.5, 0.5, 1.0)]), 64, 96, "correct")
    expected = np.zeros((64, 96), bool)
    expected[32:64, 24:48] = True
    np.testing.assert_array_equal(visual.reshape(64, 96) == 1, expected)
    visual, _ = region_bits(box_grounding([(0.25, 0.5, 0.5, 1.0)]), 64, 96, "official")
    expected = np.zeros((64, 96), bool)
    expected[16:32, 48:96] = True
    np.testing.assert_array_equal(visual.reshape(64, 96) == 1, expected)


def test_strict_masks_every_token_of_an_instance():
    visual, tokens = region_bits(box_grounding([(0.25, 0.5, 0.5, 1.0), (0, 0, 0.25, 0.25)]), 8, 8, "strict")
    correct, _ = region_bits(box_grounding([(0.25, 0.5, 0.5, 1.0), (0, 0, 0.25, 0.25)]), 8, 8, "correct")
    np.testing.assert_array_equal(visual, correct)
    for kind in range(4):
        assert tokens[30 * kind : 30 * kind + 3].tolist() == [1, 2, 0]
    assert (tokens[120:] == EVERYWHERE).all()


def test_strict_takes_the_neighbourhood_of_points_where_there_is_no_box():
    grounding = null_grounding(512, 768)
    grounding["valid"][:3] = 1
    grounding["points"][0] = 0.5, 0.25
    grounding["has_point"][:2] = 1
    grounding["points"][1] = 0.9, 0.9
    grounding["scribbles"][1] = np.linspace((0.1, 0.9), (0.9, 0.9), 20).ravel()
    grounding["has_scribble"][:2] = 1
    visual, tokens = region_bits(grounding, 16, 16, "strict")
    words = visual.reshape(16, 16)
    point = np.zeros((16, 16), bool)
    point[2:6, 6:10] = True  # cells whose centres lie within 1/8 of (0.5, 0.25)
    np.testing.assert_array_equal(words & 1 > 0, point)
    scribble = np.zeros((16, 16), bool)
    scribble[13:, :] = True  # those within 0.08 of a line at 0.9
    np.testing.assert_array_equal(words & 2 > 0, scribble)
    # The third instance has no place: seen everywhere.
    assert tokens[:3].tolist() == tokens[30:33].tolist() == [1, 2, EVERYWHERE]
    assert (region_bits(grounding, 16, 16, "correct")[0] == EVERYWHERE).all()


def test_strict_takes_the_cells_of_a_mask_instead_of_its_box():
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:32] = True  # a whole number of cells of 4 pixels,
    mask[48:50, 16:32] = True  # half of four more,
    mask[16:48, 32:34] = True  # half of eight more,
    mask[50, 60] = True  # and a pixel far away: less than a quarter of its cell, but in the box
    layout = Layout("", 64, 64, (Instance("a mask", mask=mask), Instance("a box", box=(0, 0, 8, 8))))
    grounding = make_grounding(layout, SMALL_CONFIG)
    visual, tokens = region_bits(grounding, 16, 16, "strict")
    expected = np.zeros((16, 16), bool)
    expected[4:13, 4:9] = True
    expected[12, 8] = False
    np.testing.assert_array_equal(visual.reshape(16, 16) & 1 > 0, expected)
    assert (visual.reshape(16, 16)[:2, :2] == 2).all() and (visual == 2).sum() == 4
    assert tokens[:3].tolist() == [1, 2, 0]
    # Without the mask's features, or with other orientations, its box.
    box = np.zeros((16, 16), bool)
    box[4:13, 4:15] = True
    for other in (
        region_bits(make_grounding(layout, SMALL_CONFIG, drop=("mask",)), 16, 16, "strict"),
        region_bits(grounding, 16, 16, "correct"),
    ):
        np.testing.assert_array_equal(other[0].reshape(16, 16) & 1 > 0, box)


@pytest.mark.parametrize("side", [1, 3, 16, 24, 64, 100])
def test_strict_keeps_a_cell_of_every_mask_on_any_grid(side):
    """A mask of one pixel, and one of all; on grids that do not divide the map, and finer than it."""
    for pixel in [(0, 0), (63, 63), (17, 40)]:
        mask = np.zeros((64, 64), bool)
        mask[pixel] = True
        layout = Layout("", 64, 64, (Instance("one", mask=mask), Instance("all", mask=np.ones((64, 64), bool))))
        visual, _ = region_bits(make_grounding(layout, SMALL_CONFIG), side, side, "strict")
        assert (visual & 2 > 0).all()
        rows, columns = np.nonzero(visual.reshape(side, side) & 1)
        assert 1 <= len(rows) <= max(1, (side / 64 + 2) ** 2)
        for cells, place in ((rows, pixel[0]), (columns, pixel[1])):
            assert (cells / side < (place + 1) / 64).all() and ((cells + 1) / side > place / 64).all()


def test_strict_leaves_boxes_out_where_box_and_mask_are_dropped():
    grounding = box_grounding([(0.0, 0.0, 1.0, 1.0)])
    grounding["has_box"][:] = 0
    grounding["points"][0] = 0.5, 0.5
    grounding["has_point"][0] = 1
    visual, _ = region_bits(grounding, 16, 16, "strict")
    assert (visual == 1).sum() == 16


def test_tiny_boxes_keep_one_cell_when_correct():
    for box in [(0.5, 0.5, 0.501, 0.501), (0.999, 0.999, 1, 1), (0, 0, 1e-4, 1e-4), (0.3, 0, 0.301, 1)]:
        visual, tokens = region_bits(box_grounding([box]), 64, 64, "correct")
        assert (visual == 1).sum() in (1, 64) and tokens[0] == 1


def test_instances_without_a_region():
    layout = Layout("", 64, 64, (Instance("a box", box=(0, 0, 32, 64)), Instance("a point", point=(40, 9))))
    grounding = make_grounding(layout, CONFIG)
    visual, tokens = region_bits(grounding, 64, 64, "correct")
    assert tokens[0] == tokens[90] == 1 and tokens[1] == tokens[91] == EVERYWHERE and not tokens[2] and not tokens[92]
    assert (visual.reshape(64, 64)[:, :32] == 1).all() and not visual.reshape(64, 64)[:, 32:].any()
    _, tokens = region_bits(grounding, 64, 64, "official")
    assert tokens[0] == 1 and tokens[1] == tokens[91] == 0


@pytest.mark.parametrize("orientation", ["official", "correct"])
def test_nothing_is_masked_without_regions_or_when_box_and_mask_are_dropped(orientation):
    layout = Layout("", 64, 64, (Instance("a box", box=(0, 0, 32, 64)),))
    for grounding in (
        null_grounding(512, 768),
        make_grounding(layout, CONFIG, "point"),
        make_grounding(Layout("", 64, 64, (Instance("a point", point=(40, 9)),)), CONFIG),
        {**box_grounding([(0, 0, 0.5, 0.5)]), "has_box": np.zeros(30, np.float32)},
    ):
        visual, tokens = region_bits(grounding, 8, 8, orientation, num_map_tokens=4)
        assert (visual == EVERYWHERE).all() and (tokens == EVERYWHERE).all()
        assert visual.shape == (64,) and tokens.shape == (124,) and visual.dtype == tokens.dtype == np.uint32
