"""COCO folders become datasets: what is good is kept, what is broken is named, bad input is one line."""

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from coco_fixture import CATEGORIES, build, edit, make_coco
from PIL import Image

from instdiff_jax.data.dataset import FORMAT, InstanceDataset, read_meta
from instdiff_jax.data.phrases import phrase_table, read_phrases
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import decode_mask


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_coco(tmp_path_factory.mktemp("coco"))


@pytest.fixture(scope="module")
def data_dir(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("built") / "data"
    build(folder, path)
    return path


def test_keeps_everything(folder, data_dir):
    source = json.loads((folder / "annotations" / "instances_train2017.json").read_text())
    dataset = InstanceDataset(data_dir, "train2017")
    assert len(dataset) == 12
    crowds, records = 0, {dataset[i].image_id: dataset[i] for i in range(12)}
    for i, row in enumerate(source["images"][:12]):
        record = records[row["id"]]
        assert (record.image_id, record.file_name) == (row["id"], row["file_name"])
        assert record.image == (folder / "train2017" / row["file_name"]).read_bytes()
        assert Image.open(io.BytesIO(record.image)).size == (record.width, record.height)
        assert record.captions == ("a picture of shapes", f"number {i} of the shapes")
        assert record.detection
        annotations = [a for a in source["annotations"] if a["image_id"] == row["id"] and a["id"] != 1025]
        assert [item.annotation_id for item in record.instances] == [a["id"] for a in annotations]
        for item, annotation in zip(record.instances, annotations, strict=True):
            np.testing.assert_allclose(item.box, annotation["bbox"])
            assert item.category == CATEGORIES[annotation["category_id"]]
            assert item.category_id == annotation["category_id"]
            assert item.crowd == bool(annotation["iscrowd"])
            crowds += item.crowd
            segmentation = annotation["segmentation"]
            if annotation["id"] == 1026:  # of another size: the box is kept
                assert item.mask == b""
                continue
            assert bool(item.mask) == bool(segmentation)
            if segmentation:
                rle = {"size": [record.height, record.width], "counts": item.mask}
                ours = decode_mask(rle, record.height, record.width, "test")
                theirs = decode_mask(segmentation, record.height, record.width, "test")
                np.testing.assert_array_equal(ours, theirs)
    assert crowds == 1


def test_report_names_what_is_skipped(data_dir):
    report = json.loads((data_dir / "report.json").read_text())
    assert report["counts"]["train2017 image"] == 2
    assert report["counts"]["train2017 annotation"] == 2
    assert report["counts"]["train2017 mask"] == 1
    reasons = {entry["name"]: entry["reason"] for entry in report["skipped"] if entry["split"] == "train2017"}
    assert "truncated" in reasons["short.jpg"]
    assert "No such file" in reasons["gone.jpg"]
    assert "bbox" in reasons["annotation 1025"]
    assert "expected" in reasons["annotation 1026"] and "[10, 10]" in reasons["annotation 1026"]
    assert reasons["annotation 1027"].endswith("image_id: no image has the id 99")


def test_split_names(data_dir):
    assert InstanceDataset(data_dir, "train").split == "train2017"
    assert InstanceDataset(data_dir, "val").split == "val2017"
    with pytest.raises(InputError, match="test: expected one of train2017, val2017"):
        InstanceDataset(data_dir, "test")


def test_fingerprint_follows_content_not_place(folder, data_dir, tmp_path):
    again = tmp_path / "again"
    build(folder, again)
    assert read_meta(again) == read_meta(data_dir)
    other = make_coco(tmp_path / "other")
    edit(other, "captions_train2017", lambda data: data["annotations"][0].update(caption="something else"))
    build(other, tmp_path / "changed")
    splits, before = read_meta(tmp_path / "changed")["splits"], read_meta(data_dir)["splits"]
    assert splits["val2017"]["fingerprint"] == before["val2017"]["fingerprint"]
    assert splits["train2017"]["fingerprint"] != before["train2017"]["fingerprint"]


def test_other_split_names_and_instance_captions(tmp_path):
    make_coco(tmp_path / "shapes", names=("train", "val"), broken=False)
    captions = {"1000": "a red circle", "1001": "the blue one", "5": "nothing has this id"}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    build(tmp_path / "shapes", tmp_path / "data", "--instance_captions", str(tmp_path / "captions.json"))
    dataset, phrases = InstanceDataset(tmp_path / "data", "train"), read_phrases(tmp_path / "data")
    records = {dataset[i].image_id: dataset[i] for i in range(len(dataset))}
    first, second = records[10].instances[0], records[20].instances[0]
    assert phrases[first.phrase] == "circle"
    assert phrases[first.caption_phrase] == "a red circle"
    # A caption that does not name the category gets it in front, as in the official training data.
    assert phrases[second.caption_phrase] == f"{second.category}. the blue one"
    assert records[30].instances[0].caption_phrase == -1
    report = json.loads((tmp_path / "data" / "report.json").read_text())
    assert report["counts"] == {"instance caption": 1}


def test_phrase_table(data_dir):
    phrases, calls = read_phrases(data_dir), []

    def embed(batch):
        calls.append(list(batch))
        return np.array([[len(text), i] for i, text in enumerate(batch)], np.float32)

    table = phrase_table(data_dir, "encoder-a", embed, batch_size=2)
    assert sorted(sum(calls[1:], [])) == sorted(phrases)  # each once, after one call that asks for the width
    rows = table.lookup(np.array([[0, -1], [2, 1]]))
    assert rows.shape == (2, 2, 2) and rows.dtype == np.float32
    assert rows[0, 0, 0] == len(phrases[0]) and not rows[0, 1].any()
    assert len(phrase_table(data_dir, "encoder-a")) == len(phrases)
    content = bytearray(table.path.read_bytes())
    content[-20] ^= 1
    table.path.with_name("damaged.npy").write_bytes(content)
    (table.path.parent.parent / "encoder-c").mkdir()
    shutil.copyfile(table.path.with_name("damaged.npy"), table.path.parent.parent / "encoder-c" / table.path.name)
    with pytest.raises(InputError, match="damaged: its checksum"):
        phrase_table(data_dir, "encoder-c")
    with pytest.raises(InputError, match="not embedded"):
        phrase_table(data_dir, "encoder-b")
    with pytest.raises(InputError, match="came with the data"):
        phrase_table(data_dir, "encoder-a", embed, use_imported=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "annotations" / "instances_train2017.json").unlink(), r"instances_train2017.json: missing"),
        (lambda f: (f / "annotations" / "captions_train2017.json").unlink(), r"captions_train2017.json: missing"),
        (lambda f: edit(f, "instances_train2017", lambda d: d.update(images=[])), r"images: empty"),
        (lambda f: edit(f, "instances_train2017", lambda d: d.pop("images")), r"images: expected a list"),
        (
            lambda f: (f / "annotations" / "instances_train2017.json").write_text("{"),
            r"instances_train2017.json: not valid JSON",
        ),
    ],
)
def test_bad_folders(tmp_path, change, message):
    make_coco(tmp_path / "coco", train=4, val=2, broken=False)
    change(tmp_path / "coco")
    with pytest.raises(InputError, match=message):
        build(tmp_path / "coco", tmp_path / "data", "--splits", "train2017")
    assert [path.name for path in tmp_path.iterdir()] == ["coco"]  # nothing half-written


def test_bad_outputs(folder, data_dir, tmp_path):
    with pytest.raises(InputError, match="already holds a dataset"):
        build(folder, data_dir)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "a.txt").write_text("a")
    with pytest.raises(InputError, match="expected an empty or new folder"):
        build(folder, tmp_path / "letters", "--overwrite")
    with pytest.raises(InputError, match="expected a dataset"):
        InstanceDataset(tmp_path, "train")


def test_a_link_is_not_replaced(folder, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with pytest.raises(InputError, match="link or a mount point"):
        build(folder, tmp_path / "link", "--overwrite")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: shutil.rmtree(d / "instances"), "damaged or incomplete"),
        (lambda d: [path.write_bytes(b"no records") for path in d.rglob("*.array_record*")], "damaged or incomplete"),
        (lambda d: (d / "dataset.json").write_text("[]"), "format: expected"),
        (
            lambda d: (d / "dataset.json").write_text('{"format": FORMAT}'.replace("FORMAT", str(FORMAT))),
            "phrases: expec",
        ),
    ],
)
def test_a_damaged_dataset_is_named(data_dir, tmp_path, change, message):
    damaged = tmp_path / "damaged"
    shutil.copytree(data_dir, damaged)
    change(damaged)
    with pytest.raises(InputError, match=message):
        InstanceDataset(damaged, "train")


def test_a_users_folder_beside_it_stays(tmp_path):
    make_coco(tmp_path / "a", train=3, val=2, broken=False)
    (tmp_path / "data.old").mkdir()
    (tmp_path / "data.old" / "kept.txt").write_text("a user's")
    build(tmp_path / "a", tmp_path / "data")
    build(tmp_path / "a", tmp_path / "data", "--overwrite")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "data", "data.old"]
    assert (tmp_path / "data.old" / "kept.txt").exists()


def test_overwrite(tmp_path):
    make_coco(tmp_path / "a", train=3, val=2, broken=False)
    make_coco(tmp_path / "b", train=5, val=2, broken=False)
    build(tmp_path / "a", tmp_path / "data")
    build(tmp_path / "b", tmp_path / "data", "--overwrite")
    assert len(InstanceDataset(tmp_path / "data", "train")) == 5


def test_a_split_without_images_is_left_out_and_named(tmp_path):
    make_coco(tmp_path / "coco", train=3, val=2, broken=False)
    for path in (tmp_path / "coco" / "val2017").iterdir():
        path.unlink()
    (tmp_path / "coco" / "val2017").rmdir()
    build(tmp_path / "coco", tmp_path / "data")
    assert list(read_meta(tmp_path / "data")["splits"]) == ["train2017"]
    assert "val2017 file" in json.loads((tmp_path / "data" / "report.json").read_text())["counts"]


def test_command_line(tmp_path):
    """One line and exit code 2; TensorFlow and JAX are not needed."""
    command = [sys.executable, "-m", "instdiff_jax", "build-coco", "--coco_dir", str(tmp_path), "--data_dir"]
    result = subprocess.run([*command, str(tmp_path / "data")], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    script = "import sys, instdiff_jax.data.loader; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
