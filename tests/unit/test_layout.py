"""Layouts: the official JSON, Python, round trips, and one clear line for whatever is wrong."""

import copy
import dataclasses
import glob
import json
import logging
import math
import pickle
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from layout_cases import SMALL_CONFIG, mixed_layout

from common import parity
from instdiff_jax import layout as layouts
from instdiff_jax.errors import InputError
from instdiff_jax.geometry import masks
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.grounding import instance_groundings, make_grounding
from instdiff_jax.layout import Instance, Layout
from instdiff_jax.sampling.visualize import draw_layout

EXAMPLES = sorted(glob.glob(str(Path(__file__).resolve().parent.parent.parent / "examples" / "demo_*.json")))


def simple(**anno):
    """The official JSON's object with one instance."""
    return {"caption": "a scene", "width": 100, "height": 80, "annos": [{"caption": "a thing", **anno}]}


def mask_of(height=80, width=100):
    mask = np.zeros((height, width), bool)
    mask[10:30, 20:60] = True
    return mask


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: Path(path).stem)
def test_official_demos(path):
    raw = json.loads(Path(path).read_text())
    layout = Layout.from_json(path)
    assert layout.name == Path(path).stem and (layout.width, layout.height) == (raw["width"], raw["height"])
    annos = [anno for anno in raw["annos"] if anno.get("bbox") != [0, 512, 0, 0]]
    assert len(layout.instances) == len(annos)
    for instance, anno in zip(layout.instances, annos):
        assert instance.caption == anno["caption"]
        assert (instance.box is None) == ("bbox" not in anno) and (instance.mask is None) == (not anno.get("mask"))
        if instance.box is not None:
            x, y, w, h = anno["bbox"]
            assert instance.box == (max(x, 0), max(y, 0), min(x + w, raw["width"]), min(y + h, raw["height"]))
        if instance.point is not None:
            assert instance.point == tuple(anno["point"])
    assert Layout.from_dict(json.loads(layout.to_json())) == layout


def test_the_demo_instance_without_a_place_is_named(caplog):
    with caplog.at_level(logging.WARNING):
        Layout.from_json(next(path for path in EXAMPLES if "rose" in path))
    (record,) = caplog.records
    assert "demo_rose_garden_painting.json: annos[27]: left out" in record.getMessage()


@pytest.mark.parametrize("name", ["end_to_end_small_box", "end_to_end_small_mask"])
def test_parity_layouts(name):
    values = json.loads(str(parity(name)["layout"]))
    layout = Layout.from_dict(values)
    assert len(layout.instances) == len(values["annos"])
    assert all((instance.mask is not None) == name.endswith("mask") for instance in layout.instances)


def test_all_formats_of_one_instance():
    rle = encode_mask(mask_of())
    places = dict(bbox=[10, 20.5, 30, 40], point=[5, 6], scribble=[1, 2, 3, 4, 5.5, 6], mask=rle)
    (instance,) = Layout.from_dict(simple(**places, category_name="thing")).instances
    assert instance.box == (10, 20.5, 40, 60.5) and instance.point == (5, 6) and instance.category_name == "thing"
    np.testing.assert_array_equal(instance.scribble, [[1, 2], [3, 4], [5.5, 6]])
    np.testing.assert_array_equal(instance.mask, mask_of())
    pairs = Layout.from_dict(simple(scribble=[[1, 2], [3, 4], [5.5, 6]])).instances[0]
    np.testing.assert_array_equal(pairs.scribble, instance.scribble)
    polygon = Layout.from_dict(simple(mask=[[20, 10, 60, 10, 60, 30, 20, 30]])).instances[0]
    assert polygon.mask[12:28, 22:58].all() and not polygon.mask[40:].any()


@pytest.mark.parametrize("absent", [None, []])
def test_absent_locations(absent):
    (instance,) = Layout.from_dict(simple(bbox=absent, mask=absent, scribble=absent, point=[1, 2], other={})).instances
    assert instance.box is None and instance.mask is None and instance.scribble is None and instance.point == (1, 2)


def test_the_category_stands_in_for_a_missing_caption():
    values = simple(point=[1, 2], category_name="dog")
    del values["annos"][0]["caption"]
    assert Layout.from_dict(values).instances[0].caption == "dog"


@pytest.mark.parametrize(
    ("box", "expected"),
    [
        ([-20, -10, 50, 30], (0, 0, 30, 20)),
        ([90, 70, 50, 30], (90, 70, 100, 80)),
        ([-5, -5, 1000, 1000], (0, 0, 100, 80)),
        ([99.5, 0, 3, 4], (99.5, 0, 100, 4)),
    ],
)
def test_boxes_that_stick_out_are_clipped(box, expected):
    assert Layout.from_dict(simple(bbox=box)).instances[0].box == expected


BAD_ANNO = [
    ("bbox", [0, 0, 0, 0]),
    ("bbox", [10, 10, 0, 20]),
    ("bbox", [10, 10, 20, -5]),
    ("bbox", [200, 10, 20, 20]),
    ("bbox", [-50, 10, 50, 20]),
    ("bbox", [100, 10, 20, 20]),
    ("bbox", [10, 10, 20]),
    ("bbox", "10 10 20 20"),
    ("bbox", {"x": 1}),
    ("bbox", 5),
    ("bbox", False),
    ("bbox", [1, 2, 3, True]),
    ("bbox", [1, 2, 3, None]),
    ("bbox", [1, 2, "3", 4]),
    ("bbox", [1, 2, [3], 4]),
    ("bbox", [1, 2, math.nan, 4]),
    ("bbox", [1, 2, math.inf, 4]),
    ("bbox", [1, 2, 10**400, 4]),
    ("point", [101, 5]),
    ("point", [5, -1]),
    ("point", [5]),
    ("point", [math.nan, 5]),
    ("point", [True, 5]),
    ("point", "5,5"),
    ("scribble", [1, 2]),
    ("scribble", [1, 2, 3]),
    ("scribble", [[1, 2], [3]]),
    ("scribble", [[1, 2], 3]),
    ("scribble", [[1, 2], [300, 3]]),
    ("scribble", [1, 2, 3, math.nan]),
    ("scribble", "abc"),
    ("scribble", {"0": 1}),
    ("scribble", [1, 2] * 20_000),
    ("mask", {"size": [80, 101], "counts": [8080]}),
    ("mask", {"size": [80, 100], "counts": [8000]}),
    ("mask", {"size": [100, 80], "counts": [4000, 4000]}),
    ("mask", {"size": [80, 100], "counts": [1, 2]}),
    ("mask", [[1, 2, 3, 4]]),
    ("mask", "iVBORw0KGgo"),
    ("caption", ""),
    ("caption", "   "),
    ("caption", 7),
    ("caption", ["a"]),
    ("caption", "half \ud800"),
    ("category_name", 7),
]


@pytest.mark.parametrize(("key", "value"), BAD_ANNO, ids=lambda value: repr(value)[:30])
def test_bad_instances_are_named(key, value):
    values = simple(point=[5, 5])
    values["annos"].append({"caption": "bad", key: value} if key != "caption" else {"point": [1, 1], key: value})
    if key == "category_name":
        values["annos"][1]["point"] = [1, 1]
    with pytest.raises(InputError) as error:
        Layout.from_dict(values, "dir/file.json")
    assert str(error.value).startswith(f"dir/file.json: annos[1].{key}")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


BAD_TOP = [
    ("caption", None, "caption"),
    ("caption", 3, "caption"),
    ("width", 0, "width"),
    ("width", -5, "width"),
    ("width", 512.0, "width"),
    ("width", True, "width"),
    ("width", "512", "width"),
    ("width", None, "width"),
    ("width", 10**9, "width"),
    ("height", math.nan, "height"),
    ("annos", None, "annos"),
    ("annos", {}, "annos"),
    ("annos", [], "annos"),
    ("annos", [3], "annos[0]"),
    ("annos", [None], "annos[0]"),
    ("annos", [{}], "annos[0].caption"),
    ("annos", [{"caption": "a"}], "annos[0]"),
    ("annos", [{"caption": "a", "mask": []}], "annos[0]"),
    ("annos", [{"caption": "a", "bbox": [0, 80, 0, 0]}], "annos"),
]


@pytest.mark.parametrize(("key", "value", "named"), BAD_TOP, ids=lambda value: repr(value)[:30])
def test_bad_layouts_are_named(key, value, named):
    values = simple(mask=encode_mask(mask_of())) | {key: value}
    with pytest.raises(InputError) as error:
        Layout.from_dict(values, "file.json")
    assert str(error.value).startswith(f"file.json: {named}: ") and "\n" not in str(error.value)


def test_missing_keys_are_named():
    for key in ("caption", "width", "height", "annos"):
        values = simple(point=[1, 2])
        del values[key]
        with pytest.raises(InputError, match=f"^file.json: {key}: missing"):
            Layout.from_dict(values, "file.json")


def test_a_key_in_another_spelling_is_not_ignored():
    for key, right in (("BBox", "bbox"), ("mask ", "mask"), ("Scribble", "scribble")):
        values = simple(point=[1, 2]) | {"annos": [{"caption": "a", "point": [1, 2], key: [[1, 2], [3, 4]]}]}
        with pytest.raises(InputError, match=rf"^file.json: annos\[0\].{right}: expected this key, got '{key}'"):
            Layout.from_dict(values, "file.json")


DEEP, LONG = b"[" * 100_000, b'{"width": ' + b"9" * 5000 + b"}"


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1, 2]", b"3", b"null", b"\xff\xfe\x00", DEEP, LONG], ids=lambda text: repr(text)[:20]
)
def test_files_that_are_no_layout(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(InputError) as error:
        Layout.from_json(path)
    assert str(error.value).startswith(f"{path}: ") and "\n" not in str(error.value)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "absent.json"):
        with pytest.raises(InputError, match=f"^{path}: cannot be read"):
            Layout.from_json(path)


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(simple(point=[1, 2])), encoding="utf-8-sig")
    assert Layout.from_json(path).name == "x"


def test_more_than_thirty_instances():
    annos = [{"caption": f"thing {i}", "bbox": [0, 0, 1 + i, 2]} for i in range(35)]
    annos[3] = {"caption": "a dot", "point": [1, 1]}
    annos[34] = {"caption": "a mask", "mask": encode_mask(mask_of())}
    values = simple() | {"annos": annos}
    with pytest.raises(InputError, match=r"^file.json: annos: expected at most 30, got 35"):
        Layout.from_dict(values, "file.json")
    layout = Layout.from_dict(values, "file.json", max_instances="largest")
    assert [instance.caption for instance in layout.instances] == [f"thing {i}" for i in range(5, 34)] + ["a mask"]
    with pytest.raises(InputError, match="max_instances"):
        Layout.from_dict(values, max_instances="some")


def test_python_layouts_are_checked_in_their_own_words():
    with pytest.raises(InputError, match=r"^scene: instances\[0\]\.box: expected some area"):
        Layout("a", 10, 10, (Instance("x", box=(20, 20, 30, 30)),), name="scene")
    with pytest.raises(InputError, match=r"^layout: instances\[0\]\.box: expected x0 <= x1"):
        Layout("a", 10, 10, (Instance("x", box=(5, 5, 3, 8)),))
    with pytest.raises(InputError, match=r"instances\[0\]: expected an Instance, got dict"):
        Layout("a", 10, 10, ({"caption": "x"},))
    with pytest.raises(InputError, match=r"instances\[0\]: expected an Instance, got NoneType"):
        Layout("a", 10, 10, (None,))
    ones = np.ones((10, 10))
    for mask in (ones < 0, np.ones((10, 11), bool), 2 * ones.astype(int), ones, [[1]], "m"):
        with pytest.raises(InputError, match=r"^layout: instances\[0\]\.mask: expected"):
            Layout("a", 10, 10, (Instance("x", mask=mask),))
    for scribble in (np.ones(4), np.float64(3), np.ones((2, 3)), np.array([["a", "b"]] * 2), {1, 2}):
        with pytest.raises(InputError, match=r"^layout: instances\[0\]\.scribble"):
            Layout("a", 10, 10, (Instance("x", scribble=scribble),))
    mask = np.ones((10, 10), np.uint8)
    layout = Layout("a", np.int64(10), 10, [Instance("x", box=np.array([1, 2, 3, 4.0]), point=[1, 2], mask=mask)])
    assert type(layout.width) is int and layout.instances[0].box == (1, 2, 3, 4)
    assert layout.instances[0].mask.dtype == bool and isinstance(layout.instances, tuple)


def test_equality():
    assert mixed_layout() == mixed_layout()
    instance = mixed_layout().instances[4]
    assert instance != mixed_layout().instances[0] and instance != "all"


def test_masks_are_read_once_and_decoded_once(tmp_path, monkeypatch):
    """Through a whole image: read, made a grounding, drawn, written again."""
    mask = np.zeros((80, 100), bool)
    mask[3:71, 5:9] = True  # in no other test: masks are kept a while
    values = simple(mask=encode_mask(mask))
    values["annos"].append({"caption": "another", "mask": [[20, 10, 61, 10, 60, 33]]})
    (tmp_path / "x.json").write_text(json.dumps(values))
    calls = []

    def counted(function):
        def call(*args):
            calls.append(function.__name__)
            return function(*args)

        return call

    monkeypatch.setattr(layouts, "read_json", counted(layouts.read_json))
    monkeypatch.setattr(masks, "decode_mask", counted(masks.decode_mask))
    layout = Layout.from_json(tmp_path / "x.json")
    assert calls == ["read_json"]
    instance_groundings(make_grounding(layout, SMALL_CONFIG))
    draw_layout(layout)
    assert Layout.from_dict(json.loads(layout.to_json(tmp_path / "y.json"))) == layout
    assert sorted(calls) == ["decode_mask", "decode_mask", "read_json"]
    assert Layout.from_json(tmp_path / "y.json", name="x") == layout


def test_many_layouts_keep_no_decoded_masks():
    mask = np.zeros((512, 512), bool)
    held = []
    tracemalloc.start()
    for i in range(300):
        mask[i, : 100 + i] = True
        held.append(Layout("a", 512, 512, (Instance("x", mask=mask.copy()),)))
        assert held[-1].instances[0].mask.sum() == held[-1].instances[0].area == mask.sum()
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 40 * mask.size, "32 masks at most are kept"


def test_a_decoded_mask_cannot_be_changed():
    (instance,) = Layout("a", 100, 80, (Instance("x", mask=mask_of()),)).instances
    with pytest.raises(ValueError, match="read-only"):
        instance.mask[0, 0] = True
    moved = dataclasses.replace(instance, caption="y", mask=~instance.mask)
    np.testing.assert_array_equal(moved.mask, ~mask_of())
    assert pickle.loads(pickle.dumps(instance)) == instance and copy.deepcopy(instance) == instance


def test_many_full_masks_are_counted_before_pixels_are_made():
    """A small file of 400 masks on the largest canvas is one line, in little memory."""
    side = 8192
    mask = {"size": [side, side], "counts": [0, side * side]}
    annos = [{"caption": "a", "mask": mask} for _ in range(400)]
    values = {"caption": "a", "width": side, "height": side, "annos": annos}
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match="at most 30, got 400"):
            Layout.from_dict(values)
        assert tracemalloc.get_traced_memory()[1] < side * side
    finally:
        tracemalloc.stop()
