"""python -m instdiff_jax evaluate, end to end on tiny data: numbers, reports, resuming, and bad input in one line."""

import io
import json
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from pages import Links, scripts_of_the_page
from PIL import Image
from tiny_checkpoint import SIDE, make_tiny_checkpoint, make_tiny_segmenter

from instdiff_jax.cli import evaluate
from instdiff_jax.errors import exit_on_input_error
from instdiff_jax.evaluation import generate
from instdiff_jax.geometry.masks import decode_mask
from projects.common.segmenter import Segmenter
from projects.shapes.render import write_coco
from projects.shapes.worlds import SceneSettings

COUNT = 4
pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A COCO folder with the split `val`, a checkpoint, and a segmenter."""
    root = tmp_path_factory.mktemp("evaluate")
    write_coco(root / "coco", "val", COUNT, 55, SIDE, SceneSettings(max_instances=3, min_side=0.3))
    make_tiny_checkpoint(root / "checkpoint")
    make_tiny_segmenter(root / "segmenter")
    annotations = json.loads((root / "coco" / "annotations" / "instances_val.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    perfect = [{key: row[key] for key in keys} | {"score": 0.9} for row in annotations]
    (root / "perfect.json").write_text(json.dumps(perfect))
    return root


def run(place, output, *flags):
    argv = ["--coco_dir", str(place / "coco"), "--split", "val", "--output", str(output), *map(str, flags)]
    with exit_on_input_error():
        evaluate.run(evaluate.parse_args(argv))


def fails(capsys, place, output, *flags):
    """The one line that a run with bad input ends in."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(place, output, *flags)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_perfect_predictions_of_real_images(place, tmp_path, capsys):
    run(place, tmp_path / "real", "--real", "--detector", f"predictions:{place / 'perfect.json'}")
    assert "box AP 100.0" in capsys.readouterr().out
    report = json.loads((tmp_path / "real" / "report.json").read_text())
    metrics = report["metrics"]
    names = ("box_AP", "box_AP50", "box_AR", "mask_AP", "mask_AP50", "mask_IoU", "PiM_point", "PiM_scribble", "found")
    assert {name: metrics[name] for name in names} == pytest.approx(dict.fromkeys(names, 1))
    assert metrics["images"] == COUNT
    assert metrics["instances"] == sum(len(row["instances"]) for row in report["pictures"])
    assert "The detector names no " in " ".join(report["notes"])
    page = (tmp_path / "real" / "report.html").read_text()
    links = Links(page)
    assert links.images == 3 * COUNT and all(value.startswith("data:image/png;base64,") for value in links.loads)
    assert "script" not in links.tags and "link" not in links.tags and "url(" not in page and "@import" not in page
    text = (tmp_path / "real" / "report.md").read_text()
    assert "| mask IoU | 100.0 |" in text and f"| instances | {metrics['instances']} |" in text
    # A report serves as the upper bound of another, of the same images alone.
    upper = tmp_path / "real" / "report.json"
    predictions = f"predictions:{place / 'perfect.json'}"
    run(place, tmp_path / "again", "--real", "--detector", predictions, "--upper_bound", upper)
    again = json.loads((tmp_path / "again" / "report.json").read_text())
    assert again["ratio"]["mask_IoU"] == pytest.approx(1) and again["metrics"] == metrics
    line = fails(capsys, place, tmp_path / "fewer", "--real", "--count", 2, "--upper_bound", upper)
    assert line.endswith(f"expected a report of the same 2 images, got one of {COUNT}")
    odd = tmp_path / "odd.json"
    for broken in ({"settings": [1]}, {"pictures": {"image_id": 1}}):
        odd.write_text(json.dumps(report | broken))
        line = fails(capsys, place, tmp_path / "fewer", "--real", "--upper_bound", odd)
        assert line.startswith(f"error: {odd}: ") and "expected a report of the same" in line


def test_an_upper_bound_is_measured_in_the_same_way(place, tmp_path, capsys):
    """By the same detector wherever it lies, not by one that has its name now."""
    bound, moved = tmp_path / "bound" / "report.json", tmp_path / "moved"
    run(place, bound.parent, "--real", "--detector", f"shapes:{place / 'segmenter'}")
    shutil.copytree(place / "segmenter", moved)
    flags = ["--real", "--upper_bound", bound, "--detector", f"shapes:{moved}"]
    run(place, tmp_path / "same", *flags)
    assert "ratio" in json.loads((tmp_path / "same" / "report.json").read_text())

    def differs(*more):
        line = fails(capsys, place, tmp_path / "other", *flags, *more)
        assert line.startswith(f"error: {bound}: settings.") and not (tmp_path / "other").exists()
        return line.partition("settings.")[2]

    report = json.loads(bound.read_text())
    bound.write_text(json.dumps(report | {"settings": report["settings"] | {"pictures": "drawn from layouts"}}))
    assert differs() == "pictures: expected real (--real), got drawn from layouts"
    bound.write_text(json.dumps(report))
    assert "min_score: expected 0.5 as in this run, got 0.25; measure the bound" in differs("--min_score", 0.5)
    assert "size: expected 64 as in this run, got 32" in differs("--size", 64)
    assert "min_area: expected 0.001 as in this run, got 0.01" in differs("--min_area", 0.001)
    predictions = f"predictions:{place / 'perfect.json'}"
    assert f"expected {predictions} (predictions of masks) as in" in differs("--detector", predictions)
    trained = Segmenter.from_folder(moved)
    Segmenter(trained.config, jax.tree.map(lambda leaf: 2 * leaf, trained.params)).save(moved, {"command": "a test's"})
    line = differs()
    assert line.startswith(f"detector_fingerprint: expected shapes:{moved} (")
    assert f" as in this run, got shapes:{place / 'segmenter'} (" in line


def test_killed_half_way_and_resumed(place, tmp_path, capsys, monkeypatch):
    """What is done is not done again, and nothing is lost; then the report has all pictures."""
    output, made = tmp_path / "drawn", []
    flags = ["--checkpoint", place / "checkpoint", "--detector", f"shapes:{place / 'segmenter'}", "--steps", 2]
    flags += ["--format", "mixed", "--mis", 0, "--alpha", 1]  # one program a batch

    def write(path, pixels, whole=generate.write_image):
        if len(made) == 2:
            raise KeyboardInterrupt
        whole(path, pixels)
        made.append(path)

    monkeypatch.setattr(generate, "write_image", write)
    with pytest.raises(KeyboardInterrupt):
        run(place, output, *flags)
    assert sorted(output.rglob("*.png")) == sorted(made) and not (output / "report.json").exists()
    times = {path: path.stat().st_mtime_ns for path in made}
    before = {path: path.read_bytes() for path in made}

    monkeypatch.undo()
    run(place, output, *flags)
    assert f"{COUNT - 2} images made, 2 were there" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in made} == times
    assert len(list((output / "images").iterdir())) == COUNT
    report = json.loads((output / "report.json").read_text())
    assert report["metrics"]["FID"] > 0 and 0 <= report["metrics"]["colour_accuracy"] <= 1
    assert report["settings"]["sampling"]["steps"] == 2 and report["settings"]["format"] == "mixed"
    assert Links((output / "report.html").read_text()).images >= 2 * COUNT

    # All is done: the checkpoint is not even loaded.
    with monkeypatch.context() as patch:
        patch.setattr("instdiff_jax.sampling.pipeline.Pipeline.from_checkpoint", None)
        run(place, output, *flags)
    assert json.loads((output / "report.json").read_text()) == report
    # A picture that went missing is made as it was, be it alone in its batch.
    made[0].unlink()
    run(place, output, *flags)
    pixels = [np.asarray(Image.open(io.BytesIO(data))).astype(int) for data in (made[0].read_bytes(), before[made[0]])]
    assert np.abs(pixels[0] - pixels[1]).max() <= 1

    line = fails(capsys, place, output, *flags, "--seed", 1)
    assert "settings.json: seed: the images there were made with 0, got 1; use another --output" in line


def test_shards_make_the_pictures_of_a_whole_run(place, tmp_path, capsys):
    """Shards only draw; a run without --shard then finds all pictures there, and measures them."""
    flags = ["--checkpoint", place / "checkpoint", "--detector", f"shapes:{place / 'segmenter'}", "--steps", 2]
    flags += ["--mis", 0, "--alpha", 1]  # one program a batch
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(place, whole, *flags)
    expected = json.loads((whole / "report.json").read_text())
    ids = [row["image_id"] for row in expected["pictures"]]
    for number in range(2):
        capsys.readouterr()
        run(place, parts, *flags, "--shard", f"{number}/2")
        assert f"{COUNT // 2} images made, 0 were there" in capsys.readouterr().out
        there = {int(path.stem) for path in (parts / "images").iterdir()}
        assert there == set(ids[::2] if number == 0 else ids)
        assert not list(parts.glob("report.*"))
    line = fails(capsys, place, parts, *flags, "--shard", "1/2", "--seed", 1)
    assert "settings.json: seed: the images there were made with 0, got 1" in line
    run(place, parts, *flags)
    assert f"0 images made, {COUNT} were there" in capsys.readouterr().out
    for name in ids:
        pixels = [np.asarray(Image.open(folder / "images" / f"{name}.png")).astype(int) for folder in (whole, parts)]
        assert np.abs(pixels[0] - pixels[1]).max() <= 1
    report = json.loads((parts / "report.json").read_text())
    assert report["settings"] == expected["settings"]
    assert [row["image_id"] for row in report["pictures"]] == ids


def test_missing_and_broken_pictures(place, tmp_path, capsys):
    (tmp_path / "coco").mkdir()
    for name in ("annotations", "val"):
        (tmp_path / "coco" / name).symlink_to(place / "coco" / name)
    (tmp_path / "coco" / "val").unlink()
    line = fails(capsys, tmp_path, tmp_path / "out", "--real")
    assert "coco/val/" in line and "cannot be read: No such file or directory" in line
    run(place, tmp_path / "real", "--real")
    first = sorted((tmp_path / "real" / "images").iterdir())[0]
    first.write_bytes(first.read_bytes()[:40])
    line = fails(capsys, place, tmp_path / "real", "--real")
    assert f"{first}: cannot be read as an image; delete it and run again" in line


def test_missing_real_images_are_named_before_anything_is_drawn(place, tmp_path, capsys):
    shutil.copytree(place / "coco", tmp_path / "coco")
    lost = sorted((tmp_path / "coco" / "val").iterdir())[-1]
    lost.unlink()
    flags = ["--checkpoint", place / "checkpoint", "--detector", f"shapes:{place / 'segmenter'}"]
    line = fails(capsys, tmp_path, tmp_path / "out", *flags)
    assert line.startswith(f"error: --features: {lost}: expected") and not (tmp_path / "out").exists()


def test_boxes_of_negative_size(place, tmp_path, capsys):
    shutil.copytree(place / "coco", tmp_path / "coco")
    path = tmp_path / "coco" / "annotations" / "instances_val.json"
    data = json.loads(path.read_text())
    data["annotations"][0] |= {"bbox": [10, 10, -5, -5], "segmentation": []}
    path.write_text(json.dumps(data))
    assert "bbox: expected [x, y, width, height]" in fails(capsys, tmp_path, tmp_path / "out", "--real")


def test_empty_splits(place, tmp_path, capsys):
    notes = tmp_path / "coco" / "annotations"
    notes.mkdir(parents=True)
    categories = [{"id": 1, "name": "cat"}]
    image = {"id": 1, "width": SIDE, "height": SIDE, "file_name": "1.png"}
    for images, message in (([], "images: empty, expected at least one"), ([image], "found none")):
        content = {"images": images, "annotations": [], "categories": categories}
        (notes / "instances_val.json").write_text(json.dumps(content))
        line = fails(capsys, tmp_path, tmp_path / "out", "--real")
        assert "instances_val.json" in line and message in line
    (notes / "instances_val.json").unlink()
    assert "instances_val.json" in fails(capsys, tmp_path, tmp_path / "out", "--real")
    assert not (tmp_path / "out").exists(), "nothing is written before the input is known to be good"


def test_the_pages_scripts_are_accepted(place, tmp_path, capsys, monkeypatch):
    """With stand-ins for YOLO and Inception: one sees the annotations and no mask in one picture, one averages."""
    torch = pytest.importorskip("torch")
    coco = tmp_path / "coco"
    shutil.copytree(place / "coco" / "val", coco / "val2017")
    (coco / "annotations").mkdir()
    content = json.loads((place / "coco" / "annotations" / "instances_val.json").read_text())
    # COCO's ids have gaps, a network's labels have none.
    for row in content["categories"]:
        row["id"] *= 10
    for row in content["annotations"]:
        row["category_id"] *= 10
    (coco / "annotations" / "instances_val2017.json").write_text(json.dumps(content))
    labels = [row["id"] for row in content["categories"]]
    names = dict(enumerate(row["name"] for row in content["categories"]))
    missed = content["images"][0]["id"]

    class Yolo:
        def __init__(self, name):
            assert name == "yolov8m-seg.pt"

        def predict(self, source, stream, conf, retina_masks, verbose):
            assert stream and retina_masks and conf <= 0.01
            for path in sorted(Path(source).iterdir()):
                image_id = int(path.stem)
                rows = [row for row in content["annotations"] if row["image_id"] == image_id != missed]
                x, y, w, h = torch.tensor([row["bbox"] for row in rows]).reshape(-1, 4).T
                boxes = mock.Mock(xyxy=torch.stack([x, y, x + w, y + h], 1), conf=torch.full((len(rows),), 0.9))
                boxes.cls = torch.tensor([labels.index(row["category_id"]) for row in rows]).float()
                boxes.cpu = lambda boxes=boxes: boxes
                masks = [decode_mask(row["segmentation"], SIDE, SIDE, "") for row in rows]
                data = torch.from_numpy(np.array(masks)).float()
                found = None if not rows else mock.Mock(data=data)
                yield mock.Mock(path=str(path), names=names, boxes=boxes, masks=found)

    class Inception:
        def eval(self):
            return self

        def __call__(self, images):
            assert images.shape[1:] == (3, SIDE, SIDE) and 0 <= images.min() and 0.5 < images.max() <= 1
            return [images.mean((2, 3), keepdim=True)]

    monkeypatch.setitem(sys.modules, "ultralytics", mock.Mock(YOLO=Yolo))
    monkeypatch.setitem(sys.modules, "pytorch_fid", mock.Mock())
    monkeypatch.setitem(sys.modules, "pytorch_fid.inception", mock.Mock(InceptionV3=Inception))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    detect, inception = scripts_of_the_page()
    (tmp_path / "inception.py").write_text(inception)
    flags = ["--real", "--split", "val2017", "--features", "python:inception:features"]
    run(tmp_path, tmp_path / "results" / "box", *flags)
    exec(compile(detect, "detect.py", "exec"), {})
    predictions = tmp_path / "results" / "box" / "predictions.json"
    run(tmp_path, tmp_path / "results" / "box", *flags, "--detector", f"predictions:{predictions}")
    report = json.loads((tmp_path / "results" / "box" / "report.json").read_text())
    rows = {row["image_id"]: row["instances"] for row in report["pictures"]}
    assert all(item["mask_iou"] == item["box_iou"] == 0 for item in rows.pop(missed))
    assert all(item["mask_iou"] == pytest.approx(1) for row in rows.values() for item in row)
    assert report["metrics"]["FID"] == pytest.approx(0, abs=1e-6)


def test_bad_flags(place, tmp_path, capsys):
    for flags, message in (
        (["--real", "--detector", "yolo"], "--detector: expected predictions:FILE.json, transformers:NAME,"),
        (["--real", "--detector", f"shapes:{tmp_path}"], "config.json: cannot be read"),
        (["--real", "--count", 0], "--count: expected a whole number of at least 1, got 0"),
        ([], "--checkpoint: expected a checkpoint folder, or --real"),
        (["--checkpoint", tmp_path / "none"], "none"),
        (["--checkpoint", place / "checkpoint", "--sampler", "eulr"], "sampling.sampler: expected one of"),
        (["--real", "--caption_only"], "--caption_only: cannot be used with --real"),
        (["--real", "--attributes", "colour"], "--attributes: cannot be used with --real"),
        (["--real", "--shard", "2/2"], "--shard: expected i/n"),
    ):
        assert message in fails(capsys, place, tmp_path / "out", *flags)


def test_the_command_ends_with_code_2(tmp_path):
    command = [sys.executable, "-m", "instdiff_jax", "evaluate", "--coco_dir", str(tmp_path), "--split", "val"]
    root = Path(__file__).resolve().parent.parent.parent
    ended = subprocess.run([*command, "--output", str(tmp_path / "out")], cwd=root, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr == "error: --checkpoint: expected a checkpoint folder, or --real\n"
