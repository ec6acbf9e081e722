"""LVIS's own average precision: known answers, and lvis-api's numbers on made-up predictions to the last digit.

With lvis-api on the path (pip install --no-deps lvis) the comparison runs live.
"""

import importlib.util
import json
import sys
import types

import numpy as np
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks.run import BENCHMARKS, open_judges
from instdiff_jax.geometry.masks import RLE

SIDE = 64
BLANK = np.zeros((SIDE, SIDE, 3), np.uint8)


def rectangle(box):
    mask = np.zeros((SIDE, SIDE), bool)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = True
    return RLE.from_mask(mask).to_dict()


def category(number, frequency="f"):
    return {"id": number, "name": f"thing_{number}", "frequency": frequency}


def image(number, absent=(), partly=()):
    row = {"id": number, "width": SIDE, "height": SIDE, "coco_url": f"http://x/val2017/{number:012}.jpg"}
    return row | {"neg_category_ids": list(absent), "not_exhaustive_category_ids": list(partly)}


def annotation(number, image_id, category_id, box):
    row = {"id": number, "image_id": image_id, "category_id": category_id, "bbox": list(box)}
    return row | {"area": float(box[2] * box[3]), "segmentation": rectangle(box)}


def prediction(image_id, category_id, score, box):
    row = {"image_id": image_id, "category_id": category_id, "score": score, "bbox": list(box)}
    x, y, w, h = box
    return row | {"segmentation": rectangle((x, y, w, max(h - 2, 1)))}


def write(folder, truth, found):
    (folder / "lvis_v1_val.json").write_text(json.dumps(truth))
    (folder / "predictions.json").write_text(json.dumps(found))


def numbers(folder, name):
    benchmark = BENCHMARKS[name]
    cases = benchmark.read(folder / "lvis_v1_val.json")
    judges = open_judges(benchmark.judges, {"detector": f"predictions:{folder / 'predictions.json'}"}, cases, SIDE)
    judged = [(case, json.loads(json.dumps(benchmark.judge(case, BLANK, judges)))) for case in cases]
    return benchmark.table(judged)


# ---------------------------------------------------------------- known answers


def score(folder, images, annotations, found, categories=(1, 2)):
    truth = {"images": images, "annotations": annotations, "categories": [category(k) for k in categories]}
    write(folder, truth, found)
    return pytest.approx(numbers(folder, "lvis-box")["box AP"], rel=1e-12, abs=1e-12)


def test_detections_of_categories_that_nobody_looked_for_do_not_count(tmp_path):
    box, other = (4, 4, 20, 20), (40, 40, 20, 20)
    things = [annotation(1, 1, 1, box), annotation(2, 2, 2, box)]
    right = [prediction(1, 1, 0.5, box), prediction(2, 2, 0.5, box)]
    assert score(tmp_path, [image(1), image(2)], things, right) == 1
    # In image 1 nobody looked for thing 2: the better-scored false alarm is nothing. Where it is known to be absent, a
    # precision of 1/2 remains for it, and 1 for thing 1.
    wrong = [*right, prediction(1, 2, 0.9, other)]
    assert score(tmp_path, [image(1), image(2)], things, wrong) == 1
    assert score(tmp_path, [image(1, absent=[2]), image(2)], things, wrong) == 0.75


def test_unmatched_detections_do_not_count_where_not_all_is_marked(tmp_path):
    box, other = (4, 4, 20, 20), (40, 40, 20, 20)
    found = [prediction(1, 1, 0.5, box), prediction(1, 1, 0.9, other)]
    things = [annotation(1, 1, 1, box)]
    assert score(tmp_path, [image(1)], things, found, [1]) == 0.5
    assert score(tmp_path, [image(1, partly=[1])], things, found, [1]) == 1
    assert score(tmp_path, [image(1, partly=[1])], things, found[1:], [1]) == 0, "not found is not found"


def test_300_detections_of_a_picture_count_and_no_more(tmp_path):
    box, other = (4, 4, 20, 20), (40, 40, 20, 20)
    things = [annotation(1, 1, 1, box), annotation(2, 1, 2, other)]
    many = [prediction(1, 2, 0.9, (0, 0, 2, 2))] * 299
    assert score(tmp_path, [image(1)], things, [*many, prediction(1, 1, 0.5, box)]) == 0.5
    assert score(tmp_path, [image(1)], things, [*many, many[0], prediction(1, 1, 0.5, box)]) == 0


def test_averages_by_frequency(tmp_path):
    box = (4, 4, 20, 20)
    truth = {"images": [image(1)], "categories": [category(1, "r"), category(2, "c"), category(3, "f")]}
    truth["annotations"] = [annotation(1, 1, 1, box), annotation(2, 1, 2, box)]
    write(tmp_path, truth, [prediction(1, 1, 0.5, box)])
    # The mask found is a tenth smaller: an IoU of 0.9, above nine of the ten thresholds.
    expected = {"mask AP": 0.45, "mask AP50": 0.5, "mask AP75": 0.5, "mask APr": 0.9, "mask APc": 0.0}
    assert numbers(tmp_path, "lvis-mask") == pytest.approx(expected), "no frequent category is annotated"
    (case,) = BENCHMARKS["lvis-mask"].read(tmp_path / "lvis_v1_val.json")
    assert [thing.phrase for thing in case.things] == ["thing 1", "thing 2"] and case.caption == "thing 1, thing 2"
    assert case.file == "000000000001.jpg" and BENCHMARKS["lvis-mask"].layout(case, SIDE).instances[0].mask.sum() == 400


def test_files_without_lvis_fields_are_one_line(tmp_path):
    thing = annotation(1, 1, 1, (4, 4, 20, 20))
    good = {"images": [image(1)], "annotations": [thing], "categories": [category(1)]}
    for key, row, message in (
        ("images", {k: v for k, v in image(1).items() if k[0] != "n"}, "image 1: neg_category_ids: expected ids"),
        (
            "images",
            image(1, partly=[7]),
            r"image 1: not_exhaustive_category_ids: expected ids of categories, got \[7\]",
        ),
        ("categories", {"id": 1, "name": "x"}, "category 1: frequency: expected r, c or f, got None"),
        ("categories", category(1, ["r"]), r"category 1: frequency: expected r, c or f, got \['r'\]"),
    ):
        write(tmp_path, good | {key: [row]}, [])
        with pytest.raises(InputError, match=message):
            BENCHMARKS["lvis-box"].read(tmp_path / "lvis_v1_val.json")


# ---------------------------------------------------------------- lvis-api


def made_up(seed):
    """An annotation file of LVIS's and predictions near it: ten images, six categories, one image with 330 finds."""
    rng = np.random.default_rng(seed)
    truth = {"images": [], "annotations": [], "categories": [category(k, "rccffr"[k - 1]) for k in range(1, 7)]}
    found = []

    def place():
        x, y = rng.integers(0, 40, 2)
        return [int(v) for v in (x, y, *rng.integers(4, 24, 2))]

    for number in range(1, 11):
        shown = rng.integers(1, 6, rng.integers(0, 6))
        for kind in map(int, shown):
            box = place()
            truth["annotations"].append(annotation(len(truth["annotations"]) + 1, number, kind, box))
            for _ in range(rng.integers(0, 3)):
                near = [max(int(v + d), 1) for v, d in zip(box, rng.integers(-3, 4, 4), strict=True)]
                found.append(prediction(number, kind, round(float(rng.random()), 2), near))
        for _ in range(330 if number == 4 else 4):
            found.append(prediction(number, int(rng.integers(1, 7)), round(float(rng.random()), 2), place()))
        absent = sorted({int(k) for k in rng.integers(1, 7, 3)} - set(map(int, shown)))
        partly = sorted({int(k) for k in shown if rng.random() < 0.4})
        truth["images"].append(image(number, absent, partly))
    return truth, found


NAMES = ("AP", "AP50", "AP75", "APr", "APc", "APf")
# Of made_up(0), made_up(1), made_up(2): boxes, then masks, printed by lvis-api 0.5.3.
OFFICIAL = [
    (
        (
            0.08686506135400557,
            0.21568149280879986,
            0.0024045261669024044,
            0.03066194043339425,
            0.19564356435643562,
            0.006188118811881188,
        ),
        (
            0.06266853397764079,
            0.17430802570259923,
            0.027256843331391965,
            0.014511929671325162,
            0.14193069306930692,
            0.007484677039132485,
        ),
    ),
    (
        (
            0.07157106589779856,
            0.22732238058970733,
            0.0033333333333333335,
            0.15148514851485145,
            0.03233054074638232,
            0.07085454974068833,
        ),
        (0.07145268922496643, 0.2001166600176501, 0.0, 0.20198019801980197, 0.038880426504188874, 0.03876119754832626),
    ),
    (
        (
            0.05474765270180556,
            0.17091934412789592,
            0.00632986375560633,
            0.13391089108910892,
            0.02174476632793799,
            0.04816891988202142,
        ),
        (
            0.039049507298857415,
            0.17091934412789592,
            0.0016030174446016031,
            0.08787128712871285,
            0.019590013875028584,
            0.03409811080775851,
        ),
    ),
]


def theirs(folder, kind, monkeypatch):
    """lvis-api's numbers. It draws with OpenCV, which its measures do not need, and uses an old name of numpy's."""
    if "cv2" not in sys.modules and importlib.util.find_spec("cv2") is None:
        monkeypatch.setitem(sys.modules, "cv2", types.ModuleType("cv2"))
    monkeypatch.setattr(np, "float", float, raising=False)
    from lvis import LVISEval

    evaluation = LVISEval(*(str(folder / name) for name in ("lvis_v1_val.json", "predictions.json")), kind)
    evaluation.run()
    return {name: evaluation.results[name] for name in NAMES if evaluation.results[name] > -1}


def compare(folder, seed, kind, format):
    write(folder, *made_up(seed))
    ours = numbers(folder, f"lvis-{format}")
    return {name.removeprefix(f"{format} "): value for name, value in ours.items()}


@pytest.mark.parametrize("seed", range(3))
def test_made_up_predictions_score_as_lvis_api_says(seed, tmp_path):
    for (kind, format), official in zip({"bbox": "box", "segm": "mask"}.items(), OFFICIAL[seed], strict=True):
        assert compare(tmp_path, seed, kind, format) == dict(zip(NAMES, official, strict=True))


@pytest.mark.skipif(importlib.util.find_spec("lvis") is None, reason="lvis-api (pip install --no-deps lvis) is missing")
@pytest.mark.parametrize("seed", range(12))
def test_made_up_predictions_against_lvis_api(seed, tmp_path, monkeypatch):
    for kind, format in {"bbox": "box", "segm": "mask"}.items():
        assert compare(tmp_path, seed, kind, format) == theirs(tmp_path, kind, monkeypatch)
