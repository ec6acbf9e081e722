"""Layout files of other tools: where their shapes land, and what is said of broken ones."""

import numpy as np
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.layout import Layout

IDEOGRAM = {
    "high_level_description": "a poster",
    "style_description": {"medium": "photograph"},
    "compositional_deconstruction": {
        "background": "a street",
        "elements": [
            {"type": "obj", "bbox": [250, 0, 750, 500], "desc": "a dog"},
            {"type": "text", "bbox": [0, 500, 100, 1000], "text": "HELLO", "desc": "in red"},
            {"type": "obj", "desc": "somewhere a bird"},
        ],
    },
}
LABELME = {
    "version": "5.4.1",
    "imageWidth": 64,
    "imageHeight": 48,
    "imagePath": "../../etc/passwd",
    "shapes": [
        {"label": "cat", "points": [[30, 20], [10, 4]], "shape_type": "rectangle", "description": "a black cat"},
        {"label": "sky", "points": [[0, 0], [64, 0], [64, 10], [0, 10]], "shape_type": "polygon", "description": ""},
        {"label": "sun", "points": [[40, 24], [40, 34]], "shape_type": "circle"},
        {"label": "eye", "points": [[12, 8]], "shape_type": "point"},
        {"label": "tail", "points": [[1, 2], [3, 4], [5, 9]], "shape_type": "linestrip"},
    ],
}
LAYOUTSAM = {
    "global_caption": "a room",
    "width": "100",
    "height": 80,
    "bbox_list": "[[10, 20, 40, 60], [0, 0, 100, 80]]",
    "region_captions": "['chair', 'wall']",
    "detail_region_captions": "['a wooden chair', 'a white wall']",
}


def test_ideogram():
    layout = Layout.from_dict(IDEOGRAM)
    assert (layout.caption, layout.width, layout.height) == ("a poster", 512, 512)
    assert [one.caption for one in layout.instances] == ["a dog", 'the text "HELLO", in red']
    assert np.allclose(layout.instances[0].box, [0, 128, 256, 384])
    assert np.allclose(layout.instances[1].box, [256, 0, 512, 51.2])
    wide = Layout.from_dict(IDEOGRAM | {"width": 1000})
    assert np.allclose(wide.instances[0].box, [0, 128, 500, 384])


def test_labelme():
    layout = Layout.from_dict(LABELME)
    cat, sky, sun, eye, tail = layout.instances
    assert layout.caption == "cat, sky, sun, eye, tail" and (layout.width, layout.height) == (64, 48)
    assert cat.caption == "a black cat" and cat.category_name == "cat" and cat.box == (10, 4, 30, 20)
    assert sky.caption == "sky" and sky.mask[:10].all() and not sky.mask[10:].any()
    assert abs(sun.area - np.pi * 100) < 10 and sun.mask[24, 40]
    assert eye.point == (12, 8) and tail.scribble.tolist() == [[1, 2], [3, 4], [5, 9]]


def test_layoutsam():
    layout = Layout.from_dict(LAYOUTSAM)
    assert (layout.caption, layout.width, layout.height) == ("a room", 100, 80)
    assert [one.caption for one in layout.instances] == ["a wooden chair", "a white wall"]
    assert layout.instances[0].box == (10, 20, 40, 60)
    short = Layout.from_dict(LAYOUTSAM | {"detail_region_captions": None, "bbox_list": [[1, 2, 3, 4], [5, 6, 7, 8]]})
    assert [one.caption for one in short.instances] == ["chair", "wall"]


def changed(values, key, **more):
    return values | {key: values[key] | more if isinstance(values[key], dict) else more}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (IDEOGRAM | {"compositional_deconstruction": 3}, "compositional_deconstruction: expected an object"),
        (changed(IDEOGRAM, "compositional_deconstruction", elements=3), "elements: expected a list"),
        (changed(IDEOGRAM, "compositional_deconstruction", elements=[3]), "elements\\[0\\]: expected an object"),
        (changed(IDEOGRAM, "compositional_deconstruction", elements=[{"bbox": [1]}]), "bbox: expected 4 numbers"),
        (changed(IDEOGRAM, "compositional_deconstruction", elements=[{}]), "expected at least one instance"),
        (IDEOGRAM | {"width": "wide"}, "width: expected whole pixels"),
        (LABELME | {"shapes": [{"points": [[0, "a"]]}]}, "shapes\\[0\\].points\\[0\\]: expected 2 numbers"),
        (LABELME | {"shapes": [{"points": [[0, 1]], "shape_type": "mask"}]}, "shape_type: expected one of"),
        (LABELME | {"shapes": [{"points": [[0, 1]]}]}, "points: expected at least 3, got 1"),
        (LABELME | {"imageWidth": None}, "width: expected whole pixels"),
        (LAYOUTSAM | {"bbox_list": "__import__('os')"}, "bbox_list: expected a list"),
        (LAYOUTSAM | {"bbox_list": "[[0, 0, 1, 1]]"}, "one for each of 1 boxes, got 2"),
        (LAYOUTSAM | {"bbox_list": [[0, 0, 1], [0, 0, 1, 1]]}, "bbox_list\\[0\\]: expected 4 numbers"),
    ],
)
def test_broken_files_are_one_line(values, words):
    with pytest.raises(InputError, match=f"layout: .*{words}|layout: {words}") as error:
        Layout.from_dict(values)
    assert "\n" not in str(error.value)
