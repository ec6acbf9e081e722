"""Annotation files as label tools and merges leave them: what is good is used, the rest is named."""

import base64
import io
import json
import logging

import numpy as np
import pytest
from coco_fixture import build, edit, make_coco, oriented
from PIL import Image

from instdiff_jax.cli import build_official_json, sample
from instdiff_jax.coco import Coco
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.split import read_split
from instdiff_jax.files import json_files
from instdiff_jax.geometry.masks import decode_mask
from instdiff_jax.layout import Layout


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "coco", train=4, val=2, broken=False)


def built(coco, change, *options):
    """The records by image id and the report of a build after a change to the annotations."""
    edit(coco, "instances_train2017", change)
    data_dir = coco.parent / "data"
    build(coco, data_dir, "--splits", "train2017", *options)
    dataset = InstanceDataset(data_dir, "train2017")
    records = {dataset[i].image_id: dataset[i] for i in range(len(dataset))}
    return records, json.loads((data_dir / "report.json").read_text())


def reasons(report):
    return " | ".join(entry["reason"] for entry in report["skipped"])


DUPLICATES = {
    "image": (
        lambda d: d["images"][2].update(id=d["images"][0]["id"]),
        r"images\[0\] and images\[2\]: two have the id 10",
    ),
    "category": (
        lambda d: d["categories"].append({"id": 1, "name": "dog"}),
        r"categories\[0\] and categories\[3\]: two have the id 1 \(name 'circle' and 'dog'\)",
    ),
    "annotation": (
        lambda d: d["annotations"][3].update(id=d["annotations"][1]["id"]),
        r"annotations\[1\] and annotations\[3\]: two have the id 1001",
    ),
    "empty name": (lambda d: d["categories"][1].update(name=" "), r"categories\[1\].name: empty"),
}


@pytest.mark.parametrize("kind", DUPLICATES)
def test_two_of_one_id(coco, kind):
    """The same line from a build, from --coco and from an evaluation."""
    change, message = DUPLICATES[kind]
    with pytest.raises(InputError, match=message):
        built(coco, change)
    with pytest.raises(InputError, match=message):
        read_split(coco, "train2017")
    file = coco / "annotations" / "instances_train2017.json"
    flags = ["--coco", str(file), "--image_id", "10", "--checkpoint", str(coco)]
    with pytest.raises(InputError, match=message):
        sample.main(flags)


def test_types_that_are_plainly_meant(coco, caplog):
    def change(data):
        for row in data["annotations"]:
            row.update(iscrowd="0", image_id=str(row["image_id"]), category_id=float(row["category_id"]))
        data["annotations"][1]["iscrowd"] = "true"

    count = len(json.loads((coco / "annotations" / "instances_train2017.json").read_text())["annotations"])
    with caplog.at_level(logging.WARNING):
        records, report = built(coco, change)
    crowds = [item.annotation_id for record in records.values() for item in record.instances if item.crowd]
    assert crowds == [1001] and sum(len(record.instances) for record in records.values()) == count
    said = [note["note"] for note in report["notes"]]
    assert len(said) == 3  # once for a field
    assert f"annotations[0].iscrowd: '0' is taken as 0; {count} in all" in said
    assert len(caplog.records) == 3
    split = read_split(coco, "train2017")
    assert sum(not target.asked for scene in split.scenes for target in scene.targets) >= 1


BAD_FIELDS = [
    ("iscrowd", "perhaps", "iscrowd: expected true or false"),
    ("iscrowd", [], "iscrowd: expected true or false"),
    ("category_id", 77, "category_id: no category has the id 77"),
    ("category_id", None, "category_id: no category has the id None"),
    ("category_id", {}, "category_id: no category has the id {}"),
    ("category_id", 10**400, "category_id: no category has the id 1000"),
    ("image_id", [1], r"image_id: no image has the id [1]"),
    ("image_id", 10**30, "image_id: no image has the id 1000"),
    ("bbox", [1, 2, 10**400, 4], "bbox: expected"),
    ("bbox", "text", "bbox: expected"),
]


@pytest.mark.parametrize(("key", "value", "reason"), BAD_FIELDS)
def test_one_bad_annotation_does_not_end_a_build(coco, key, value, reason):
    records, report = built(coco, lambda data: data["annotations"][3].update({key: value}))
    assert len(records) == 4 and report["counts"]["train2017 annotation"] == 1
    assert f"annotations[3].{reason}" in reasons(report)


def test_bad_rows_of_any_table_are_left_out(coco):
    def change(data):
        data["images"][1]["id"] = [1]
        data["images"] += [3, {"id": -5, "file_name": "x" * 1000}, {"id": 2**70}]
        data["images"][3]["file_name"] = "\ud800.jpg"
        data["categories"] += [None, {"id": 50, "name": None}, {"id": "a", "name": "b"}, {"id": 51, "name": "\ud800"}]
        data["annotations"] += ["row", {"id": 10**30, "image_id": 10, "category_id": 51, "bbox": [1, 1, 9, 9]}]

    edit(coco, "captions_train2017", lambda d: d["annotations"].extend([7, {"image_id": 10, "caption": "\udc80"}]))
    records, report = built(coco, change)
    assert sorted(records) == [10, 30]
    counts = report["counts"]
    assert (counts["train2017 image"], counts["train2017 category"]) == (5, 4)
    assert all(len(entry["reason"]) < 300 for entry in report["skipped"])


def test_captions_of_instances(coco):
    (coco / "own.json").write_text(
        json.dumps({"1000": "a red one", "1001": 5, "1002": "\ud800", "x" * 999: "nobody's"})
    )
    _, report = built(coco, lambda data: None, "--instance_captions", str(coco / "own.json"))
    assert report["counts"] == {"instance caption": 3}


@pytest.mark.parametrize(
    ("mask", "pixels"),
    [
        ([[]], 0),
        ([10, 10, 40, 40], 0),
        ({"size": [3, 3], "counts": [9]}, 0),
        ("mask", 0),
        ({}, 0),
        ([[1, 2, 3], [10, 10, 40, 10, 40, 40, 10, 40], []], 900),
    ],
)
def test_a_bad_mask_keeps_the_box_and_the_good_rings(coco, mask, pixels):
    records, report = built(coco, lambda data: data["annotations"][0].update(segmentation=mask))
    record = records[10]
    (instance,) = record.instances
    assert instance.box == pytest.approx(tuple(instance.box)) and instance.category == "circle"
    if pixels:
        rle = {"size": [record.height, record.width], "counts": instance.mask}
        assert decode_mask(rle, record.height, record.width, "test").sum() == pytest.approx(pixels, rel=0.05)
    else:
        assert instance.mask == b""
    assert ("annotations[0].segmentation" in reasons(report)) == (mask != {})


def test_an_empty_object_is_no_mask_everywhere(coco):
    edit(coco, "instances_train2017", lambda data: data["annotations"][0].update(segmentation={}))
    layout = Layout.from_coco(coco / "annotations" / "instances_train2017.json", 10)
    assert layout.instances[0].mask is None and layout.instances[0].box is not None


def test_the_reasons_stay_when_no_image_can_be_used(coco):
    for path in (coco / "train2017").iterdir():
        path.write_bytes(b"GIF89a")
    message = r"split train2017: empty.*000000000010.jpg: cannot be read as an image.*data/report.json"
    for _ in range(2):  # the report of the first is no obstacle
        with pytest.raises(InputError, match=message):
            built(coco, lambda data: None)
    assert [path.name for path in (coco.parent / "data").iterdir()] == ["report.json"]
    report = json.loads((coco.parent / "data" / "report.json").read_text())
    assert report["counts"] == {"train2017 image": 4}


def test_a_failed_overwrite_keeps_the_old_dataset(coco):
    built(coco, lambda data: None)
    with pytest.raises(InputError, match="report-failed.json"):
        built(coco, lambda data: data.update(annotations=[]), "--overwrite")
    assert len(InstanceDataset(coco.parent / "data", "train2017")) == 4


def test_a_dataset_without_instances(coco):
    built(coco, lambda data: None)
    meta = json.loads((coco.parent / "data" / "dataset.json").read_text())
    meta["splits"]["train2017"]["instances"] = 0  # of an older build
    with pytest.raises(InputError, match="damaged or edited"):
        (coco.parent / "data" / "dataset.json").write_text(json.dumps(meta))
        InstanceDataset(coco.parent / "data", "train2017")
    del meta["crc32"]
    (coco.parent / "data" / "dataset.json").write_text(json.dumps(meta))
    with pytest.raises(InputError, match="split train2017: no instances"):
        InstanceDataset(coco.parent / "data", "train2017")
    with pytest.raises(InputError, match="split train2017: no instance in 4 images"):
        built(coco, lambda data: data.update(annotations=[]), "--overwrite")


@pytest.mark.parametrize("name", ["all", "", "val.2017", "train v2", "train[:10]", "-x"])
def test_names_of_splits(tmp_path, name):
    make_coco(tmp_path / "coco", train=2, val=2, names=("train", name or "val"), broken=False)
    if not name:
        (tmp_path / "coco" / "annotations" / "instances_.json").write_text("{}")
        (tmp_path / "coco" / "images").mkdir()
    with pytest.raises(InputError, match=r"split .*: expected a name of letters"):
        build(tmp_path / "coco", tmp_path / "data")
    assert not (tmp_path / "data").exists()
    with pytest.raises(InputError, match="--split: split .*: expected a name of letters"):
        (tmp_path / "a.json").write_text("{}")
        flags = ["--input", str(tmp_path / "a.json"), "--data_dir", str(tmp_path / "data"), f"--split={name}"]
        build_official_json.main(flags)


def test_a_file_of_annotations_in_capitals_is_said(coco):
    notes = coco / "annotations"
    (notes / "instances_val2017.json").rename(notes / "instances_val2017.JSON")
    build(coco, coco.parent / "data")
    report = json.loads((coco.parent / "data" / "report.json").read_text())
    assert [entry["name"] for entry in report["skipped"]] == ["instances_val2017.JSON"]


def test_rotated_and_normalised_boxes_are_said(coco):
    def rotated(data):
        data["annotations"][2]["attributes"] = {"occluded": False, "rotation": 30.0}

    _, report = built(coco, rotated)
    assert "annotations[2].attributes.rotation: 30.0" in report["notes"][0]["note"]

    def normalised(data):
        for row in data["annotations"]:
            row.update(bbox=[value / 1000 for value in row["bbox"]], segmentation=[])

    edit(coco, "instances_val2017", normalised)
    notes = Coco(coco / "annotations" / "instances_val2017.json").notes
    assert len(notes) == 1 and "annotations[].bbox: no number is over 1" in notes[0]


def test_normalised_boxes_of_a_layout_are_said(caplog):
    anno = {"caption": "a dog", "bbox": [0.25, 0.5, 0.5, 0.5]}
    with caplog.at_level(logging.WARNING):
        Layout.from_dict({"caption": "", "width": 512, "height": 512, "annos": [anno]}, "a.json")
    assert "a.json: annos[].bbox: no number is over 1" in caplog.text


def test_images_train_upright(coco):
    """A JPEG stored upside down: the boxes are of the upright image, and so are the pixels."""
    file = coco / "train2017" / "000000000010.jpg"
    pixels = np.asarray(Image.open(file))
    file.write_bytes(oriented(pixels[::-1, ::-1], 3, "JPEG"))
    other = coco / "train2017" / "000000000020.jpg"
    other.write_bytes(oriented(np.asarray(Image.open(other)), 6, "JPEG"))  # its annotated size is the stored one
    records, report = built(coco, lambda data: None)
    from instdiff_jax.images import open_image

    record = records[10]
    assert np.abs(np.asarray(open_image(record.image, (record.width, record.height))).astype(int) - pixels).mean() < 8
    assert records[20].width == 96 and len(records) == 4
    notes = {note["name"]: note["note"] for note in report["notes"]}
    assert "used upright" in notes["000000000010.jpg"] and "annotated as stored, 96x128" in notes["000000000020.jpg"]
    scene = next(scene for scene in read_split(coco, "train2017").scenes if scene.image_id == 10)
    assert scene.real_image().shape[2] == 3


def official(image=None, **fields):
    buffer = io.BytesIO()
    Image.new("RGB", (32, 24), (200, 10, 10)).save(buffer, "PNG")
    data = base64.b64encode(image or buffer.getvalue()).decode()
    anno = {"bbox": [2, 2, 12, 12], "category_name": "dog", "caption": "a dog"}
    return {"image": data, "caption": "a scene", "data_id": 1, "annos": [anno]} | fields


def imported(folder):
    build_official_json.main(["--input", str(folder), "--data_dir", str(folder.parent / "data")])
    dataset = InstanceDataset(folder.parent / "data", "train")
    return {dataset[i].file_name: dataset[i] for i in range(len(dataset))}


def test_official_json_of_any_kind(tmp_path):
    folder = tmp_path / "in"
    (folder / ".ipynb_checkpoints").mkdir(parents=True)
    good = official()
    stored = oriented(np.zeros((24, 32, 3), np.uint8), 6)
    files = {
        ".ipynb_checkpoints/a-checkpoint.json": good,
        "a.JSON": good | {"is_det": "0"},
        "b.json": good | {"data_id": 10**30, "is_det": "1", "caption": "\ud800"},
        "c.json": official(annos=good["annos"] + [good["annos"][0] | {"iscrowd": {}}, 5]),
        "d.json": official(annos=[good["annos"][0] | {"id": 10**400, "category_id": [], "iscrowd": "0"}]),
        "e.json": official(annos=good["annos"] + [{"bbox": [1, 1, 2, 2], "category_name": "\ud800"}]),
        "f.json": good | {"is_det": []},
        "g.json": official(oriented(np.zeros((24, 32, 3), np.uint8), 6)),
        "h.json": official(stored, width=32, height=24),
    }
    for name, item in files.items():
        (folder / name).write_text(json.dumps(item))
    (folder / "._a.json").write_bytes(b"\0\5\x16\7")
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "latin.json").write_bytes(b'{"caption": "caf\xe9"}')
    records = imported(folder)
    assert sorted(records) == ["a.JSON", "b.json", "c.json", "d.json", "e.json", "g.json", "h.json"]
    assert not records["a.JSON"].detection and records["b.json"].detection and records["b.json"].captions == ()
    assert all(len(record.instances) == 1 and not record.instances[0].crowd for record in records.values())
    assert (records["g.json"].width, records["h.json"].width) == (24, 32)
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["counts"]["train file"] == 3 and len(report["notes"]) == 2


def test_hidden_files_of_a_layout_folder(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.json", "B.JSON", "._a.json", ".ipynb_checkpoints/a.json", "c.txt"):
        (tmp_path / name).write_text("{}")
    assert [path.name for path in json_files(tmp_path)] == ["B.JSON", "a.json"]
    assert [path.name for path in json_files(tmp_path, inner=True)] == ["B.JSON", "a.json"]
