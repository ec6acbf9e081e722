"""Integers of more digits than Python converts: the fault of one annotation, or one line."""

import json

import pytest
from coco_fixture import build, edit, make_coco

from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.split import read_split
from instdiff_jax.layout import Layout
from instdiff_jax.training import metrics


@pytest.fixture
def coco(tmp_path):
    return make_coco(tmp_path / "coco", train=4, val=2, broken=False)


LONG = "9" * 5000  # more digits than Python reads as an integer
PLACES = {
    "id": lambda row: row.update(id=LONG),
    "image": lambda row: row.update(image_id=LONG),
    "category": lambda row: row.update(category_id=LONG),
    "box": lambda row: row["bbox"].__setitem__(2, LONG),
    "crowd": lambda row: row.update(iscrowd=LONG),
    "polygon": lambda row: row.update(segmentation=[[LONG, 0, 5, 0, 5, 5]]),
    "run lengths": lambda row: row.update(segmentation={"size": [120, 160], "counts": [5, LONG]}),
    "size of run lengths": lambda row: row.update(segmentation={"size": [LONG, 160], "counts": [5, 6]}),
}


@pytest.mark.parametrize("place", PLACES)
def test_a_number_of_thousands_of_digits_is_its_annotations_fault(coco, place):
    edit(coco, "instances_train2017", lambda data: PLACES[place](data["annotations"][0]))
    file = coco / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace(f'"{LONG}"', LONG))
    records, report = built_as_is(coco)
    assert len(records) == 4
    kept = sum(len(record.instances) for record in records.values())
    # A bad mask leaves the box, and nobody needs the id.
    assert kept == (8 if place in ("id", "polygon", "run lengths", "size of run lengths") else 7), report
    assert place == "id" or len(report["skipped"]) == 1


def test_a_number_of_thousands_of_digits_elsewhere_is_one_line(coco, tmp_path):
    layout = tmp_path / "scene.json"
    layout.write_text(json.dumps({"caption": "x", "width": 64, "height": LONG, "annos": []}).replace(f'"{LONG}"', LONG))
    with pytest.raises(InputError, match=r"scene.json: height: expected .*, got inf"):
        Layout.from_json(layout)
    edit(coco, "instances_train2017", lambda data: data["images"][0].update(height=LONG))
    file = coco / "annotations" / "instances_train2017.json"
    file.write_text(file.read_text().replace(f'"{LONG}"', LONG))
    records, report = built_as_is(coco)
    assert len(records) == 3 and "height" in report["skipped"][0]["reason"]
    with pytest.raises(InputError, match=r"images\[0\].height"):
        read_split(coco, "train2017")


def built_as_is(coco):
    build(coco, coco.parent / "data", "--splits", "train2017")
    dataset = InstanceDataset(coco.parent / "data", "train2017")
    records = {dataset[i].image_id: dataset[i] for i in range(len(dataset))}
    return records, json.loads((coco.parent / "data" / "report.json").read_text())


def test_foreign_lines_of_metrics_do_not_stop_a_resume(tmp_path):
    file = tmp_path / "metrics.jsonl"
    ours = [f'{{"step": {step}}}\n' for step in (1, 2, 3)]
    foreign = ["5\n", "[1]\n", '{"loss": 1}\n', f'{{"step": {LONG}}}\n', "[" * 100_000 + "\n", "half"]
    file.write_bytes("".join([ours[0], *foreign[:-1], *ours[1:], foreign[-1]]).encode() + b"\xff\n")
    metrics._drop_later_lines(file, 2)
    assert file.read_text() == "".join(ours[:2])
