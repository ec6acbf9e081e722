"""Layout files: the official JSON, COCO, round trips, and one clear line for whatever is wrong."""

import copy
import glob
import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_cases import SMALL_CONFIG, check_grounding, mixed_layout

from common import parity
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.grounding import FORMAT_CHOICES, make_grounding
from instdiff_jax.layout import Instance, Layout

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


@pytest.fixture
def coco(tmp_path):
    """A COCO annotation file with polygons, RLE, a crowd and two images, and its captions."""
    rle = encode_mask(mask_of())
    annotations = [
        {"image_id": 7, "category_id": 2, "bbox": [20, 10, 40, 20], "segmentation": [[20, 10, 60, 10, 60, 30]]},
        {"image_id": 8, "category_id": 1, "bbox": [1, 1, 5, 5], "segmentation": []},
        {"image_id": 7, "category_id": 1, "bbox": [0, 0, 9, 9], "iscrowd": 1},
        {"image_id": 7, "category_id": 1, "bbox": [20, 10, 40, 20], "segmentation": rle, "iscrowd": 0},
        {"image_id": 7, "category_id": 2, "bbox": [2, 3, 4, 5], "segmentation": [], "caption": "a very small dog"},
    ]
    data = {
        "images": [{"id": 7, "width": 100, "height": 80}, {"id": 8, "width": 10, "height": 10}, {"id": 9}],
        "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}],
        "annotations": annotations,
    }
    (tmp_path / "instances.json").write_text(json.dumps(data))
    captions = {"annotations": [{"image_id": 8, "caption": "eight"}, {"image_id": 7, "caption": "seven"}]}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def test_coco(coco):
    layout = Layout.from_coco(coco / "instances.json", 7, coco / "captions.json")
    assert (layout.caption, layout.width, layout.height, layout.name) == ("seven", 100, 80, "7")
    assert [instance.caption for instance in layout.instances] == ["dog", "cat", "a very small dog"]
    assert layout.instances[0].box == (20, 10, 60, 30) and layout.instances[0].mask[11, 55]
    np.testing.assert_array_equal(layout.instances[1].mask, mask_of())
    assert layout.instances[2].mask is None
    assert Layout.from_coco(coco / "instances.json", 7).caption == "2 dog, 1 cat"


def test_bad_coco(coco):
    file = coco / "instances.json"
    for arguments, message in [
        ((file, 70), "images: no image has the id 70"),
        ((file, 9), r"images\[2\].width: expected whole pixels from 1 to"),
        ((file, 8, coco / "absent.json"), "absent.json: cannot be read"),
        ((coco / "captions.json", 7), "captions.json: images: expected a list of objects"),
    ]:
        with pytest.raises(InputError, match=message):
            Layout.from_coco(*arguments)
    data = json.loads(file.read_text())
    data["annotations"][0]["category_id"] = 5
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"instances.json: annotations\[0\].category_id: no category has the id 5"):
        Layout.from_coco(file, 7)
    with pytest.raises(InputError, match="no caption for image 9"):
        Layout.from_coco(file, 9, coco / "captions.json")


def outcome(values):
    """A valid grounding, or an InputError of one line; anything else fails the test."""
    try:
        layout = Layout.from_dict(values, "file.json")
    except InputError as error:
        assert str(error).startswith("file.json: ") and "\n" not in str(error) and len(str(error)) < 400
        return
    assert Layout.from_dict(json.loads(layout.to_json())) == layout
    check_grounding(make_grounding(layout, SMALL_CONFIG, FORMAT_CHOICES[len(layout.caption) % len(FORMAT_CHOICES)]), 64)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 120),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([math.nan, math.inf, -math.inf, 10**400, 1e308, -0.0, "\ud800", "a\nb"]),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
NUMBER = st.one_of(st.integers(-10, 110), st.floats(-10, 110))
RLE = st.fixed_dictionaries(
    {"size": st.just([80, 100]), "counts": st.sampled_from([[4000, 4000], [0, 8000], [8000], [7999, 1], "abc"])}
)
ANNO = st.fixed_dictionaries(
    {"caption": st.one_of(st.just("a thing"), st.text(max_size=5))},
    optional={
        "bbox": st.one_of(st.lists(NUMBER, min_size=4, max_size=4), JUNK),
        "point": st.one_of(st.lists(NUMBER, min_size=2, max_size=2), JUNK),
        "scribble": st.one_of(st.lists(NUMBER, max_size=50), st.lists(st.lists(NUMBER, max_size=3), max_size=9), JUNK),
        "mask": st.one_of(RLE, st.lists(st.lists(NUMBER, max_size=12), max_size=3), JUNK),
        "category_name": st.one_of(st.text(max_size=4), JUNK),
    },
)
LAYOUT = st.fixed_dictionaries(
    {"caption": st.text(max_size=9), "width": st.just(100), "height": st.just(80), "annos": st.lists(ANNO, max_size=4)}
)


@settings(max_examples=900, deadline=None, suppress_health_check=list(HealthCheck))
@given(LAYOUT)
def test_random_layouts_end_in_a_grounding_or_an_input_error(values):
    outcome(values)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mangled_layouts_end_in_a_grounding_or_an_input_error(data):
    values = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        spot = values
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(spot[key], (dict, list)) and data.draw(st.booleans()):
                spot = spot[key]
                continue
            if data.draw(st.booleans()):
                spot[key] = data.draw(JUNK)
            else:
                del spot[key]
            break
    outcome(values)


@settings(max_examples=200, deadline=None)
@given(JUNK)
def test_junk_is_an_input_error(values):
    outcome(values)


GOOD = {
    "caption": "a scene",
    "width": 100,
    "height": 80,
    "annos": [
        {"caption": "a", "bbox": [10, 10, 50, 60], "mask": []},
        {"caption": "b", "point": [10, 10], "scribble": [1, 2, 3, 4, 5, 6]},
        {"caption": "c", "mask": {"size": [80, 100], "counts": [4000, 4000]}, "category_name": "c"},
        {"caption": "d", "mask": [[10, 10, 50, 10, 40, 60]], "scribble": [[1, 2], [3, 4]]},
    ],
}
