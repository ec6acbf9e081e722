"""Pictures without labels: stand-in models of known answers, runs in several goes, tiny real models."""

import json

import numpy as np
import pytest
from PIL import Image

from instdiff_jax.cli.annotate import main
from instdiff_jax.coco import Coco
from instdiff_jax.data.annotate import AnnotateSettings, Models, annotate, ask_tags, find_instances
from instdiff_jax.data.build_coco import build
from instdiff_jax.data.vision import Found
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json
from instdiff_jax.geometry.masks import decode_mask

COLOURS = {"red thing": (200, 0, 0), "blue thing": (0, 0, 200)}
calls = []


class Sees:
    """Finds squares by their colour, masks and names them."""

    def ground(self, image, phrase):
        calls.append(phrase)
        mask = (image == COLOURS[phrase]).all(-1) if phrase in COLOURS else np.zeros(image.shape[:2], bool)
        if not mask.any():
            return Found(np.zeros((0, 4)), np.zeros(0))
        ys, xs = np.nonzero(mask)
        box = [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        worse = [box[0], box[1], box[2] + 1, box[3]]
        return Found(np.array([box, worse, [0, 0, 40, 40]], float), np.array([0.9, 0.8, 0.1]))

    def segment(self, image, box):
        x0, y0, x1, y1 = map(int, box)
        mask = np.zeros(image.shape[:2], bool)
        mask[y0:y1, x0:x1] = (image[y0:y1, x0:x1] != 255).any(-1)
        return mask

    def caption(self, image):
        names = [name for name, colour in COLOURS.items() if (image == colour).all(-1).any()]
        return f"a square of a {' and a '.join(names)}"

    def answer(self, image, question):
        return "Red thing, blue thing\n- red  thing."


def make_pictures(folder):
    folder.mkdir()
    for i in range(3):
        image = np.full((48, 64, 3), 255, np.uint8)
        image[4:20, 8 + i : 24 + i] = COLOURS["red thing"]
        image[30:40, 40:60] = COLOURS["blue thing"]
        Image.fromarray(image).save(folder / f"{i}.png")
    (folder / "broken.png").write_bytes(b"no picture")


def run(folder, *flags):
    here = f"python:{__name__}:Sees"
    models = [part for name in ("detector", "segmenter", "captioner") for part in (f"--{name}", here)]
    main(
        [
            "--images",
            f"{folder}/pictures",
            "--output",
            f"{folder}/out",
            "--tags",
            "red thing,blue thing",
            *models,
            *flags,
        ]
    )


def test_boxes_masks_and_captions_come_out_exactly(tmp_path, capsys):
    make_pictures(tmp_path / "pictures")
    run(tmp_path)
    told = capsys.readouterr().out
    assert "4 pictures annotated, 0 were before" in told and "train: 3 images, 6 instances" in told
    coco = Coco(
        tmp_path / "out/coco/annotations/instances_train.json", tmp_path / "out/coco/annotations/captions_train.json"
    )
    for i, image_id in enumerate(coco.image_ids):
        red, blue = coco.annotations(image_id)
        assert (red.category, red.box) == ("red thing", (8 + i, 4, 16, 16))
        assert (blue.category, blue.box) == ("blue thing", (40, 30, 20, 10))
        mask = decode_mask(red.values["segmentation"], 48, 64, "")
        assert mask[4:20, 8 + i : 24 + i].all() and mask.sum() == 256
        assert red.caption == "a square of a red thing"
        assert coco.caption(image_id) == "a square of a red thing and a blue thing"
    report = read_json(tmp_path / "out/coco/report.json")
    assert [entry["name"] for entry in report["skipped"]] == ["broken.png"]
    notes = {entry["note"] for entry in report["notes"]}
    assert "red thing: score 0.10 below 0.3" in notes
    assert "red thing: overlaps a better box by more than 0.7" in notes
    page = (tmp_path / "out/page.html").read_text()
    assert page.count("<figure>") == 3 and "red thing 0.90: a square of a red thing" in page
    flags = dict(captions=True, instance_captions=tmp_path / "out/coco/instance_captions.json")
    meta, _ = build(tmp_path / "out/coco", tmp_path / "data", **flags)
    assert meta["splits"]["train"] == {"images": 3, "instances": 6} | meta["splits"]["train"]


def test_a_run_goes_on_and_shards_make_up_the_whole(tmp_path, capsys):
    make_pictures(tmp_path / "pictures")
    calls.clear()
    run(tmp_path, "--shard", "0/2")
    assert "other shards have not annotated" in capsys.readouterr().out and len(calls) == 4
    run(tmp_path, "--shard", "1/2")
    assert "2 pictures annotated" in capsys.readouterr().out
    first = (tmp_path / "out/coco/annotations/instances_train.json").read_bytes()
    calls.clear()
    run(tmp_path)
    assert "0 pictures annotated, 4 were before" in capsys.readouterr().out and not calls
    assert (tmp_path / "out/coco/annotations/instances_train.json").read_bytes() == first
    with pytest.raises(InputError, match="min_score: .*use another --output"):
        run(tmp_path, "--min_score", "0.5")


def test_small_boxes_and_the_31st_are_dropped_and_named():
    class Many:
        def ground(self, image, phrase):
            boxes = np.array([[2 * i, 0, 2 * i + 2, 8] for i in range(32)] + [[0, 20, 1, 21]], float)
            return Found(boxes, np.linspace(0.9, 0.5, 33))

    rows, dropped = find_instances(np.zeros((24, 64, 3), np.uint8), ["x"], Many(), AnnotateSettings())
    assert len(rows) == 30 and rows[0] == ("x", 0.9, [0, 0, 2, 8])
    reasons = [entry["reason"] for entry in dropped]
    assert reasons == ["area 0.0007 of the picture, below 0.005", *["more than 30 instances"] * 2]


def test_tags_are_asked_for_once_each(tmp_path):
    make_pictures(tmp_path / "pictures")
    image = np.zeros((8, 8, 3), np.uint8)
    assert ask_tags(image, Models(Sees(), answerer=Sees())) == ["red thing", "blue thing"]
    values = annotate(tmp_path / "pictures/0.png", Models(Sees(), answerer=Sees()), AnnotateSettings())
    assert [row["category"] for row in values["annotations"]] == ["red thing", "blue thing"]
    assert values["caption"] == "red thing, blue thing" and "segmentation" not in values["annotations"][0]


def test_bad_flags_are_one_line(tmp_path):
    make_pictures(tmp_path / "pictures")
    flags = ["--images", f"{tmp_path}/pictures", "--output", f"{tmp_path}/out", "--detector", f"python:{__name__}:Sees"]
    with pytest.raises(InputError, match="--tags: expected phrases to look for, or --vlm"):
        main(flags)
    with pytest.raises(InputError, match="--tags: expected phrases, got ' ,'"):
        main([*flags, "--tags", " ,"])
    with pytest.raises(InputError, match="--max_overlap: expected a number from 0 to 1"):
        main([*flags, "--tags", "x", "--max_overlap", "2"])
    with pytest.raises(InputError, match="not one instance can be used"):
        main([*flags, "--tags", "nothing"])
    assert not (tmp_path / "out/coco").exists() and json.loads((tmp_path / "out/settings.json").read_text())
