"""The evaluation's measures against cases worked out by hand, pycocotools itself, and closed forms."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.attributes import unnamed_kinds
from instdiff_jax.evaluation.fid import Gaussian, fid_of_file, fit_gaussian, frechet_distance
from instdiff_jax.evaluation.image import EvaluatedImage
from instdiff_jax.evaluation.metrics import (
    Found,
    attribute_accuracy,
    attribute_leakage,
    average_precision,
    measure_targets,
    points_in_mask,
)
from instdiff_jax.evaluation.report import check_same_images, read_report
from instdiff_jax.evaluation.split import Scene, Target
from instdiff_jax.geometry.masks import encode_mask

SIZE = 40


def box_mask(x0, y0, x1, y1):
    mask = np.zeros((SIZE, SIZE), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def target(box, category="cat", asked=True, point=None, scribble=None, with_mask=True, **attributes):
    x0, y0, x1, y1 = box
    point = point or ((x0 + x1) / 2, (y0 + y1) / 2)
    scribble = np.array(scribble if scribble is not None else [point] * 20, np.float64)
    rle = encode_mask(box_mask(*box)) if with_mask else None
    return Target(category, f"a {category}", tuple(map(float, box)), rle, point, scribble, attributes, asked)


def found(box, score=0.9, category="cat", with_mask=True, **attributes):
    x0, y0, x1, y1 = box
    rle = encode_mask(box_mask(*box)) if with_mask else None
    return Found(category, score, (float(x0), float(y0), float(x1 - x0), float(y1 - y0)), rle, attributes)


def scene(*targets, image_id=1):
    return Scene(image_id, Path("none.png"), SIZE, SIZE, SIZE, "a scene", targets)


# ---------------------------------------------------------------- average precision

A, B, C = (0, 0, 10, 10), (20, 0, 30, 10), (0, 20, 10, 30)
NOTHING = (30, 30, 38, 38)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_perfect_detections(kind):
    scenes = [scene(target(A), target(B, "dog")), scene(target(C), image_id=2)]
    detections = [[found(A), found(B, category="dog")], [found(C, 0.3)]]
    precision = average_precision(scenes, detections, kind, ["cat", "dog", "bird"])
    assert precision[:4] == pytest.approx((1, 1, 1, 1))
    assert precision.by_category == pytest.approx({"cat": 1, "dog": 1})


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_a_miss_and_a_false_alarm_by_hand(kind):
    """Two targets; ranked by score: right, wrong, right. Precision is 1 up to recall 1/2 and 2/3 beyond it."""
    scenes = [scene(target(A), target(B))]
    detections = [[found(A, 0.9), found(NOTHING, 0.8), found(B, 0.7)]]
    precision = average_precision(scenes, detections, kind, ["cat"])
    # COCO takes 101 recalls 0, 0.01, …: 51 of them are at most 1/2.
    assert (precision.AP50, precision.AP) == pytest.approx(((51 * 1 + 50 * 2 / 3) / 101,) * 2)
    assert precision.AR == pytest.approx(1)
    only_first = average_precision(scenes, [detections[0][:1]], kind, ["cat"])
    assert only_first.AP50 == pytest.approx(51 / 101) and only_first.AR == pytest.approx(0.5)


def test_iou_thresholds_by_hand():
    """A detection of 10×10 against 10×8 has an IoU of 0.8: right at 7 of the 10 thresholds 0.50 … 0.95."""
    precision = average_precision([scene(target((0, 0, 10, 8)))], [[found(A)]], "bbox", ["cat"])
    assert precision[:4] == pytest.approx((0.7, 1, 1, 0.7))


def test_what_was_not_asked_for_is_neither_found_nor_missed():
    scenes = [scene(target(A), target(B, asked=False))]
    for detections in ([found(A)], [found(A, 0.5), found(B, 0.9)]):
        assert average_precision(scenes, [detections], "bbox", ["cat"])[:4] == pytest.approx((1, 1, 1, 1))
    without_mask = [scene(target(A), target(B, with_mask=False))]
    assert average_precision(without_mask, [[found(A)]], "segm", ["cat"]).AP == pytest.approx(1)
    assert average_precision(without_mask, [[found(A)]], "bbox", ["cat"]).AP50 == pytest.approx(51 / 101)


def test_other_categories_and_empty_pictures():
    scenes = [scene(target(A)), scene(target(B), image_id=2)]
    precision = average_precision(scenes, [[found(A, category="dog")], []], "bbox", ["cat", "dog"])
    assert precision[:4] == (0, 0, 0, 0)
    assert precision.by_category == {"cat": 0}, "no dog was asked for: it has no AP"
    unknown = average_precision(scenes, [[found(A, category="whale"), found(A)], [found(B)]], "bbox", ["cat"])
    assert unknown.AP == pytest.approx(1)
    # A false alarm in a picture that has none of the category counts there, and only there.
    alarm = average_precision(scenes, [[found(A), found(NOTHING, 0.95)], [found(B)]], "bbox", ["cat"])
    assert alarm.AP50 == pytest.approx((51 * 2 / 3 + 50 * 2 / 3) / 101)


@pytest.mark.parametrize("kind", ["bbox", "segm"])
def test_equals_pycocotools_on_files(kind, tmp_path):
    """The same random scenes written as COCO's files and evaluated by pycocotools as its users do."""
    rng = np.random.default_rng(0)
    names, scenes, detections, truth, results = ["cat", "dog"], [], [], [], []
    for number in range(1, 13):
        targets, rows = [], []
        for _ in range(rng.integers(1, 5)):
            x, y = rng.integers(0, SIZE - 14, 2)
            w, h = rng.integers(6, 14, 2)
            name = names[rng.integers(2)]
            targets.append(target((x, y, x + w, y + h), name))
            if rng.random() < 0.8:
                dx, dy = rng.integers(-2, 3, 2)
                x0, y0 = max(x + dx, 0), max(y + dy, 0)
                guess = (x0, y0, min(x0 + w, SIZE), min(y0 + h, SIZE))
                rows.append(found(guess, float(rng.random()), name if rng.random() < 0.9 else names[0]))
        rows += [found(NOTHING, float(rng.random()), names[rng.integers(2)])] * int(rng.random() < 0.3)
        scenes.append(scene(*targets, image_id=number))
        detections.append(rows)
        for item in targets:
            row = {"id": len(truth) + 1, "image_id": number, "category_id": names.index(item.category) + 1}
            row |= {"bbox": [float(v) for v in item.xywh], "segmentation": item.rle, "iscrowd": 0}
            truth.append(row | {"area": item.xywh[2] * item.xywh[3]})
        for item in rows:
            row = {"image_id": number, "category_id": names.index(item.category) + 1, "score": item.score}
            results.append(row | ({"bbox": list(item.box)} if kind == "bbox" else {"segmentation": item.rle}))
    content = {"images": [{"id": k, "width": SIZE, "height": SIZE} for k in range(1, 13)], "annotations": truth}
    content["categories"] = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
    for name, rows in (("truth", content), ("results", results)):
        (tmp_path / f"{name}.json").write_text(json.dumps(rows, default=lambda b: b.decode()))
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(tmp_path / "truth.json"))
        evaluation = COCOeval(coco, coco.loadRes(str(tmp_path / "results.json")), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    ours = average_precision(scenes, detections, kind, names)
    assert 0.05 < ours.AP < 0.95
    # Their first three are AP, AP50 and AP75 of all areas; the ninth is AR at 100 detections.
    assert (ours.AP, ours.AP50, ours.AP75, ours.AR) == pytest.approx(tuple(evaluation.stats[[0, 1, 2, 8]]))


# ---------------------------------------------------------------- each instance


def test_iou_points_and_match():
    wanted = target(A, point=(2.0, 3.0), scribble=[(1, 1)] * 15 + [(9, 9)] * 5)
    measure = measure_targets([wanted], [found((0, 0, 10, 5), colour="red")], 0.25)[0]
    assert measure.box_iou == measure.mask_iou == pytest.approx(0.5)
    assert measure.point_in == 1 and measure.scribble_in == pytest.approx(0.75)
    assert measure.match is not None and measure.match.attributes == {"colour": "red"}
    low = measure_targets([wanted], [found((0, 0, 10, 4))], 0.25)[0]
    assert low.match is None and low.box_iou == pytest.approx(0.4)


def test_only_sure_detections_of_the_category_count():
    wanted = target(A)
    for detection in (found(A, 0.2), found(A, category="dog")):
        measure = measure_targets([wanted], [detection], 0.25)[0]
        assert measure[:4] == (0, 0, 0, 0) and measure.match is None


def test_points_lie_in_any_mask_of_the_category():
    """PiM asks whether something of the kind is there, be it in two pieces."""
    wanted = target((0, 0, 20, 10), scribble=[(2, 2)] * 10 + [(17, 2)] * 10)
    halves = [found((0, 0, 10, 10)), found((10, 0, 20, 10), 0.5)]
    assert measure_targets([wanted], halves, 0.25)[0].scribble_in == 1
    assert measure_targets([wanted], halves[:1], 0.25)[0].scribble_in == 0.5


def test_a_detector_of_boxes_measures_no_masks():
    measure = measure_targets([target(A)], [found(A, with_mask=False)], 0.25, has_masks=False)[0]
    assert measure.box_iou == 1 and measure.match is not None
    assert (measure.mask_iou, measure.point_in, measure.scribble_in) == (None, None, None)
    # An annotation without a mask is matched by its box.
    plain = measure_targets([target(A, with_mask=False)], [found(A)], 0.25)[0]
    assert plain.mask_iou is None and plain.match is not None


def test_points_at_the_edges():
    mask = box_mask(0, 0, 5, 5)
    assert points_in_mask([(0, 0), (4.99, 4.99), (5, 0), (0, 5)], mask) == 0.5
    assert points_in_mask([(-1, 0), (SIZE + 3, SIZE)], mask) == 0.5, "clipped to the picture"
    assert points_in_mask([(1, 1)], None) == 0


# ---------------------------------------------------------------- attributes

WANTED = [
    target(A, colour="red", texture="plain"),
    target(B, colour="blue", texture="dotted"),
    target(C, colour="green"),
]


def seen(*attributes):
    """Measures of the WANTED, found with these attributes; None is not found."""
    boxes = (A, B, C)
    detections = [found(boxes[k], **values) for k, values in enumerate(attributes) if values is not None]
    return measure_targets(WANTED, detections, 0.25)


def test_attribute_accuracy_by_hand():
    measures = seen({"colour": "red", "texture": "dotted"}, {"colour": "blue", "texture": "dotted"}, None)
    numbers = attribute_accuracy(WANTED, measures, ["colour", "texture"])
    assert numbers == pytest.approx(
        {
            "colour_accuracy": 2 / 3,
            "colour_accuracy_found": 1.0,
            "texture_accuracy": 1 / 2,
            "texture_accuracy_found": 1 / 2,
            "all_attributes_accuracy": 1 / 3,
        }
    )
    nothing = attribute_accuracy(WANTED, seen(None, None, None), ["colour"])
    assert nothing == {"colour_accuracy": 0, "colour_accuracy_found": None}


def test_a_detector_with_other_words_for_attributes():
    """It says striped and dotted where the paper's benchmark asks for rubber and wood; colours are the same words."""

    def picture(asked, *seen):
        targets = [target((0, 0, 4, 4), **row) for row in asked]
        return EvaluatedImage(scene(*targets), [found((0, 0, 4, 4), **row) for row in seen], measures=[])

    asked = [dict(texture="rubber", colour="red"), dict(texture="wood", colour="blue")]
    seen = [dict(texture="striped", colour="red"), dict(texture="dotted", colour="red")]
    assert unnamed_kinds([picture(asked, *seen)], ["colour", "texture"]) == ["texture"]
    assert unnamed_kinds([picture(asked, {})], ["colour", "texture"]) == ["colour", "texture"]
    # A wrong answer is no other word.
    assert unnamed_kinds([picture(asked[:1], dict(texture="wood", colour="blue"))], ["colour", "texture"]) == []


def test_leaked_attributes_by_hand():
    # The first has the second's colour, the third one that nobody was asked for; the second is right.
    measures = seen({"colour": "blue"}, {"colour": "blue", "texture": "dotted"}, {"colour": "pink"})
    assert attribute_leakage([(WANTED, measures)], ["colour"]) == {"colour_leak": 0.5}
    # Another picture's colours are no neighbours'; what is not found, or right, does not count.
    other = [target(A, colour="pink")]
    lone = measure_targets(other, [found(A, colour="red")], 0.25)
    assert attribute_leakage([(WANTED, measures), (other, lone)], ["colour"])["colour_leak"] == pytest.approx(1 / 3)
    assert attribute_leakage([(WANTED, seen({"colour": "red"}, None, None))], ["colour"]) == {"colour_leak": None}


# ---------------------------------------------------------------- Fréchet distance


def test_shifted_gaussians_in_closed_form():
    """Two Gaussians with one covariance are as far apart as their means; exactly so for shifted samples."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((6, 6))
    features = rng.standard_normal((200, 6)) @ mixing
    shift = rng.standard_normal(6)
    distance = frechet_distance(fit_gaussian(features), fit_gaussian(features + shift))
    assert distance == pytest.approx((shift**2).sum(), rel=1e-9)
    assert frechet_distance(fit_gaussian(features), fit_gaussian(features)) == pytest.approx(0, abs=1e-8)


def test_commuting_covariances_in_closed_form():
    """With covariances that commute it is |m₁ − m₂|² + Σ (√λ₁ − √λ₂)²."""
    rng = np.random.default_rng(1)
    turn, _ = np.linalg.qr(rng.standard_normal((5, 5)))
    first, second = rng.random(5) + 0.1, np.array([0.0, 0.5, 2.0, 0.0, 1.0])
    means = rng.standard_normal((2, 5))
    a, b = (
        Gaussian(mean, turn @ np.diag(values) @ turn.T) for mean, values in zip(means, (first, second), strict=True)
    )
    expected = ((means[0] - means[1]) ** 2).sum() + ((np.sqrt(first) - np.sqrt(second)) ** 2).sum()
    # Without full rank the roots of eigenvalues near 0 are good to 1e-8 alone.
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-7)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-7)


def test_fitted_gaussian():
    features = np.random.default_rng(2).standard_normal((50, 4))
    gaussian = fit_gaussian(features)
    assert np.allclose(gaussian.mean, features.mean(0)) and np.allclose(gaussian.covariance, np.cov(features.T))


BAD_FEATURES = [
    (np.zeros((1, 4)), "of shape"),
    (np.zeros(5), "of shape"),
    (np.zeros((5, 0)), "of shape"),
    (np.full((5, 4), np.nan), "expected finite numbers"),
    (np.eye(4) * 1e200, "expected finite numbers of at most 1e"),
]


@pytest.mark.parametrize(("features", "words"), BAD_FEATURES)
def test_features_that_are_none(features, words):
    with pytest.raises(InputError, match=words):
        fit_gaussian(features)


@pytest.mark.parametrize("odd", [np.ones((6, 4), complex), np.full((6, 4), "1"), np.ones((6, 4), bool)])
def test_files_of_features_are_not_cast(tmp_path, odd):
    np.savez(tmp_path / "x.npz", generated=odd, real=np.ones((6, 4)))
    with pytest.raises(InputError, match="generated has the type"):
        fid_of_file(tmp_path / "x.npz")


@pytest.mark.parametrize("change", [{"metrics": {"box_AP": float("nan")}}, {"pictures": [{"image_id": [1]}]}])
def test_an_upper_bound_of_no_numbers(tmp_path, change):
    report = {"metrics": {"box_AP": 0.5}, "settings": {"annotations": "a"}, "pictures": [{"image_id": 1}]} | change
    (tmp_path / "report.json").write_text(json.dumps(report))
    with pytest.raises(InputError, match="expected a report"):
        check_same_images("report.json", read_report(tmp_path / "report.json", "a"), [1])


def test_features_packed_in_an_unknown_way(tmp_path):
    path = tmp_path / "x.npz"
    np.savez(path, generated=np.zeros((3, 2)), real=np.zeros((3, 2)))
    data = bytearray(path.read_bytes())
    start = data.index(b"PK\x01\x02")
    data[start + 10] = 99  # the method of compression
    path.write_bytes(data)
    with pytest.raises(InputError, match="x.npz: expected an .npz with arrays generated and real .*not supported"):
        fid_of_file(path)


def test_features_of_other_widths():
    rng = np.random.default_rng(3)
    with pytest.raises(InputError, match="expected the same number in both sets, got 3 and 4"):
        frechet_distance(fit_gaussian(rng.random((9, 3))), fit_gaussian(rng.random((9, 4))))
