"""COCO annotation files: indexed once, checked with one set of rules; layouts of their images."""

import json

import numpy as np
import pytest

from instdiff_jax import coco as cocos
from instdiff_jax.coco import Coco, count_names, split_files
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.layout import Layout


def mask_of(height=80, width=100):
    mask = np.zeros((height, width), bool)
    mask[10:30, 20:60] = True
    return mask


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
    for image in data["images"]:
        del image["id"]
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match=r"instances.json: images\[0\].id: expected a whole number"):
        Coco(file)


@pytest.mark.parametrize(
    ("key", "value", "field"),
    [
        ("bbox", [1, 2, 3], "bbox"),
        ("bbox", [1, 2, -3, 4], "bbox"),
        ("segmentation", [[1, 2, 3]], r"segmentation\[0\]"),
        ("segmentation", {"size": [1, 1], "counts": [1]}, "segmentation.size"),
        ("segmentation", {"size": [80, 100], "counts": [8000]}, "segmentation"),
        ("caption", 3, "caption"),
        ("point", [300, 3], "point"),
    ],
)
def test_errors_name_the_files_own_fields(coco, key, value, field):
    data = json.loads((coco / "instances.json").read_text())
    data["annotations"][4][key] = value
    (coco / "instances.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match=rf"instances.json: annotations\[4\].{field}: expected"):
        Layout.from_coco(coco / "instances.json", 7)


def test_a_file_is_read_once_for_many_images(coco, monkeypatch):
    read = []

    def counted(path, whole=cocos.read_json):
        read.append(path.name)
        return whole(path)

    monkeypatch.setattr(cocos, "read_json", counted)
    index = Coco(coco / "instances.json", coco / "captions.json")
    seven, eight = (Layout.from_coco(index, number) for number in (7, 8))
    assert read == ["instances.json", "captions.json"]
    assert (seven.caption, eight.caption) == ("seven", "eight")
    assert Layout.from_coco(index, 8, name="other", max_instances="largest").name == "other"


def test_what_belongs_to_nothing_is_named(coco):
    data = json.loads((coco / "instances.json").read_text())
    data["images"].append({"id": None, "file_name": "again.png"})
    data["annotations"].append({"id": 5, "image_id": 70})
    (coco / "instances.json").write_text(json.dumps(data))
    captions = {"annotations": [{"id": 1, "image_id": 8, "caption": " "}, {"image_id": 7, "caption": "two\nlines"}]}
    (coco / "captions.json").write_text(json.dumps(captions))
    index = Coco(coco / "instances.json", coco / "captions.json")
    assert [tuple(item) for item in index.unused] == [
        ("image", "'again.png'", f"images[3].id: expected a whole number from 0 to {2**63 - 1}, got None"),
        ("annotation", "annotation 5", "annotations[5].image_id: no image has the id 70"),
        ("caption", "caption 1", "annotations[0].caption: expected text that is not empty"),
    ]
    assert index.captions == {7: ["two lines"]} and index.image_ids == [7, 8, 9]


@pytest.mark.parametrize(
    "categories",
    [[{"id": "one", "name": "cat"}], [{"id": 1}], [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}], [3], {}],
)
def test_bad_categories(coco, categories):
    data = json.loads((coco / "instances.json").read_text()) | {"categories": categories}
    (coco / "instances.json").write_text(json.dumps(data))
    with pytest.raises(InputError, match="instances.json: categories"):
        Coco(coco / "instances.json")


def test_the_files_of_a_split(tmp_path):
    assert split_files(tmp_path, "val").images == tmp_path / "val"
    (tmp_path / "images" / "val").mkdir(parents=True)
    files = split_files(tmp_path, "val")
    assert files.images == tmp_path / "images" / "val"
    assert files.instances == tmp_path / "annotations" / "instances_val.json"
    assert files.captions == tmp_path / "annotations" / "captions_val.json"
    assert count_names(["dog", "cat", "dog"]) == "2 dog, 1 cat"
