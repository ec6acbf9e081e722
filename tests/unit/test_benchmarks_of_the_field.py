"""The field's benchmarks: their files, their rules on cases with known answers, and runs in several goes."""

import json

import numpy as np
import pytest
import yaml

from instdiff_jax.cli import benchmark as command
from instdiff_jax.data.vision import Found, keep_best
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks import coco_mig, coco_position, layoutsam, overlaybench
from instdiff_jax.evaluation.benchmarks.case import Case, Judges, Thing
from instdiff_jax.evaluation.benchmarks.run import BENCHMARKS, open_judges, picture_path, read_cases
from instdiff_jax.evaluation.files import write_image
from instdiff_jax.files import read_json

# Two instances of COCO-MIG, and the colours that a picture of them may have.
MIG = {
    "a photo of a red cat and a blue dog": {
        "a red cat": [[0, 0, 0.5, 1]],
        "a blue dog": [[0.5, 0, 1, 1]],
        "coco_id": "6",
    }
}
RED, BLUE, GREEN = (200, 20, 20), (20, 20, 200), (20, 160, 20)


def halves(left, right):
    image = np.zeros((512, 512, 3), np.uint8)
    image[:, :256], image[:, 256:] = left, right
    return image


class InPlace:
    """Finds the cat on the left and the dog on the right, and masks whole boxes."""

    def __init__(self, shift=0.0):
        self.shift = shift

    def ground(self, image, phrase):
        x = {"cat": 0.0, "dog": 256.0}[phrase] + self.shift
        return Found(np.array([[x, 0.0, x + 256.0, 512.0]]), np.array([0.9]))

    def segment(self, image, box):
        mask = np.zeros(image.shape[:2], bool)
        x0, y0, x1, y1 = (int(edge) for edge in box)
        mask[y0:y1, x0:x1] = True
        return mask


def write_mig(folder):
    path = folder / "mig_bench_anno.yaml"
    path.write_text(yaml.safe_dump(MIG, sort_keys=False))
    return path


@pytest.mark.parametrize(
    "shift, colours, numbers",
    [
        (0, (RED, BLUE), {"mIoU L2": 1.0, "ISR L2": 1.0, "SR L2": 1.0}),
        (0, (RED, GREEN), {"mIoU L2": 0.5, "ISR L2": 0.5, "SR L2": 0.0}),
        (64, (RED, BLUE), {"mIoU L2": 0.6, "ISR L2": 1.0, "SR L2": 1.0}),  # 192 of 320 columns
        (128, (RED, BLUE), {"mIoU L2": 1 / 3, "ISR L2": 0.0, "SR L2": 0.0}),  # out of place: the IoU still counts
    ],
)
def test_coco_mig_of_known_pictures(shift, colours, numbers, tmp_path):
    (case,) = coco_mig.read(write_mig(tmp_path))
    judges = Judges(InPlace(shift), InPlace())
    found = coco_mig.table([(case, coco_mig.judge(case, halves(*colours), judges))])
    assert {name: found[name] for name in numbers} == pytest.approx(numbers)
    assert found["mIoU all"] == found["mIoU L2"]


def test_coco_mig_reads_both_of_its_files(tmp_path):
    (case,) = coco_mig.read(write_mig(tmp_path))
    segment = [{"label": thing.phrase, "bbox": thing.box} for thing in case.things]
    (tmp_path / "mig_bench.json").write_text(json.dumps({"6": {"caption": case.caption, "segment": segment}}))
    assert coco_mig.read(tmp_path) == [case]
    assert [thing.category for thing in case.things] == ["cat", "dog"] and case.level == "L2"
    assert case.file.rsplit("_")[-1] == "6.png"  # where its scorer reads the id
    layout = case.layout(512)
    assert layout.instances[1].box == (256, 0, 512, 512) and layout.instances[1].caption == "a blue dog"


POSITION = {
    "0": {
        "caption": "a photo of a cat and a dog ",
        "segment": [{"label": "a cat", "bbox": [0, 0, 0.5, 1]}, {"label": "a dog", "bbox": [0.5, 0, 1, 1]}],
    }
}


@pytest.mark.parametrize(
    "shift, iou, ap, ap50",
    [(0, 1.0, 1.0, 1.0), (64, 0.6, 0.3, 1.0), (128, 1 / 3, 0.0, 0.0)],  # at an IoU of 0.6: 0.50, 0.55, 0.60 of ten
)
def test_coco_position_of_known_pictures(shift, iou, ap, ap50, tmp_path):
    (tmp_path / "coco_position.jsonl").write_text(json.dumps(POSITION))
    (case,) = coco_position.read(tmp_path)
    assert case.file == "instdiff_0.png" and [thing.category for thing in case.things] == ["cat", "dog"]
    judged = coco_position.judge(case, halves(RED, BLUE), Judges(InPlace(shift)))
    found = coco_position.table([(case, json.loads(json.dumps(judged)))])
    success = float(iou >= 0.5)
    expected = {"ISR": success, "SR": success, "mIoU": iou, "AP": ap, "AP50": ap50, "SR L2": success}
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_coco_position_takes_the_nearest_box_with_the_highest_score(tmp_path):
    """As its scorer does: a box that touches nothing is no detection for AP, though it has the best score."""
    (tmp_path / "coco_position.jsonl").write_text(json.dumps(POSITION))
    (case,) = coco_position.read(tmp_path)

    class Two:
        def ground(self, image, phrase):
            far, near = [300.0, 0.0, 500.0, 512.0], [0.0, 0.0, 256.0, 512.0]
            boxes = [far, near] if phrase == "cat" else [near]
            return Found(np.array(boxes), np.array([0.9, 0.4][: len(boxes)]))

    cat, dog = coco_position.judge(case, halves(RED, BLUE), Judges(Two()))["things"]
    assert cat == {"iou": 1.0, "asked": [0, 0, 256, 512], "found": [0, 0, 256, 512], "score": 0.9}
    assert dog == {"iou": 0.0, "asked": [256, 0, 512, 512], "found": None, "score": 0.9}
    found = coco_position.table([(case, {"things": [cat, dog]})])
    assert (found["ISR"], found["SR"], found["mIoU"]) == (0.5, 0, 0.5) and found["AP"] == pytest.approx(51 / 101)


# RGB and hue, saturation, value: printed by OpenCV 5.0.0's cvtColor with COLOR_RGB2HSV.
OPENCV = {
    (200, 20, 20): (0, 229, 200),
    (20, 20, 200): (120, 229, 200),
    (255, 255, 255): (0, 0, 255),
    (0, 0, 0): (0, 0, 0),
    (17, 203, 94): (72, 234, 203),
    (254, 1, 77): (171, 254, 254),
    (90, 60, 30): (15, 170, 90),
    (1, 2, 3): (105, 170, 3),
}


def test_hue_saturation_and_value_are_those_of_opencv():
    pixels = np.array(list(OPENCV), np.uint8)
    assert coco_mig.to_hsv(pixels).tolist() == [list(values) for values in OPENCV.values()]


def test_a_fifth_of_the_mask_must_have_the_colour():
    image, mask = halves(RED, BLUE), np.ones((512, 512), bool)
    assert coco_mig.colour_share(image, mask, "red") == 0.5 and coco_mig.colour_share(image, mask, "white") == 0
    assert coco_mig.colour_share(image, np.zeros((512, 512), bool), "red") == 0


def test_of_boxes_on_one_thing_the_best_stays():
    boxes = np.array([[0, 0, 10, 10], [0, 0, 10, 9], [20, 0, 30, 10.0]])
    assert keep_best(Found(boxes, np.array([0.5, 0.9, 0.1])), 0.8) == [1, 2]


LAYOUTSAM = {
    "file_name": "sa_1.jpg", "width": 100, "height": 50, "global_caption": "two things",
    "bbox_list": "[[0, 0, 50, 50], [50, 0, 100, 50]]", "region_captions": "['a cat', 'a dog']",
    "detail_region_captions": "['a small red cat', 'a blue/white dog']",
}  # fmt: skip


def test_layoutsam_of_known_answers(tmp_path):
    (tmp_path / "eval.jsonl").write_text(json.dumps(LAYOUTSAM) + "\n")
    (case,) = layoutsam.read(tmp_path / "eval.jsonl")
    asked = []

    def answer(image, question):
        """The cat is there and red, its texture is wrong; the dog is not there."""
        asked.append((image[0, 0].tolist(), question))
        return "No." if "dog" in question or "texture" in question else "Yes"

    judges = Judges(answerer=type("A", (), {"answer": staticmethod(answer)})())
    found = layoutsam.table([(case, layoutsam.judge(case, halves(RED, BLUE), judges))])
    assert found == {"spatial": 0.5, "color": 0.5, "texture": 0.0, "shape": 0.5}
    assert len(asked) == 5  # attributes of what is not there are not asked for
    assert asked[0][0] == list(RED) and asked[-1][0] == list(BLUE)
    assert "a bluewhite dog" not in asked[-1][1] and '"a dog"' in asked[-1][1]


def overlay_case():
    annotations = {
        "cat_1": {"bbox": [0, 0, 512, 512], "category": "cat", "local_prompt": "a cat"},
        "cat_2": {"bbox": [256, 256, 768, 768], "category": "cat", "local_prompt": "another cat"},
        "dog_1": {"bbox": [600, 0, 1000, 400], "category": "dog", "local_prompt": "a dog"},
    }
    values = {
        "global_prompt": "two cats and a dog",
        "annotations": annotations,
        "relations": {"(cat_1, cat_2)": "near"},
    }
    values["valid_overlap"] = [{"overlap_box": [0, 1]}]
    return {"image_id": 12, "annotation": repr(values)}


def test_overlaybench_of_known_answers(tmp_path):
    (tmp_path / "hard.json").write_text(json.dumps([overlay_case()]))
    (case,) = overlaybench.read(tmp_path)
    assert case.file == "hard/seed_1/12.png" and case.level == "hard"

    def answer(image, question):
        if "Find every instance" in question:  # on a canvas of 512: the second cat exact, the first half as wide
            return '```json\n{"cat": [[128, 128, 384, 384], [0, 0, 128, 256], "x"], "bird": 3}\n```'
        return '{"cat_1": "Yes", "cat_2": "no", "(cat_1, cat_2)": "yes"}'

    judges = Judges(answerer=type("A", (), {"answer": staticmethod(answer)})())
    found = overlaybench.table([(case, overlaybench.judge(case, halves(RED, BLUE), judges))])
    assert found["mIoU hard"] == pytest.approx((1 + 0.5 + 0) / 3)
    # The pair's overlap is asked at 256..512; the found boxes do not overlap.
    assert found["O-mIoU hard"] == 0 and found["SR_E hard"] == pytest.approx(1 / 3) and found["SR_R hard"] == 1


# Made-up predictions for made-up boxes, scored by overlaybenchpytools.utils.calculate_overlap_iou (commit 67073aa).
OFFICIAL = [
    (0.25436236504755216, 0.0),
    (0.3695772821472812, 0.16025313026727667),
    (0.25231155939215094, 0.0),
    (0.5362251146828537, 0.2819327938609192),
    (0.4142582582841872, 0.09258826280102876),
    (0.3729711033377742, 0.0),
    (0.34748496766202125, 0.0),
    (0.4673363230873582, 0.0),
]


def made_up(seed):
    """A case of six boxes in two categories, and predictions near them."""
    rng = np.random.default_rng(seed)
    boxes = np.sort(rng.integers(0, 1024, (6, 2, 2)), axis=1) + np.array([[0, 0], [1, 1]])
    boxes = boxes.reshape(6, 4).tolist()
    names = [f"{('cat', 'dog')[i % 2]}_{i}" for i in range(6)]
    things = tuple(Thing(name, (0, 0, 1, 1), name[:3], name) for name in names)
    found = {"cat": [], "dog": []}
    for i, box in enumerate(boxes):
        if rng.random() < 0.8:
            found[names[i][:3]].append((np.array(box) + rng.integers(-80, 80, 4)).tolist())
    overlaps = [tuple(rng.choice(6, 2, replace=False).tolist()) for _ in range(4)]
    return Case("x", "x", things, "hard", "x.png", {"boxes": boxes, "overlaps": overlaps}), found


def test_overlaybench_scores_made_up_predictions_as_its_own_scorer_does():
    for seed, expected in enumerate(OFFICIAL):
        assert overlaybench.box_scores(*made_up(seed)) == pytest.approx(expected, abs=1e-12)


BROKEN = {
    "coco-mig": [
        ({"x": 3}, "expected {phrase: boxes, coco_id: number}"),
        ({"x": {"a red cat": [[0, 0, 1, 1]], "coco_id": 1}}, "expected 2 to 6 instances, got 1"),
        ({"x": {"a pink cat": [[0, 0, 1, 1]] * 2, "coco_id": 1}}, r"segment\[0\].label: expected 'a COLOUR NAME'"),
        ({"x": {"a red cat": [[0, 0, 0, 1]] * 2, "coco_id": 1}}, r"segment\[0\].bbox: expected x0 < x1"),
        ({"x": {"a red cat": [[0, 0, 1]] * 2, "coco_id": 1}}, r"segment\[0\].bbox: expected \[x0, y0, x1, y1\]"),
    ],
    "coco-position": [
        ([], "expected an object {id: {caption, segment}}"),
        ({"1": {"caption": "x", "segment": []}}, "expected an object with caption and segment"),
        ({"1": {"caption": "x", "segment": [{"label": "a cat", "bbox": [1, 0, 0, 1]}]}}, r"bbox: expected x0 < x1"),
        ({"1": {"caption": "", "segment": [{"label": "a cat", "bbox": [0, 0, 1, 1]}]}}, "caption: expected text"),
    ],
    "coco-box": [
        ([], "images: expected a list of objects"),
        ({"images": [{"id": 1, "width": 9, "height": 9}], "annotations": [], "categories": []}, "file_name: expected"),
    ],
    "layoutsam": [
        ({}, "expected a list of rows"),
        ([LAYOUTSAM | {"bbox_list": "[__import__('os')]"}], r"\[0\].bbox_list: expected a list in Python's notation"),
        ([LAYOUTSAM | {"width": None}], r"\[0\]: expected width and height"),
        ([LAYOUTSAM | {"region_captions": "['a cat']"}], "expected as many boxes as captions"),
        ([LAYOUTSAM, LAYOUTSAM], "expected an id of its own"),
    ],
    "overlaybench": [
        ([{"image_id": "../x"}], "expected an object with image_id"),
        ([overlay_case() | {"annotation": "{'annotations': 1}"}], "expected an object with annotations"),
        ([], "found no pictures in it"),
    ],
}


@pytest.mark.parametrize("name, values, words", [(name, *row) for name, rows in BROKEN.items() for row in rows])
def test_files_that_are_not_a_benchmarks_are_one_line(name, values, words, tmp_path):
    path = tmp_path / ("data.yaml" if name == "coco-mig" else "data.json")
    path.write_text(yaml.safe_dump(values) if name == "coco-mig" else json.dumps(values))
    with pytest.raises(InputError, match=words):
        read_cases(BENCHMARKS[name], path)


def test_every_benchmark_is_a_choice():
    assert set(command.NAMES) == set(BENCHMARKS)


def run_command(tmp_path, *flags):
    here = f"python:{__name__}:InPlace"
    data = ["--data", str(write_mig(tmp_path)), "--output", str(tmp_path / "out")]
    command.main(["coco-mig", *data, "--detector", here, "--segmenter", here, *flags])


def test_a_run_judges_each_picture_once_and_prints_the_table(tmp_path, capsys):
    (case,) = coco_mig.read(write_mig(tmp_path))
    path = picture_path(tmp_path / "out", case)
    path.parent.mkdir(parents=True)
    write_image(path, halves(RED, GREEN))
    run_command(tmp_path)
    told = capsys.readouterr().out
    assert "1 pictures judged, 0 were judged before" in told and "| this run | 50.0 | 50.0 | 0.0 |" in told
    assert "| InstanceDiffusion (printed, 1) | 52.0 | 58.0 |" in told
    assert read_json(tmp_path / "out" / "results.json")["numbers"]["ISR all"] == 0.5
    run_command(tmp_path)
    assert "0 pictures judged, 1 were judged before" in capsys.readouterr().out
    with pytest.raises(InputError, match="use another --output"):
        run_command(tmp_path, "--vlm", "python:other:judge")
    path.unlink()
    with pytest.raises(InputError, match="--checkpoint: expected a checkpoint folder"):
        run_command(tmp_path)


def test_a_missing_judge_is_one_line():
    with pytest.raises(InputError, match="--segmenter: expected transformers:NAME"):
        open_judges(("segmenter",), {})
    with pytest.raises(InputError, match="--vlm: .*cannot be loaded from this machine"):
        open_judges(("answerer",), {"answerer": "transformers:/nowhere"})
