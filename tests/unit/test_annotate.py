"""Pictures without labels: stand-in models of known answers, runs in several goes, tiny real models."""

import json
from pathlib import Path

import numpy as np
import pytest
from importer_cases import HEIGHT, MAKERS, SCENES, WIDTH
from PIL import Image

from instdiff_jax.cli.annotate import OWN, main
from instdiff_jax.coco import Coco
from instdiff_jax.data.annotate import AnnotateSettings, Models, annotate, ask_tags, choose, find_pictures
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
    boxes = np.array([[2 * i, 0, 2 * i + 2, 8] for i in range(32)] + [[0, 20, 1, 21]], float)
    rows, dropped = choose(64, 24, {"x": Found(boxes, np.linspace(0.9, 0.5, 33))}, AnnotateSettings())
    assert len(rows) == 30 and rows[0] == {"category": "x", "score": 0.9, "bbox": [0, 0, 2, 8]}
    reasons = [entry["reason"] for entry in dropped]
    assert reasons == ["area 0.0007 of the picture, below 0.005", *["more than 30 instances"] * 2]


def test_tags_are_asked_for_once_each(tmp_path):
    make_pictures(tmp_path / "pictures")
    image = np.zeros((8, 8, 3), np.uint8)
    assert ask_tags(image, Models(Sees(), answerer=Sees())) == ["red thing", "blue thing"]
    first = find_pictures(tmp_path / "pictures")[:1]
    (values,) = annotate(first, Models(Sees(), answerer=Sees()), AnnotateSettings())
    assert [row["category"] for row in values["annotations"]] == ["red thing", "blue thing"]
    assert values["captions"] == ["red thing, blue thing"] and "segmentation" not in values["annotations"][0]


def test_pictures_are_upright_8_bit_and_without_alpha(tmp_path):
    white = np.full((48, 64, 3), 255, np.uint8)
    white[4:20, 8:24] = COLOURS["red thing"]
    turned = Image.fromarray(np.rot90(white))
    turned.save(tmp_path / "turned.png", exif=(lambda exif: exif.__setitem__(0x0112, 6) or exif)(turned.getexif()))
    Image.fromarray(np.dstack([white, np.full((48, 64), 255, np.uint8)])).save(tmp_path / "alpha.png")
    Image.fromarray(np.full((48, 64), 60_000, np.uint16)).save(tmp_path / "deep.png")
    seen = []

    class Looks(Sees):
        def ground(self, image, phrase):
            seen.append((image.dtype, image.shape, int(image[0, 0, 0])))
            return super().ground(image, phrase)

    settings = AnnotateSettings(("red thing",))
    alpha, deep, upright = annotate(find_pictures(tmp_path), Models(Looks()), settings)
    assert seen == [(np.uint8, (48, 64, 3), value) for value in (255, 233, 255)]
    for values in (alpha, upright):
        assert [row["bbox"] for row in values["annotations"]] == [[8, 4, 16, 16]]
        assert (values["width"], values["height"]) == (64, 48)
    assert deep["annotations"] == []


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


class Whole:
    """Masks the whole box and says what size it has; counts how often it is asked."""

    asked = 0

    def segment(self, image, box):
        type(self).asked += 1
        mask = np.zeros(image.shape[:2], bool)
        x0, y0, x1, y1 = map(round, box)
        mask[y0:y1, x0:x1] = True
        return mask

    def caption(self, image):
        return f"something of {image.shape[1]}x{image.shape[0]}"


@pytest.mark.parametrize("kind", OWN)
def test_boxes_of_your_own_get_masks_and_captions(kind, tmp_path, capsys):
    MAKERS[kind](tmp_path / "source")
    here = f"python:{__name__}:Whole"
    flags = ["--from", kind, "--input", f"{tmp_path}/source", "--output", f"{tmp_path}/out"]
    main([*flags, "--segmenter", here, "--captioner", here])
    assert "2 pictures annotated" in capsys.readouterr().out
    (path,) = (tmp_path / "out/coco/annotations").glob("instances_*.json")
    coco = Coco(path, path.with_name(path.name.replace("instances", "captions")))
    names = {Path(coco.file_name(image_id)).stem: image_id for image_id in coco.image_ids}
    for name, things in SCENES.items():
        rows = coco.annotations(names[name])
        assert [(row.category, row.box) for row in rows] == [
            (category, pytest.approx(box, abs=0.6)) for category, box in things
        ]
        for row, (_, box) in zip(rows, things, strict=True):
            mask = decode_mask(row.values["segmentation"], HEIGHT, WIDTH, "")
            assert abs(int(mask.sum()) - box[2] * box[3]) <= box[2] + box[3]
        assert coco.captions[names[name]]


def test_what_boxes_come_with_is_kept(tmp_path):
    """COCO's own captions and masks stay (a crop has a margin); a crowd stays a crowd; what cannot be used is named."""
    MAKERS["coco"](tmp_path / "source")
    path = tmp_path / "source/annotations/instances_train.json"
    values = json.loads(path.read_text())
    first, second, third = values["annotations"]
    first["caption"], second["iscrowd"], third["segmentation"] = "a big red cat", 1, []
    values["annotations"].append(dict(third, id=9, bbox=[500, 500, 4, 4]))
    path.write_text(json.dumps(values))
    here, Whole.asked = f"python:{__name__}:Whole", 0
    flags = ["--from", "coco", "--input", f"{tmp_path}/source", "--output", f"{tmp_path}/out"]
    main([*flags, "--segmenter", here, "--captioner", here])
    assert Whole.asked == 1, "only one has no mask"
    coco = Coco(tmp_path / "out/coco/annotations/instances_train.json")
    cat, crowd, dog = (row for image_id in coco.image_ids for row in coco.annotations(image_id))
    assert cat.caption == "a big red cat" and crowd.is_crowd and crowd.caption == "dog"
    assert dog.caption == "something of 16x9" and dog.values["segmentation"]["size"] == [HEIGHT, WIDTH]
    captions = read_json(tmp_path / "out/coco/annotations/captions_train.json")["annotations"]
    assert [row["caption"] for row in captions] == ["a red cat beside a dog", "one dog"]
    (note,) = read_json(tmp_path / "out/coco/report.json")["notes"]
    assert "expected a box on the image of 80x64 pixels" in note["note"]


def test_flags_that_do_not_go_with_boxes_of_your_own_are_one_line(tmp_path):
    MAKERS["yolo"](tmp_path / "source")
    flags = ["--from", "yolo", "--output", f"{tmp_path}/out"]
    with pytest.raises(InputError, match="--input: expected the dataset that --from names"):
        main(flags)
    with pytest.raises(InputError, match="--tags: cannot be used with --from"):
        main([*flags, "--input", f"{tmp_path}/source", "--tags", "cat"])
    with pytest.raises(InputError, match="--names: only means something with --from"):
        main(["--output", "x", "--names", "names.txt"])
    with pytest.raises(InputError, match="--images: expected a folder of pictures, or --from"):
        main(["--output", "x", "--detector", "python:a:b", "--tags", "cat"])
    with pytest.raises(InputError, match="nowhere: missing"):
        main([*flags, "--input", f"{tmp_path}/nowhere"])
