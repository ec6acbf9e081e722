"""Judges of the transformers library, on tiny models with random weights."""

import numpy as np
import pytest

from instdiff_jax.data.vision import BoxSegmenter, Grounder
from instdiff_jax.data.vision_hub import HubGrounder, HubSegmenter
from instdiff_jax.evaluation.benchmarks.run import open_judges

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

IMAGE = np.random.default_rng(0).integers(0, 256, (48, 64, 3), np.uint8)


def save_grounding_dino(folder):
    backbone = transformers.SwinConfig(
        image_size=32, embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], window_size=2,
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "dog", "?"]
    (folder / "vocab.txt").write_text("\n".join(words))
    text = transformers.BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = transformers.GroundingDinoConfig(
        backbone_config=backbone, text_config=text, d_model=32, encoder_layers=1, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=20,
        max_text_len=16,
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.GroundingDinoForObjectDetection(config).save_pretrained(folder)
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    images = transformers.GroundingDinoImageProcessor(size={"shortest_edge": 96, "longest_edge": 128})
    transformers.GroundingDinoProcessor(images, tokenizer).save_pretrained(folder)


def save_sam(folder):
    config = transformers.SamConfig(
        vision_config=dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=16,
                           num_pos_feats=8, output_channels=16, global_attn_indexes=[0], window_size=2, mlp_dim=16),
        prompt_encoder_config=dict(hidden_size=16, image_size=64, patch_size=16, image_embedding_size=4),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=16, num_hidden_layers=1, num_attention_heads=2,
                                 iou_head_hidden_dim=16),
    )  # fmt: skip
    torch.manual_seed(0)
    transformers.SamModel(config).save_pretrained(folder)
    images = transformers.SamImageProcessor(size={"longest_edge": 64}, pad_size={"height": 64, "width": 64})
    transformers.SamProcessor(images).save_pretrained(folder)


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
