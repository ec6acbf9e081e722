"""InstanceDiffusion's own protocol on COCO: known answers, and the official scripts' functions on made-up pictures.

INSTDIFF_REFERENCE=InstanceDiffusion python -m pytest tests/unit/test_coco_protocol.py compares with the scripts live.
"""

import importlib.util
import json
import os
import sys
import types
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from instdiff_jax.cli import benchmark as command
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks import coco_protocol as protocol
from instdiff_jax.evaluation.benchmarks import coco_scores as scores
from instdiff_jax.evaluation.benchmarks.run import BENCHMARKS, open_judges, picture_path, write_picture
from instdiff_jax.files import read_json
from instdiff_jax.geometry.masks import RLE

SIDE = 64
REFERENCE = os.environ.get("INSTDIFF_REFERENCE")
live = pytest.mark.skipif(not REFERENCE, reason="INSTDIFF_REFERENCE does not name a clone of the official repository")


def square(x0, y0, x1, y1, side=SIDE):
    mask = np.zeros((side, side), bool)
    mask[y0:y1, x0:x1] = True
    return mask


def rle(mask):
    return RLE.from_mask(mask).to_dict()


def pim(asked, found, rng=None):
    asked, found = [rle(mask) for mask in asked], [rle(mask) for mask in found]
    return scores.points_in_masks(asked, found, scores.match_masks(scores.mask_ious(asked, found)), rng)


# ---------------------------------------------------------------- known answers


def test_masks_are_matched_one_to_one_in_order_whatever_their_category():
    left, right = square(0, 0, 20, 20), square(30, 0, 50, 20)
    # The first takes the only good one; the second gets what is left, though they do not touch.
    both = scores.mask_ious([rle(left), rle(square(0, 0, 20, 10))], [rle(right), rle(left)])
    assert scores.match_masks(both) == [(0, 1), (1, 0)]
    assert scores.match_masks(scores.mask_ious([rle(left)] * 2, [rle(left)])) == [(0, 0)]
    assert scores.mask_ious([rle(left)], [rle(left)] * 300).shape == (1, 300)
    nothing = square(0, 0, 0, 0)
    assert scores.match_masks(scores.mask_ious([rle(nothing)], [rle(nothing)])) == []
    assert scores.match_masks(scores.mask_ious([rle(nothing)], [rle(left)])) == [(0, 0)]


def test_points_in_masks_by_hand():
    left, right = square(0, 0, 20, 20), square(30, 0, 50, 20)
    assert pim([left, right], [right, left]) == 1
    assert pim([left, right], [left]) == 1, "an instance without a mask to match does not count"
    assert pim([left, right], [left, square(30, 0, 39, 20)]) == 0.5, "the centre of 30..49 is 39"
    assert pim([left], []) is None and pim([square(0, 0, 0, 0)], [left]) is None
    ring = left & ~square(5, 5, 15, 15)
    assert pim([ring], [ring]) == 0, "the box's centre lies in the hole, in both masks"


def test_scribbles_in_masks_by_hand():
    left = square(0, 0, 20, 20)
    assert pim([left], [square(0, 0, 64, 64)], np.random.RandomState(0)) == 1
    assert pim([left], [square(40, 40, 60, 60)], np.random.RandomState(0)) == 0
    half = pim([left], [square(0, 0, 10, 20)], np.random.RandomState(0))
    points = np.argwhere(left)[np.random.RandomState(0).choice(400, 20, replace=False)]
    assert half == np.mean(points[:, 1] < 10) and 0 < half < 1
    # A pixel at (0, 0) alone has coordinates that sum to 0, which the official script takes for an empty mask.
    assert pim([square(0, 0, 1, 1)], [left], np.random.RandomState(0)) is None


class RedLeft:
    """CLIP of two numbers: how red a crop is, and how blue."""

    def embed_images(self, images):
        means = np.array([image.reshape(-1, 3).mean(0)[[0, 2]] for image in images])
        return means / np.linalg.norm(means, axis=1, keepdims=True)

    def embed_texts(self, texts):
        angles = [0.0 if "red" in text else np.pi / 2 if "blue" in text else np.pi for text in texts]
        return np.array([[np.cos(angle), np.sin(angle)] for angle in angles])


def red_and_blue():
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    image[:, :32], image[:, 32:] = (200, 0, 0), (0, 0, 200)
    return image


def test_attributes_are_asked_for_in_the_layouts_box():
    values = ("red", "blue", "green")
    ask = partial(scores.attribute_score, RedLeft(), red_and_blue())
    assert ask((0, 0, 0.5, 1), "red dog", values, "red") == (pytest.approx(1), True)
    assert ask((0.5, 0, 1, 1), "red dog", values, "red") == (pytest.approx(0), False)
    assert ask((0.2, 0.2, 0.2, 0.2), "red dog", values, "red") is None
    assert scores.mean_of_means([[1, 0], [1], []]) == 0.75, "over instances, then over pictures"


# ---------------------------------------------------------------- files, pictures, tables


def write_coco(folder, side=SIDE):
    """Two pictures with three things, one crowd, and one picture with nothing."""
    boxes = {
        1: [(8, [0, 0, 32, 64], 0), (2, [40, 8, 16, 16], 0)],
        5: [(4, [10, 10, 20, 40], 0), (11, [40, 0, 9, 9], 1)],
    }
    rows = []
    for image_id, annotations in boxes.items():
        for number, (x, y, w, h), crowd in annotations:
            mask = square(x, y, x + w, y + h)
            row = {"id": number, "image_id": image_id, "category_id": 3 if number == 2 else 7, "iscrowd": crowd}
            rows.append(row | {"bbox": [x, y, w, h], "area": w * h, "segmentation": rle(mask)})
    data = {"images": [{"id": i, "width": SIDE, "height": SIDE, "file_name": f"{i:012}.jpg"} for i in (5, 1, 9)]}
    data |= {"annotations": rows, "categories": [{"id": 3, "name": "cat"}, {"id": 7, "name": "dog"}]}
    (folder / "instances_val2017.json").write_text(json.dumps(data))
    captions = [{"id": 1, "image_id": 1, "caption": "A dog and a cat."}, {"id": 2, "image_id": 1, "caption": "No."}]
    (folder / "captions_val2017.json").write_text(json.dumps({"annotations": captions}))
    return folder / "instances_val2017.json"


def predictions(path, folder):
    """The annotations themselves as predictions, with the cat called a dog."""
    rows = [
        {"image_id": row["image_id"], "category_id": 7, "score": 0.9, "bbox": row["bbox"]}
        | {"segmentation": row["segmentation"]}
        for row in json.loads(path.read_text())["annotations"]
    ]
    (folder / "predictions.json").write_text(json.dumps(rows))
    return f"predictions:{folder / 'predictions.json'}"


def test_cases_are_those_of_the_official_script(tmp_path):
    first, second, empty = protocol.read(write_coco(tmp_path))
    assert [case.key for case in (first, second, empty)] == ["1", "5", "9"]
    assert first.caption == "A dog and a cat.dog, cat", "no space between: the official script has none"
    assert second.caption == "dog, dog" and empty.things == () and first.file == "000000000001.jpg"
    assert [thing.phrase for thing in second.things] == ["dog", "dog"], "crowds are asked for"
    (coloured, _, _) = protocol.read(tmp_path / "instances_val2017.json", "colour")
    assert [thing.phrase for thing in coloured.things] == ["black dog", "red cat"], "ids 8 and 2 modulo 8"
    layout = protocol.layout(first, 128)
    assert layout.instances[0].box == (0, 0, 64, 128) and layout.instances[0].point == (32, 64)
    assert layout.instances[1].mask.sum() == 4 * 16 * 16 and layout.instances[1].scribble.shape == (20, 2)
    assert layout.instances[1].mask[tuple(layout.instances[1].scribble.astype(int).T[::-1])].all()
    assert len(protocol.layout(empty, 64).instances) == 1


def judged_by(name, path, detector):
    benchmark = BENCHMARKS[name]
    cases = benchmark.read(path)
    judges = open_judges(benchmark.judges, {"detector": detector}, cases, SIDE)
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    verdicts = [(case, json.loads(json.dumps(benchmark.judge(case, image, judges)))) for case in cases]
    return benchmark.table(verdicts)


def test_tables_of_known_predictions(tmp_path):
    path = write_coco(tmp_path)
    detector = predictions(path, tmp_path)
    # The cat is missed, and the dog in its place is a false alarm of the same score.
    assert judged_by("coco-box", path, detector)["box AR"] == 0.5
    found = judged_by("coco-mask", path, detector)
    assert found["mask AR"] == 0.5 and found["mask mIoU"] == 1, "pairs have no category"
    assert 0.4 < found["mask AP"] < 0.5
    assert judged_by("coco-point", path, detector) == {"PiM": 1.0}
    assert judged_by("coco-scribble", path, detector) == {"PiM": 1.0}


def test_masks_are_needed_for_all_but_boxes(tmp_path):
    path = write_coco(tmp_path)
    rows = json.loads(Path(predictions(path, tmp_path).removeprefix("predictions:")).read_text())
    for row in rows:
        del row["segmentation"]
    (tmp_path / "predictions.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match="expected a detector that finds masks"):
        judged_by("coco-point", path, f"predictions:{tmp_path / 'predictions.json'}")
    assert judged_by("coco-box", path, f"predictions:{tmp_path / 'predictions.json'}")["box AR"] == 0.5
    with pytest.raises(InputError, match="--clip: expected a CLIP model"):
        open_judges(("clip",), {})


def test_the_command_judges_attributes(tmp_path, capsys):
    path = write_coco(tmp_path)
    benchmark = BENCHMARKS["coco-colour"]
    for case in benchmark.read(path):
        write_picture(picture_path(tmp_path / "out", case), red_and_blue())
    assert (tmp_path / "out" / "images" / "000000000001.jpg").read_bytes()[:2] == b"\xff\xd8", "a JPEG"
    flags = ["--data", str(path), "--output", str(tmp_path / "out"), "--clip", f"python:{__name__}:RedLeft"]
    command.main(["coco-colour", *flags])
    told = capsys.readouterr().out
    assert "| InstanceDiffusion (printed, 1) | 54.4 | 25.0 |" in told and "3 pictures judged" in told
    numbers = read_json(tmp_path / "out" / "results.json")["numbers"]
    # Picture 1: a black dog on red, a red cat on blue. Picture 5: a yellow dog (id 4), and a green crowd (id 11).
    assert numbers["accuracy"] == 0 and set(numbers) == {"accuracy", "CLIP"}
    (tmp_path / "captions_val2017.json").unlink()
    with pytest.raises(InputError, match="data: the images there were made with"):
        command.main(["coco-colour", *flags])


# ---------------------------------------------------------------- the official scripts


def official(name, **stubs):
    """A script of the official repository as a module; `stubs` stand for libraries that it imports."""
    spec = importlib.util.spec_from_file_location(name, Path(REFERENCE) / "eval" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for library, attributes in stubs.items():
            fake = types.ModuleType(library)
            vars(fake).update(attributes)
            patch.setitem(sys.modules, library, fake)
        spec.loader.exec_module(module)
    return module


def made_up(seed):
    """Masks asked for and masks found near them, of a picture of 48 pixels."""
    rng = np.random.default_rng(seed)

    def blob(x, y, w, h):
        return square(max(x, 0), max(y, 0), max(x + w, 0), max(y + h, 0), 48) & (rng.random((48, 48)) < 0.8)

    places = [(*rng.integers(0, 30, 2), *rng.integers(2, 20, 2)) for _ in range(5)]
    asked = [blob(*place) for place in places] + [square(0, 0, 0, 0, 48)] * (seed % 2)
    found = [blob(*(np.array(place) + rng.integers(-5, 5, 4))) for place in places if rng.random() < 0.8]
    return asked, [found[i] for i in rng.permutation(len(found))]


# PiM of made_up(0), made_up(1), ...: of centres and of scribbles, printed by the functions of eval/eval_pim.py.
OFFICIAL = [
    (0.4, 0.26),
    (0.25, 0.225),
    (0.5, 0.275),
    (0.2, 0.12),
    (0.4, 0.19),
    (0.25, 0.3125),
    (0.6666666666666666, 0.2333333333333333),
    (0.5, 0.28750000000000003),
]


def official_pim(script, asked, found, scribbles):
    """The loop of the script's main part."""
    inside = []
    for i, k in script.match_masks(asked, found, 0.0):
        if scribbles:
            points = script.sample_random_points_from_mask(asked[i], 20)
            if np.sum([np.sum(point) for point in points]) == 0:
                continue
            inside.append(script.calculate_scribble_inside_or_not(predicted_mask=found[k], scribbles=points))
        else:
            one = script.calculate_point_inside_or_not(predicted_mask=found[k], ground_truth_mask=asked[i])
            inside += [] if one is None else [one]
    return np.mean(inside) if inside else None


def test_made_up_pictures_score_as_the_official_script_says():
    for seed, (centres, scribbles) in enumerate(OFFICIAL):
        asked, found = made_up(seed)
        assert pim(asked, found) == centres
        assert pim(asked, found, np.random.RandomState(seed)) == scribbles


@live
@pytest.mark.filterwarnings("ignore:invalid value")
def test_points_in_masks_against_the_official_script():
    script = official("eval_pim")
    for seed in range(40):
        asked, found = made_up(seed)
        ours = [rle(mask) for mask in asked], [rle(mask) for mask in found]
        assert scores.match_masks(scores.mask_ious(*ours)) == script.match_masks(asked, found, 0.0)
        assert pim(asked, found) == official_pim(script, asked, found, False)
        np.random.seed(seed)
        theirs = official_pim(script, asked, found, True)
        assert pim(asked, found, np.random.RandomState(seed)) == theirs


@live
def test_attributes_against_the_official_script(monkeypatch):
    """Its own function, with a CLIP of a few random numbers in place of the real one."""
    torch = pytest.importorskip("torch")
    from PIL import Image

    names = dict.fromkeys(("CLIPModel", "CLIPTokenizer", "CLIPFeatureExtractor"))
    script = official("eval_attribute_binding", open_clip={}, transformers=names)
    monkeypatch.setattr(torch.Tensor, "cuda", lambda self: self)
    weights = torch.from_numpy(np.random.default_rng(0).normal(size=(8 * 8 * 3, 16))).float()
    words = {}

    class Model:
        def encode_image(self, image):
            return image.reshape(1, -1) @ weights

        def encode_text(self, text):
            return text

    def word(text):
        words.setdefault(text, np.random.default_rng(len(words)).normal(size=(1, 16)))
        return torch.from_numpy(words[text]).float()

    def preprocess(image):
        return torch.from_numpy(np.asarray(image.resize((8, 8))).astype(np.float32) / 255)

    class Same:
        def embed_images(self, images):
            rows = torch.cat([Model().encode_image(preprocess(Image.fromarray(image))) for image in images])
            return (rows / torch.linalg.norm(rows, axis=-1, keepdims=True)).numpy()

        def embed_texts(self, texts):
            rows = torch.cat([word(text) for text in texts])
            return (rows / torch.linalg.norm(rows, axis=-1, keepdims=True)).numpy()

    colours = protocol.ATTRIBUTES["colour"]
    labels = [word(f"a {colour} object") for colour in colours]
    labels = torch.stack([row / torch.linalg.norm(row, axis=-1, keepdims=True) for row in labels])
    vars(script).update(use_open_clip=True, tokenizer=word, model=Model(), preprocess=preprocess)
    vars(script).update(color_list=list(colours), label_prompts_feats=labels)
    args = types.SimpleNamespace(test_random_colors=True, test_random_textures=False)
    image = np.random.default_rng(1).integers(0, 256, (48, 48, 3)).astype(np.uint8)
    right = 0
    for seed in range(30):
        rng = np.random.default_rng(seed)
        x0, y0, x1, y1 = box = tuple(np.sort(rng.random((2, 2)), axis=0).ravel())
        if round(x1 * 48) == round(x0 * 48) or round(y1 * 48) == round(y0 * 48):
            continue
        phrase = f"{colours[seed % 8]} dog"
        crop = Image.fromarray(image).crop((x0 * 48, y0 * 48, x1 * 48, y1 * 48))
        cosine, accurate = script.clip_score(phrase, crop, args)
        ours = scores.attribute_score(Same(), image, box, phrase, colours, phrase.split()[0])
        assert ours == (pytest.approx(cosine, abs=1e-7), bool(accurate))
        right += accurate
    assert 0 < right < 30
