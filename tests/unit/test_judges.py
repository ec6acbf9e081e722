"""Judges of the transformers library, on tiny models with random weights."""

import numpy as np
import pytest
from PIL import Image
from tiny_hub import BLIP_WORDS, save_blip, save_grounding_dino, save_sam

from instdiff_jax.cli import annotate
from instdiff_jax.coco import Coco
from instdiff_jax.data.vision import BoxSegmenter, Captioner, Grounder
from instdiff_jax.data.vision_hub import HubCaptioner, HubGrounder, HubSegmenter, open_model
from instdiff_jax.evaluation.benchmarks.run import open_judges
from instdiff_jax.geometry.masks import decode_mask

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def test_a_grounder_gives_boxes_on_the_image_best_first(tmp_path, monkeypatch):
    save_grounding_dino(tmp_path)
    monkeypatch.setattr("instdiff_jax.data.vision_hub.BOX_THRESHOLD", 0.0)
    judges = open_judges(("grounder",), {"grounder": f"transformers:{tmp_path}"})
    assert isinstance(judges.grounder, Grounder) and isinstance(judges.grounder, HubGrounder)
    found = judges.grounder.ground(IMAGE, "Cat")
    assert len(found.boxes) == 20 and (np.diff(found.scores) <= 0).all()
    assert np.abs(found.boxes).max() <= 2 * 64  # pixels of this image, not of the network's
    again = judges.grounder.ground(IMAGE, "cat.")
    np.testing.assert_array_equal(again.boxes, found.boxes)


def test_a_segmenter_gives_the_mask_that_it_rates_highest(tmp_path):
    save_sam(tmp_path)
    judges = open_judges(("segmenter",), {"segmenter": f"transformers:{tmp_path}"})
    assert isinstance(judges.segmenter, BoxSegmenter) and isinstance(judges.segmenter, HubSegmenter)
    mask = judges.segmenter.segment(IMAGE, (8, 8, 40, 40))
    assert mask.shape == (48, 64) and mask.dtype == bool
    inner = judges.segmenter
    inputs = inner._processor(images=IMAGE, input_boxes=[[[8.0, 8.0, 40.0, 40.0]]], return_tensors="pt")
    with torch.no_grad():
        scores = inner._model(**inputs).iou_scores
    assert scores.shape[-1] == 3


def test_a_captioner_takes_the_likeliest_word_at_each_step(tmp_path):
    save_blip(tmp_path)
    captioner = open_model("--captioner", f"transformers:{tmp_path}")
    assert isinstance(captioner, Captioner) and isinstance(captioner, HubCaptioner)
    said = captioner.caption(IMAGE)
    assert said == captioner.caption(IMAGE) and 0 < len(said.split()) <= 40
    assert not {"[CLS]", "[SEP]", "[PAD]"} & set(said.split())


def test_annotate_with_models_of_the_library(tmp_path, monkeypatch, capsys):
    """Grounding DINO, SAM and BLIP through the command: in shards, killed in the middle, and once more as a whole."""
    for name, save in (("dino", save_grounding_dino), ("sam", save_sam), ("blip", save_blip)):
        (tmp_path / name).mkdir()
        save(tmp_path / name)
    (tmp_path / "photos").mkdir()
    for i in range(3):
        Image.fromarray(np.roll(IMAGE, 5 * i, 1)).save(tmp_path / "photos" / f"{i}.png")
    monkeypatch.setattr("instdiff_jax.data.vision_hub.BOX_THRESHOLD", 0.0)
    models = {"detector": "dino", "segmenter": "sam", "captioner": "blip"}
    flags = [part for flag, name in models.items() for part in (f"--{flag}", f"transformers:{tmp_path / name}")]
    flags += ["--images", str(tmp_path / "photos"), "--tags", "cat,dog", "--min_score", "0", "--min_area", "0.01"]

    def run(output, *more):
        annotate.main([*flags, "--output", str(tmp_path / output), *more])
        return capsys.readouterr().out

    assert "2 pictures annotated" in run("parts", "--shard", "0/2")
    caption, calls = HubCaptioner.caption, []

    def stop(self, image):
        calls.append(image.shape)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return caption(self, image)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HubCaptioner, "caption", stop)
        run("parts")
    assert not (tmp_path / "parts/coco").exists() and len(list((tmp_path / "parts/records").iterdir())) == 2
    assert "1 pictures annotated, 2 were before" in run("parts")
    assert "3 pictures annotated" in run("whole")
    for name in ("instances_train.json", "captions_train.json"):
        parts = [(tmp_path / output / "coco/annotations" / name).read_bytes() for output in ("parts", "whole")]
        assert parts[0] == parts[1]
    coco = Coco(tmp_path / "whole/coco/annotations/instances_train.json", tmp_path / "whole/coco/annotations" / name)
    rows = [row for image_id in coco.image_ids for row in coco.annotations(image_id)]
    assert rows and {row.category for row in rows} <= {"cat", "dog"} and len(coco.captions) == 3
    for row in rows:
        assert decode_mask(row.values["segmentation"], 48, 64, "").any() if "segmentation" in row.values else True
        assert row.own_caption and set(row.own_caption.split()) <= {*BLIP_WORDS, "[DEC]"}
