"""Layouts become arrays: what each format keeps, mixed instances, maps, and the words of masked attention."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from layout_cases import CONFIG, HAS, SHAPES, SMALL_CONFIG, check_grounding, layouts, mixed_layout

from common import parity
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import decode_mask, resize_map
from instdiff_jax.geometry.points import mask_points
from instdiff_jax.grounding import (
    FORMAT_CHOICES,
    instance_groundings,
    make_grounding,
    null_grounding,
    stack,
)
from instdiff_jax.layout import Instance, Layout
from instdiff_jax.models.regions import region_bits


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
    check_grounding(grounding)
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
    check_grounding(grounding)
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
    check_grounding(grounding)
    np.testing.assert_array_equal(grounding["maps"][::16, 0][:30], np.uint32(1) << np.arange(30, dtype=np.uint32))


def test_map_size_of_the_config():
    check_grounding(make_grounding(mixed_layout(), SMALL_CONFIG), 64)


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
        check_grounding(single)
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
    check_grounding(null)
    assert not any(np.any(values) for values in null.values())
    both = stack([null, make_grounding(mixed_layout(), CONFIG)])
    assert {key: values.shape[1:] for key, values in both.items()} == SHAPES
    np.testing.assert_array_equal(both["valid"].sum(axis=1), [0, 5])


@settings(max_examples=400, deadline=None)
@given(layouts(), st.sampled_from(FORMAT_CHOICES), st.integers(1, 9), st.integers(1, 9))
def test_any_valid_layout_becomes_a_valid_grounding(layout, format, height, width):
    assert Layout.from_dict(json.loads(layout.to_json())) == layout
    grounding = make_grounding(layout, SMALL_CONFIG, format)
    check_grounding(grounding, 64)
    for orientation in ("official", "correct", "strict"):
        visual, tokens = region_bits(grounding, height, width, orientation)
        assert visual.shape == (height * width,) and tokens.shape == (184,)
