"""SAM 2 and Florence-2 in annotate, and several pictures in a call: tiny models with random weights."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_hub import save_all, save_blip, save_blip2, save_florence2, save_grounding_dino, save_sam, save_sam2

from benchmarks import annotation
from instdiff_jax.cli import annotate
from instdiff_jax.coco import Coco
from instdiff_jax.data.vision import Answerer, BoxSegmenter, Captioner, Found, Tagger, caption_all, ground_all
from instdiff_jax.data.vision_hub import HubFlorence, HubSegmenter2, open_model
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.benchmarks.run import open_judges
from instdiff_jax.geometry.masks import decode_mask

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)
BOXES = [(8, 8, 40, 40), (0, 0, 64, 48), (30, 10, 60, 30)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """What flags say to open each model."""
    savers = dict(dino=save_grounding_dino, sam=save_sam, sam2=save_sam2)
    savers |= dict(blip=save_blip, blip2=save_blip2, florence=save_florence2)
    return save_all(tmp_path_factory.mktemp("hub"), **savers)


def test_sam2_gives_the_mask_that_it_rates_highest(models):
    """Against the network's own outputs for the squeezed picture and box."""
    segmenter = open_model("--segmenter", models["sam2"])
    assert isinstance(segmenter, HubSegmenter2) and isinstance(segmenter, BoxSegmenter)
    masks = segmenter.segment_all(IMAGE, BOXES)
    model = transformers.Sam2Model.from_pretrained(models["sam2"].removeprefix("transformers:")).eval()
    pixels = np.asarray(Image.fromarray(IMAGE).resize((64, 64), Image.Resampling.BILINEAR)) / 255.0
    pixels = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    for box, mask in zip(BOXES, masks, strict=True):
        assert mask.shape == (48, 64) and mask.dtype == bool and 0 < mask.sum() < mask.size
        np.testing.assert_array_equal(mask, segmenter.segment(IMAGE, box))
        x0, y0, x1, y1 = box
        inputs = torch.tensor([[[x0, y0 * 64 / 48, x1, y1 * 64 / 48]]])
        with torch.no_grad():
            outputs = model(pixel_values=torch.from_numpy(pixels).permute(2, 0, 1)[None].float(), input_boxes=inputs)
        best = outputs.pred_masks[0, 0, int(outputs.iou_scores.argmax())]
        large = torch.nn.functional.interpolate(best[None, None], (48, 64), mode="bilinear")[0, 0]
        np.testing.assert_array_equal(mask, large.numpy() > 0)


def test_sam2_is_opened_by_the_configs_of_the_published_video_models_too(models, tmp_path):
    folder = tmp_path / "video"
    transformers.Sam2Model.from_pretrained(models["sam2"].removeprefix("transformers:")).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "sam2_video"}))
    segmenter = open_model("--segmenter", f"transformers:{folder}")
    for mask, other in zip(
        segmenter.segment_all(IMAGE, BOXES), open_model("--segmenter", models["sam2"]).segment_all(IMAGE, BOXES)
    ):
        np.testing.assert_array_equal(mask, other)


def test_florence_describes_and_names(models, monkeypatch):
    florence = open_model("--captioner", models["florence"])
    assert isinstance(florence, HubFlorence) and isinstance(florence, Captioner)
    said = florence.caption(IMAGE)
    assert 0 < len(said) <= 40 and set(said) <= {*"abcdefgh"}
    tagger = open_model("--vlm", models["florence"])
    assert isinstance(tagger, Tagger) and not isinstance(tagger, Answerer)
    text = "cat<loc_1><loc_2><loc_30><loc_40>red ball<loc_5><loc_6><loc_70><loc_80><loc_1><loc_1><loc_9><loc_9>"
    asked = []

    def generate(input_ids, **settings):
        asked.append(tagger._processor.batch_decode(input_ids, skip_special_tokens=True)[0])
        return tagger._processor.tokenizer([text], return_tensors="pt")["input_ids"]

    monkeypatch.setattr(tagger._model, "generate", generate)
    assert tagger.tags(IMAGE) == ["cat", "red ball", "red ball"]
    assert asked == ["Locate the objects with category name in the image."]
    with pytest.raises(InputError, match="^--vlm: .*expected a model that answers questions"):
        open_judges(("answerer",), {"answerer": models["florence"]})


def test_several_at_once_are_the_same_as_one_by_one(models, monkeypatch):
    monkeypatch.setattr("instdiff_jax.data.vision_hub.BOX_THRESHOLD", 0.0)
    images = [IMAGE, IMAGE[::-1].copy(), IMAGE[:, :40].copy(), np.roll(IMAGE, 9, 1)]
    phrases = ["cat", "dog", "cat", "cat dog"]
    grounder = open_model("--detector", models["dino"])
    calls, forward = [], grounder._model.forward
    monkeypatch.setattr(
        grounder._model, "forward", lambda *args, **more: calls.append(len(more["input_ids"])) or forward(*args, **more)
    )
    together = ground_all(grounder, images, phrases)
    assert calls == [2, 1, 1], "one size and one length"
    for image, phrase, found in zip(images, phrases, together, strict=True):
        alone = grounder.ground(image, phrase)
        np.testing.assert_allclose(found.boxes, alone.boxes, atol=1e-3)
        np.testing.assert_allclose(found.scores, alone.scores, atol=1e-6)
    for name, kinds in {"blip": 1, "blip2": 4, "florence": 4}.items():
        captioner = open_model("--captioner", models[name])
        said = caption_all(captioner, images)
        assert said == [captioner.caption(image) for image in images] and len(set(said)) == kinds and all(said)
    segmenter = open_model("--segmenter", models["sam"])
    for box, mask in zip(BOXES, segmenter.segment_all(IMAGE, BOXES), strict=True):
        np.testing.assert_array_equal(mask, segmenter.segment(IMAGE, box))


def photos(folder):
    """Five pictures of two sizes, and one that cannot be read."""
    folder.mkdir()
    for k in range(5):
        Image.fromarray(np.roll(IMAGE, 5 * k, 1)[: 48 - 8 * (k == 2)]).save(folder / f"{k}.png")
    (folder / "broken.png").write_bytes(b"no picture")


def run(root, output, models, names, *more):
    flags = [part for flag, name in names.items() for part in (f"--{flag}", models[name])]
    flags += ["--images", root / "photos", "--output", root / output, "--min_score", "0", "--min_area", "0.03", *more]
    annotate.main([str(flag) for flag in flags])


def test_batches_make_the_same_folder(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("instdiff_jax.data.vision_hub.BOX_THRESHOLD", 0.0)
    photos(tmp_path / "photos")
    names = {"detector": "dino", "segmenter": "sam2", "captioner": "florence"}
    run(tmp_path, "single", models, names, "--tags", "cat,dog")
    run(tmp_path, "batches", models, names, "--tags", "cat,dog", "--batch", "4")
    assert "6 pictures annotated" in capsys.readouterr().out
    for path in sorted((tmp_path / "single/records").iterdir()):
        assert path.read_bytes() == (tmp_path / "batches/records" / path.name).read_bytes()
    notes = tmp_path / "batches/coco/annotations"
    coco = Coco(notes / "instances_train.json", notes / "captions_train.json")
    assert len(coco.image_ids) == 5 and len(coco.captions) == 5
    for image_id in coco.image_ids:
        size = coco.image(image_id)
        for row in coco.annotations(image_id):
            assert row.category in ("cat", "dog") and set(row.own_caption) <= {*"abcdefgh"}
            assert decode_mask(row.values["segmentation"], size.height, size.width, "").any()


def test_florence_names_what_to_look_for(models, tmp_path, monkeypatch):
    monkeypatch.setattr("instdiff_jax.data.vision_hub.BOX_THRESHOLD", 0.0)
    monkeypatch.setattr(HubFlorence, "tags", lambda self, image: ["Dog", "dog", "Cat"])
    photos(tmp_path / "photos")
    run(tmp_path, "out", models, {"detector": "dino", "vlm": "florence"}, "--batch", "3")
    coco = Coco(tmp_path / "out/coco/annotations/instances_train.json")
    rows = [row for image_id in coco.image_ids for row in coco.annotations(image_id)]
    assert {row.category for row in rows} == {"dog", "cat"}


def test_bad_folders_and_flags_are_one_line(models, tmp_path):
    for flag, folder in (("--segmenter", tmp_path / "none"), ("--captioner", tmp_path), ("--vlm", tmp_path)):
        with pytest.raises(InputError, match=f"^{flag}: {folder}: cannot be loaded from this machine") as error:
            open_model(flag, f"transformers:{folder}")
        assert "\n" not in str(error.value)
    for flag, name in (("--segmenter", "florence"), ("--captioner", "sam2"), ("--detector", "sam2")):
        with pytest.raises(InputError, match=f"^{flag}: .*{name}: cannot be loaded from this machine") as error:
            open_model(flag, models[name])
        assert "\n" not in str(error.value)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text(json.dumps({"model_type": "sam2"}))
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InputError, match=f"^--segmenter: {broken}: cannot be loaded") as error:
        open_model("--segmenter", f"transformers:{broken}")
    assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="--batch: expected a whole number of at least 1, got 0"):
        annotate.main(["--output", "x", "--images", "x", "--detector", "x", "--tags", "x", "--batch", "0"])


class Whole:
    """A stand-in that counts its calls."""

    calls = []

    def ground(self, image, phrase):
        return Found(np.array([[0.0, 0.0, 9.0, 9.0]]), np.array([0.9]))

    def caption_all(self, images):
        self.calls.append(len(images))
        return ["all of it"] * len(images)

    def caption(self, image):
        return self.caption_all([image])[0]


def test_the_benchmark_prints_a_row_for_each_batch(tmp_path, capsys):
    photos(tmp_path / "photos")
    here = f"python:{__name__}:Whole"
    Whole.calls.clear()
    flags = ["--images", str(tmp_path / "photos"), "--tags", "cat", "--detector", here, "--captioner", here]
    annotation.main(["--batches", "2", "6", *flags])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == ["2", "6"]
    assert Whole.calls == [2, 2, *[2, 2] * 2, 2, *[6, 4] * 2], "a crop and the whole of each picture"
    with pytest.raises(InputError, match="--batches: expected whole numbers of at least 1"):
        annotation.main(["--batches", "0", *flags])


class Short:
    def caption(self, image):
        return "one"

    def caption_all(self, images):
        return ["one"]


def test_a_plug_that_loses_a_picture_is_told():
    with pytest.raises(ValueError, match="caption_all: expected 2 results, got 1"):
        caption_all(Short(), [IMAGE, IMAGE])
