"""Datasets of other tools: each form of the same scenes becomes the same COCO folder, and oddities are named."""

import json

import numpy as np
import pytest
from importer_cases import HEIGHT, MAKERS, NAMES, SCENES, WIDTH, images_in, make_webdataset, make_yolo, mask_of

from instdiff_jax.cli.import_data import KINDS, main
from instdiff_jax.coco import Coco
from instdiff_jax.data.build_coco import build
from instdiff_jax.data.importers.labelstudio import decode_brush
from instdiff_jax.data.importers.scene import Options
from instdiff_jax.data.importers.write import IMPORTERS, import_data
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json
from instdiff_jax.geometry.masks import decode_mask

WITH_MASKS = {"coco", "lvis", "voc", "labelme", "labelstudio", "openimages"}
WITH_CAPTIONS = {"coco", "labelstudio", "webdataset", "imagefolder"}


def read_back(folder, split="train"):
    coco = Coco(folder / "annotations" / f"instances_{split}.json")
    found = {}
    for image_id in coco.image_ids:
        image = coco.image(image_id)
        assert (image.width, image.height) == (WIDTH, HEIGHT)
        name = image.file_name.rsplit("/")[-1].removesuffix(".png")
        found[name] = [(one.category, one.box, one.values.get("segmentation")) for one in coco.annotations(image_id)]
    return found


def test_every_importer_is_a_choice_and_has_a_case():
    assert set(KINDS) == set(IMPORTERS) == set(MAKERS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_form_of_the_same_scenes_is_the_same_dataset(kind, tmp_path):
    source, coco = tmp_path / "source", tmp_path / "coco"
    MAKERS[kind](source)
    counts, report = import_data(kind, source, coco, Options(names=NAMES if kind == "imagefolder" else ()))
    assert counts == {"train": (2, 3)} and report.skipped == []
    found = read_back(coco)
    assert set(found) == set(SCENES)
    for name, things in SCENES.items():
        for (category, box, mask), (true_category, true_box) in zip(found[name], things, strict=True):
            assert category == true_category
            np.testing.assert_allclose(box, true_box, atol=1e-3)
            assert mask or kind not in WITH_MASKS
            if mask:
                np.testing.assert_array_equal(decode_mask(mask, HEIGHT, WIDTH, ""), mask_of(true_box))
    assert (coco / "annotations" / "captions_train.json").exists() == (kind in WITH_CAPTIONS)
    meta, built = build(coco, tmp_path / "data", captions=kind in WITH_CAPTIONS)
    assert meta["splits"]["train"]["instances"] == 3 and built.skipped == []


def test_images_stay_where_they_are(tmp_path, capsys):
    make_yolo(tmp_path / "source")
    main(["--from", "yolo", "--input", f"{tmp_path}/source", "--output", f"{tmp_path}/coco", "--in_place"])
    told = capsys.readouterr().out
    assert "train: 2 images, 3 instances" in told and "--no_captions --images_outside" in told
    assert not list((tmp_path / "coco").rglob("*.png"))
    meta, _ = build(tmp_path / "coco", tmp_path / "data", captions=False, outside=True)
    assert meta["splits"]["train"]["images"] == 2


def test_captions_of_instances_reach_the_dataset(tmp_path):
    make_webdataset(tmp_path / "source")
    import_data("webdataset", tmp_path / "source", tmp_path / "coco", Options())
    texts = read_json(tmp_path / "coco" / "instance_captions.json")
    assert sorted(texts.values()) == ["dog", "red cat"]
    build(tmp_path / "coco", tmp_path / "data", instance_captions=tmp_path / "coco" / "instance_captions.json")


def broken(kind, tmp_path, change, options=None):
    """The reasons that the report gives for a dataset after a change of it."""
    MAKERS[kind](tmp_path / "source")
    change(tmp_path / "source")
    _, report = import_data(kind, tmp_path / "source", tmp_path / "coco", options or Options(names=NAMES))
    saved = read_json(tmp_path / "coco" / "report.json")
    assert saved["skipped"] == report.skipped
    return [entry["reason"] for entry in report.skipped]


def replace(name, old, new, count=1):
    def change(folder):
        path = folder / name
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, count))

    return change


ODD = {
    "yolo class": ("yolo", replace("labels/train/two.txt", "1 ", "7 ", 9), "two.txt:1: expected a class from 0 to 1"),
    "yolo pixels": ("yolo", replace("labels/train/two.txt", "0.1", "12.1", 9), "two.txt:1: expected parts of the"),
    "yolo word": ("yolo", replace("labels/train/one.txt", "0.1", "o.1"), "one.txt:1: expected a number, got 'o.1'"),
    "yolo numbers": ("yolo", lambda f: (f / "labels/train/two.txt").write_text("0 .5 .5"), "two.txt:1: expected 4"),
    "voc box": ("voc", replace("Annotations/one.xml", "<xmin>9</xmin>", ""), "object 1.bndbox.xmin: expected a number"),
    "voc entities": ("voc", replace("Annotations/one.xml", "<annotation>", "<!DOCTYPE a><annotation>"), "type of"),
    "voc image": ("voc", lambda f: (f / "JPEGImages/one.png").unlink(), "filename: no image 'one.png'"),
    "voc size": ("voc", replace("Annotations/one.xml", "<width>80", "<width>81"), "expected 81x64 pixels as annotated"),
    "labelme line": ("labelme", replace("one.json", '"polygon"', '"linestrip"'), "shapes[0]: expected a polygon"),
    "labelme mask": ("labelme", replace("one.json", '"mask": "', '"mask": "?'), "shapes[1].mask: expected base64"),
    "labelme image": ("labelme", lambda f: (f / "one.png").unlink(), "imagePath: no file"),
    "labelme shapes": (
        "labelme",
        replace("one.json", '"shapes"', '"shape"'),
        "one.json: expected an object with a list",
    ),
    "studio rotated": (
        "labelstudio",
        replace("export.json", '"points": [', '"x": 1, "y": 1, "width": 9, "height": 9, "rotation": 30, "p": ['),
        "result[1].value.rotation: expected a box that is not rotated, got 30",
    ),
    "studio brush": (
        "labelstudio",
        replace("export.json", '"rle": [0,', '"rle": [9,'),
        "value.rle: expected 20480 values",
    ),
    "studio image": ("labelstudio", lambda f: (f / "one.png").unlink(), "[0].data: no file of"),
    "open images class": (
        "openimages",
        replace("class-descriptions-boxable.csv", "/m/1", "/m/9"),
        "csv:3: LabelName: '/m/1'",
    ),
    "open images image": ("openimages", lambda f: (f / "train/two.png").unlink(), "no image of this name"),
    "folder names": ("imagefolder", replace("train/metadata.jsonl", "[1]", "[5]"), "5 has no name; pass --names"),
    "folder file": (
        "imagefolder",
        replace("train/metadata.jsonl", "one.png", "../one.png"),
        "metadata.jsonl:1: file_name: exp",
    ),
    "folder lists": (
        "imagefolder",
        replace("train/metadata.jsonl", "[1]", "[1, 1]"),
        "jsonl:2: objects: expected bbox and",
    ),
    "coco box": (
        "coco",
        replace("annotations/instances_train.json", "[8, 16, 24, 32]", "[8, 16, -24, 32]"),
        "annotations[0].bbox",
    ),
}


@pytest.mark.parametrize("case", ODD)
def test_what_cannot_be_used_is_named_by_file_and_field(case, tmp_path):
    kind, change, words = ODD[case]
    reasons = broken(kind, tmp_path, change)
    assert reasons and all(words in reason for reason in reasons[:1]), reasons
    assert len(reasons) <= 2  # and nothing else is lost


def test_a_tar_that_ends_too_early_is_one_line(tmp_path):
    make_webdataset(tmp_path / "source")
    path = tmp_path / "source" / "00000.tar"
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"00000.tar: expected a tar file"):
        import_data("webdataset", tmp_path / "source", tmp_path / "coco", Options())
    assert not (tmp_path / "coco").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_folder_is_one_line(kind, tmp_path):
    (tmp_path / "source").mkdir()
    with pytest.raises(InputError, match=str(tmp_path)):
        import_data(kind, tmp_path / "source", tmp_path / "coco", Options())
    assert not (tmp_path / "coco").exists()


def test_only_an_imported_folder_is_replaced(tmp_path):
    make_yolo(tmp_path / "source")
    coco = tmp_path / "coco"
    import_data("yolo", tmp_path / "source", coco, Options())
    with pytest.raises(InputError, match="pass --overwrite"):
        import_data("yolo", tmp_path / "source", coco, Options())
    import_data("yolo", tmp_path / "source", coco, Options(), overwrite=True)
    (coco / "report.json").unlink()
    with pytest.raises(InputError, match="holds other files"):
        import_data("yolo", tmp_path / "source", coco, Options(), overwrite=True)


def test_shapes_of_one_group_are_one_instance(tmp_path):
    images_in(tmp_path)
    square = {"label": "dog", "shape_type": "rectangle", "group_id": 4}
    shapes = [square | {"points": [[2, 2], [10, 10]]}, square | {"points": [[30, 30], [20, 20]]}]
    circle = {"label": "dog", "shape_type": "circle", "points": [[40, 40], [40, 45]], "description": "a round dog"}
    values = {"imagePath": "one.png", "shapes": [*shapes, circle]}
    (tmp_path / "one.json").write_text(json.dumps(values))
    import_data("labelme", tmp_path, tmp_path / "coco", Options())
    (_, box, mask), (_, round_box, round_mask) = read_back(tmp_path / "coco")["one"]
    assert box == (2, 2, 28, 28) and decode_mask(mask, HEIGHT, WIDTH, "").sum() == 64 + 100
    np.testing.assert_allclose(round_box, (35, 35, 10, 10), atol=0.1)
    assert abs(decode_mask(round_mask, HEIGHT, WIDTH, "").sum() - np.pi * 25) < 6
    assert read_json(tmp_path / "coco" / "instance_captions.json") == {"2": "a round dog"}


def test_a_brush_with_single_values_and_repeats():
    """Two pixels: the first one's values one by one, the second's as a run that repeats."""
    bits = f"{8:032b}" + f"{7:05b}" + f"{2:04b}{0:04b}{0:04b}{0:04b}"
    bits += f"0{0:02b}{3:03b}" + f"{1:08b}{2:08b}{3:08b}{0:08b}" + f"1{0:02b}{3:03b}{255:08b}"
    bits += "0" * (-len(bits) % 8)
    values = [int(bits[i : i + 8], 2) for i in range(0, len(bits), 8)]
    assert decode_brush(values, 2, 1, "x").tolist() == [[False, True]]
    with pytest.raises(InputError, match="x: ends too early"):
        decode_brush(values[:9], 2, 1, "x")
