"""Layouts become arrays: what each format keeps, mixed instances, maps, and the words of masked attention."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common import parity
from configs.sd15 import get_config
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import decode_mask, resize_map
from instdiff_jax.geometry.points import mask_points
from instdiff_jax.grounding import (
    EVERYWHERE,
    FORMAT_CHOICES,
    instance_groundings,
    make_grounding,
    null_grounding,
    region_words,
    stack,
)
from instdiff_jax.layout import Instance, Layout

CONFIG = ModelConfig.from_dict(get_config().model.to_dict())
# Small maps keep the tests on thousands of random layouts fast.
SMALL_CONFIG = dataclasses.replace(CONFIG, unifusion=dataclasses.replace(CONFIG.unifusion, map_size=64))
HAS = ("has_box", "has_point", "has_scribble", "has_mask")
SHAPES = {
    "boxes": (30, 4),
    "points": (30, 2),
    "scribbles": (30, 40),
    "mask_points": (30, 512),
    "maps": (512, 512),
    "phrase_embeddings": (30, 768),
    "valid": (30,),
    **dict.fromkeys(HAS, (30,)),
    "has_map": (),
}


def check(grounding, map_size=512):
    """Every array has its shape and type, and lies where it should."""
    shapes = SHAPES | {"maps": (map_size, map_size)}
    assert {key: np.shape(values) for key, values in grounding.items()} == shapes
    for key, values in grounding.items():
        assert values.dtype == (np.uint32 if key == "maps" else np.float32), key
        if key not in ("maps", "phrase_embeddings"):
            assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1, key
    assert grounding["maps"].max() < 1 << 30
    for key in ("valid", *HAS):
        assert set(np.unique(grounding[key])) <= {0, 1}
        assert (grounding[key] <= grounding["valid"]).all()
    assert grounding["has_map"] == grounding["maps"].any()


def mixed_layout():
    """One instance in each format, and one in all of them, on a canvas that is not square."""
    mask = np.zeros((300, 400), bool)
    mask[50:150, 40:120] = True
    scribble = np.linspace((10, 20), (390, 280), 33)
    instances = (
        Instance("a box", box=(100, 30, 300, 270)),
        Instance("a point", point=(200, 75)),
        Instance("a scribble", scribble=scribble),
        Instance("a mask", mask=mask),
        Instance("all", box=(0, 0, 400, 300), point=(10, 20), scribble=scribble, mask=~mask),
    )
    return Layout("things", 400, 300, instances)


@pytest.mark.parametrize("drop", [("box",), ("point", "scribble"), ("mask",), ("box", "scribble", "mask")])
def test_dropped_formats_are_null_and_the_others_stay(drop):
    whole, left = make_grounding(mixed_layout(), CONFIG), make_grounding(mixed_layout(), CONFIG, drop=drop)
    for name in ("box", "point", "scribble", "mask"):
        assert whole[f"has_{name}"].any()
        expected = np.zeros(30) if name in drop else whole[f"has_{name}"]
        assert np.array_equal(left[f"has_{name}"], expected)
    assert left["has_map"] == left["maps"].any() == ("mask" not in drop)
    # Where instances are stays known: masked attention and the crop merge do not read a format.
    assert np.array_equal(left["boxes"], whole["boxes"]) and np.array_equal(left["valid"], whole["valid"])
    with pytest.raises(InputError, match="drop: expected some of box, point, scribble, mask, got 'bbox'"):
        make_grounding(mixed_layout(), CONFIG, drop=("bbox",))


def test_without_any_format_there_is_no_instance():
    nothing = make_grounding(mixed_layout(), CONFIG, drop=("box", "point", "scribble", "mask"))
    null = null_grounding(CONFIG.unifusion.map_size, CONFIG.unet.context_dim)
    assert nothing.keys() == null.keys() and all(np.array_equal(nothing[key], null[key]) for key in null)


def test_auto_keeps_what_each_instance_has():
    layout = mixed_layout()
    grounding = make_grounding(layout, CONFIG)
    check(grounding)
    np.testing.assert_array_equal(grounding["valid"], [1] * 5 + [0] * 25)
    expected = {"has_box": [1, 0, 0, 1, 1], "has_point": [1, 1, 0, 1, 1], "has_scribble": [0, 0, 1, 0, 1]}
    expected["has_mask"] = [0, 0, 0, 1, 1]
    for key, values in expected.items():
        np.testing.assert_array_equal(grounding[key][:5], values, key)
    np.testing.assert_allclose(grounding["boxes"][0], [0.25, 0.1, 0.75, 0.9], rtol=1e-6)
    np.testing.assert_allclose(grounding["boxes"][3], [0.1, 1 / 6, 0.3, 0.5], rtol=1e-6)
    points = [[0.5, 0.5], [0.5, 0.25], [0, 0], [0.2, 1 / 3], [0.025, 20 / 300]]
    np.testing.assert_allclose(grounding["points"][:5], points, rtol=1e-6)
    scribble = np.linspace((10, 20), (390, 280), 20) / (400, 300)
    np.testing.assert_allclose(grounding["scribbles"][2], scribble.ravel(), rtol=1e-5)
    expected = mask_points(layout.instances[3].mask) / np.array([400, 300])
    np.testing.assert_allclose(grounding["mask_points"][3], expected.ravel(), rtol=1e-6)
    for slot in (3, 4):
        expected = resize_map(layout.instances[slot].mask, 512)
        np.testing.assert_array_equal((grounding["maps"] >> np.uint32(slot)) & 1, expected)
    assert not ((grounding["maps"] & 7) > 0).any()


@pytest.mark.parametrize(
    ("format", "kept"),
    [("box", (1, 1, 0, 0)), ("point", (0, 1, 0, 0)), ("scribble", (1, 1, 1, 1)), ("mask", (1, 1, 0, 1))],
)
def test_named_formats_drop_and_keep_as_released(format, kept):
    grounding = make_grounding(mixed_layout(), CONFIG, format)
    check(grounding)
    for key, on in zip(HAS, kept):
        np.testing.assert_array_equal(grounding[key], on * grounding["valid"], key)
    auto = make_grounding(mixed_layout(), CONFIG)
    arrays = ("boxes", "points", "scribbles", "mask_points")
    for key, on in zip(arrays, kept):
        np.testing.assert_array_equal(grounding[key][4], on * auto[key][4], key)
    # What a kept format lacks stays zero: the released code derives no box from a mask.
    assert not grounding["boxes"][[1, 2, 3]].any() and not grounding["points"][[2, 3]].any()
    np.testing.assert_array_equal(grounding["points"][:2], auto["points"][:2])
    assert grounding["has_map"] == kept[3] and grounding["maps"].any() == bool(kept[3])


def test_arrays_equal_the_official_arithmetic():
    values = json.loads(str(parity("end_to_end_small_mask")["layout"]))
    grounding = make_grounding(Layout.from_dict(values), CONFIG, "mask")
    for slot, anno in enumerate(values["annos"]):
        x, y, w, h = anno["bbox"]
        box = [x / 256, y / 256, (x + w) / 256, (y + h) / 256]
        np.testing.assert_array_equal(grounding["boxes"][slot], np.float32(box))
        center = [(box[0] + box[2]) / 2, (box[1] + box[3]) / 2]
        np.testing.assert_array_equal(grounding["points"][slot], np.float32(center))
        mask = decode_mask(anno["mask"], 256, 256, "mask")
        points = np.minimum(mask_points(mask).astype(np.float64) / 256, 1)
        np.testing.assert_array_equal(grounding["mask_points"][slot], points.ravel().astype(np.float32))


def test_thirty_masks_use_bits_0_to_29():
    mask = np.zeros((64, 64), bool)
    instances = []
    for i in range(30):
        mask = np.zeros((64, 64), bool)
        mask[i * 2] = True
        instances.append(Instance(f"row {i}", mask=mask))
    grounding = make_grounding(Layout("rows", 64, 64, tuple(instances)), CONFIG)
    check(grounding)
    np.testing.assert_array_equal(grounding["maps"][::16, 0][:30], np.uint32(1) << np.arange(30, dtype=np.uint32))


def test_map_size_of_the_config():
    check(make_grounding(mixed_layout(), SMALL_CONFIG), 64)


def test_unknown_format():
    with pytest.raises(InputError, match="^format: expected one of auto, box"):
        make_grounding(mixed_layout(), CONFIG, "boxes")


@pytest.mark.parametrize("format", FORMAT_CHOICES)
def test_instance_groundings_move_each_instance_to_slot_0(format):
    grounding = make_grounding(mixed_layout(), CONFIG, format)
    grounding["phrase_embeddings"][:5] = np.arange(1, 6)[:, None]
    alone = instance_groundings(grounding)
    assert len(alone) == 5
    for slot, single in enumerate(alone):
        check(single)
        for key in SHAPES:
            if key == "maps":
                np.testing.assert_array_equal(single[key], (grounding[key] >> np.uint32(slot)) & 1)
            elif key != "has_map":
                np.testing.assert_array_equal(single[key][0], grounding[key][slot])
                assert not single[key][1:].any()
        # The same as a layout of that instance only.
        expected = make_grounding(Layout("", 400, 300, mixed_layout().instances[slot : slot + 1]), CONFIG, format)
        for key in SHAPES:
            if key != "phrase_embeddings":
                np.testing.assert_array_equal(single[key], expected[key], key)
    assert not instance_groundings(null_grounding(512, 768))


def test_null_and_stack():
    null = null_grounding(512, 768)
    check(null)
    assert not any(np.any(values) for values in null.values())
    both = stack([null, make_grounding(mixed_layout(), CONFIG)])
    assert {key: values.shape[1:] for key, values in both.items()} == SHAPES
    np.testing.assert_array_equal(both["valid"].sum(axis=1), [0, 5])


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
    visual, tokens = region_words(box_grounding(boxes), 64, 64, "official")
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
        visual, tokens = region_words(box_grounding(corners), 16, 16, "official")
        att_masks = np.zeros((30, 16, 16), bool)
        for slot, box in enumerate(corners.astype(np.float32)):
            x0, y0, x1, y1 = (int(np.round(edge * 16)) for edge in box)
            att_masks[slot, x0:x1, y0:y1] = True
        keys = np.concatenate([visual, tokens])
        ours = ((visual | EVERYWHERE)[:, None] & keys) != 0
        np.testing.assert_array_equal(ours | np.eye(*ours.shape, dtype=bool), official_mask(att_masks))


def test_correct_orientation_on_a_canvas_that_is_not_square():
    visual, _ = region_words(box_grounding([(0.25, 0.5, 0.5, 1.0)]), 64, 96, "correct")
    expected = np.zeros((64, 96), bool)
    expected[32:64, 24:48] = True
    np.testing.assert_array_equal(visual.reshape(64, 96) == 1, expected)
    visual, _ = region_words(box_grounding([(0.25, 0.5, 0.5, 1.0)]), 64, 96, "official")
    expected = np.zeros((64, 96), bool)
    expected[16:32, 48:96] = True
    np.testing.assert_array_equal(visual.reshape(64, 96) == 1, expected)


def test_strict_masks_every_token_of_an_instance():
    visual, tokens = region_words(box_grounding([(0.25, 0.5, 0.5, 1.0), (0, 0, 0.25, 0.25)]), 8, 8, "strict")
    correct, _ = region_words(box_grounding([(0.25, 0.5, 0.5, 1.0), (0, 0, 0.25, 0.25)]), 8, 8, "correct")
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
    visual, tokens = region_words(grounding, 16, 16, "strict")
    words = visual.reshape(16, 16)
    point = np.zeros((16, 16), bool)
    point[2:6, 6:10] = True  # cells whose centres lie within 1/8 of (0.5, 0.25)
    np.testing.assert_array_equal(words & 1 > 0, point)
    scribble = np.zeros((16, 16), bool)
    scribble[13:, :] = True  # those within 0.08 of a line at 0.9
    np.testing.assert_array_equal(words & 2 > 0, scribble)
    # The third instance has no place: seen everywhere.
    assert tokens[:3].tolist() == tokens[30:33].tolist() == [1, 2, EVERYWHERE]
    assert (region_words(grounding, 16, 16, "correct")[0] == EVERYWHERE).all()


def test_strict_takes_the_cells_of_a_mask_instead_of_its_box():
    mask = np.zeros((64, 64), bool)
    mask[16:48, 16:32] = True  # a whole number of cells of 4 pixels,
    mask[48:50, 16:32] = True  # half of four more,
    mask[16:48, 32:34] = True  # half of eight more,
    mask[50, 60] = True  # and a pixel far away: less than a quarter of its cell, but in the box
    layout = Layout("", 64, 64, (Instance("a mask", mask=mask), Instance("a box", box=(0, 0, 8, 8))))
    grounding = make_grounding(layout, SMALL_CONFIG)
    visual, tokens = region_words(grounding, 16, 16, "strict")
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
        region_words(make_grounding(layout, SMALL_CONFIG, drop=("mask",)), 16, 16, "strict"),
        region_words(grounding, 16, 16, "correct"),
    ):
        np.testing.assert_array_equal(other[0].reshape(16, 16) & 1 > 0, box)


@pytest.mark.parametrize("side", [1, 3, 16, 24, 64, 100])
def test_strict_keeps_a_cell_of_every_mask_on_any_grid(side):
    """A mask of one pixel, and one of all; on grids that do not divide the map, and finer than it."""
    for pixel in [(0, 0), (63, 63), (17, 40)]:
        mask = np.zeros((64, 64), bool)
        mask[pixel] = True
        layout = Layout("", 64, 64, (Instance("one", mask=mask), Instance("all", mask=np.ones((64, 64), bool))))
        visual, _ = region_words(make_grounding(layout, SMALL_CONFIG), side, side, "strict")
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
    visual, _ = region_words(grounding, 16, 16, "strict")
    assert (visual == 1).sum() == 16


def test_tiny_boxes_keep_one_cell_when_correct():
    for box in [(0.5, 0.5, 0.501, 0.501), (0.999, 0.999, 1, 1), (0, 0, 1e-4, 1e-4), (0.3, 0, 0.301, 1)]:
        visual, tokens = region_words(box_grounding([box]), 64, 64, "correct")
        assert (visual == 1).sum() in (1, 64) and tokens[0] == 1


def test_instances_without_a_region():
    layout = Layout("", 64, 64, (Instance("a box", box=(0, 0, 32, 64)), Instance("a point", point=(40, 9))))
    grounding = make_grounding(layout, CONFIG)
    visual, tokens = region_words(grounding, 64, 64, "correct")
    assert tokens[0] == tokens[90] == 1 and tokens[1] == tokens[91] == EVERYWHERE and not tokens[2] and not tokens[92]
    assert (visual.reshape(64, 64)[:, :32] == 1).all() and not visual.reshape(64, 64)[:, 32:].any()
    _, tokens = region_words(grounding, 64, 64, "official")
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
        visual, tokens = region_words(grounding, 8, 8, orientation, num_map_tokens=4)
        assert (visual == EVERYWHERE).all() and (tokens == EVERYWHERE).all()
        assert visual.shape == (64,) and tokens.shape == (124,) and visual.dtype == tokens.dtype == np.uint32


@st.composite
def layouts(draw):
    """Valid layouts of any mixture of formats on small canvases."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    x, y = st.floats(0, width), st.floats(0, height)
    instances = []
    for i in range(draw(st.integers(1, 4))):
        chosen = draw(st.sets(st.sampled_from(["box", "point", "scribble", "mask"]), min_size=1))
        places = {}
        if "box" in chosen:
            x0, y0 = draw(st.floats(-50, width - 0.01)), draw(st.floats(-50, height - 0.01))
            x1, y1 = draw(st.floats(max(x0, 0) + 0.005, 200)), draw(st.floats(max(y0, 0) + 0.005, 200))
            places["box"] = (x0, y0, x1, y1)
        if "point" in chosen:
            places["point"] = draw(st.tuples(x, y))
        if "scribble" in chosen:
            places["scribble"] = np.array(draw(st.lists(st.tuples(x, y), min_size=2, max_size=30)))
        if "mask" in chosen:
            rng = np.random.default_rng(draw(st.integers(0, 1000)))
            mask = rng.random((height, width)) < rng.random()
            mask[rng.integers(height), rng.integers(width)] = True
            places["mask"] = mask
        instances.append(Instance(f"thing {i}", **places))
    return Layout("", width, height, tuple(instances))


@settings(max_examples=400, deadline=None)
@given(layouts(), st.sampled_from(FORMAT_CHOICES), st.integers(1, 9), st.integers(1, 9))
def test_any_valid_layout_becomes_a_valid_grounding(layout, format, height, width):
    assert Layout.from_dict(json.loads(layout.to_json())) == layout
    grounding = make_grounding(layout, SMALL_CONFIG, format)
    check(grounding, 64)
    for orientation in ("official", "correct", "strict"):
        visual, tokens = region_words(grounding, height, width, orientation)
        assert visual.shape == (height * width,) and tokens.shape == (184,)
