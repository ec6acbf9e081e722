"""Detectors and CLIP of the transformers library: tiny models with random weights in folders, nothing downloaded."""

import json
import shutil

import numpy as np
import pytest

from common import PARITY
from instdiff_jax.cli import evaluate
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import xywh_of_mask
from instdiff_jax.evaluation.detectors import detector_fingerprint, finds_masks, open_detector
from instdiff_jax.evaluation.generate import copy_real
from instdiff_jax.evaluation.hub import Clip
from instdiff_jax.evaluation.measure import Measures, inspect
from instdiff_jax.evaluation.split import ATTRIBUTES, read_split
from projects.shapes.render import write_coco
from projects.shapes.worlds import SceneSettings

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

SIDE, COUNT = 32, 3
LABELS = dict(id2label={0: "circle", 1: "star"}, label2id={"circle": 0, "star": 1})
SIZE = {"shortest_edge": 32, "longest_edge": 64}


def save(folder, model, *processors):
    for part in (model, *processors):
        part.save_pretrained(folder)
    return folder


def make_boxes(folder, seed=0, **changes):
    """An object detector with five queries."""
    torch.manual_seed(seed)
    sizes = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    sizes |= dict(image_size=[32, 32], patch_size=8, num_detection_tokens=5, initializer_range=0.5)
    model = transformers.YolosForObjectDetection(transformers.YolosConfig(**sizes | LABELS | changes))
    # Fresh ones are zeros: every query would find the same.
    torch.nn.init.normal_(model.vit.embeddings.detection_tokens)
    return save(folder, model, transformers.YolosImageProcessor(size=SIZE))


def make_masks(folder):
    """An instance segmentation model with five queries."""
    torch.manual_seed(0)
    stages = [f"stage{i}" for i in range(1, 5)]
    sizes = dict(image_size=32, patch_size=4, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=4)
    backbone = transformers.SwinConfig(out_features=stages, **sizes)
    sizes = dict(feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=16, dim_feedforward=16)
    sizes |= dict(encoder_layers=1, decoder_layers=2, num_attention_heads=2, num_queries=5)
    config = transformers.Mask2FormerConfig(backbone_config=backbone, **sizes, **LABELS)
    model = transformers.Mask2FormerForUniversalSegmentation(config)
    return save(folder, model, transformers.Mask2FormerImageProcessor(size=SIZE))


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The folder of a CLIP model, with the tokenizer of the parity data."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("clip")
    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    text = sizes | dict(vocab_size=1024, max_position_embeddings=16, bos_token_id=1022, eos_token_id=1023)
    vision = sizes | dict(image_size=SIDE, patch_size=8)
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=8)
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=SIDE)
    save(folder, transformers.CLIPModel(config), processor)
    for file in (PARITY / "tokenizer").iterdir():
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A COCO folder with the split `val`."""
    folder = tmp_path_factory.mktemp("coco")
    write_coco(folder, "val", COUNT, 55, SIDE, SceneSettings(max_instances=3, min_side=0.3))
    return folder


def pictures(height, width, count=2):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype(np.uint8)


def test_boxes_are_the_models(tmp_path):
    """Against the network's outputs: the likeliest label that is not "none", and corners in the picture's pixels."""
    detector = open_detector(f"transformers:{make_boxes(tmp_path / 'yolos')}", None)
    assert not finds_masks(detector)
    images = pictures(40, 60)
    model = transformers.YolosForObjectDetection.from_pretrained(tmp_path / "yolos").eval()
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "yolos")
    with torch.no_grad():
        outputs = model(**processor(images=list(images), return_tensors="pt"))
    found = detector.detect(images)
    assert [len(row) for row in found] == [5, 5]
    for row, logits, boxes in zip(found, outputs.logits, outputs.pred_boxes, strict=True):
        scores, labels = logits.softmax(-1)[:, :2].max(-1)
        centre, size = boxes[:, :2].numpy() * (60, 40), boxes[:, 2:].numpy() * (60, 40)
        for k, detection in enumerate(row):
            assert detection.category == LABELS["id2label"][int(labels[k])]
            assert detection.score == pytest.approx(float(scores[k]), abs=1e-5)
            assert detection.box == pytest.approx([*(centre[k] - size[k] / 2), *size[k]], abs=1e-2)
            assert detection.mask.shape == (40, 60) and not detection.mask.any()
    assert len({detection.box for row in found for detection in row}) == 10


def test_masks_have_their_boxes(tmp_path):
    detector = open_detector(f"transformers:{make_masks(tmp_path / 'masks')}", None)
    assert finds_masks(detector)
    found = detector.detect(pictures(40, 60))
    assert len(found) == 2 and all(found)
    for detection in (detection for row in found for detection in row):
        assert detection.category in ("circle", "star") and 0.01 <= detection.score <= 1
        assert detection.mask.shape == (40, 60) and detection.mask.dtype == bool and detection.mask.any()
        assert detection.box == xywh_of_mask(detection.mask)
    assert detector_fingerprint(detector) == detector_fingerprint(
        open_detector(f"transformers:{shutil.copytree(tmp_path / 'masks', tmp_path / 'moved')}", None)
    )


def test_labels_of_another_data_set_are_told(tmp_path, coco):
    names = {"id2label": {0: "dog", 1: "cat"}, "label2id": {"dog": 0, "cat": 1}}
    detector = open_detector(f"transformers:{make_boxes(tmp_path / 'yolos', **names)}", None)
    split = read_split(coco, "val")
    copy_real(split.scenes, tmp_path)
    (note,) = [note for note in inspect(split, tmp_path, Measures(detector)).notes if "categories" in note]
    assert note == "The detector knows none of the split's categories; it found cat, dog and so on."


def test_processors_without_masks_of_instances_are_refused(tmp_path):
    folder = make_masks(tmp_path / "masks")
    processor = transformers.DetrImageProcessor()
    processor.save_pretrained(folder)
    with pytest.raises(InputError, match="DetrImageProcessor.*gives no mask for each instance"):
        open_detector(f"transformers:{folder}", None)


def test_fingerprints_tell_detectors_apart(tmp_path):
    folders = [make_boxes(tmp_path / "a"), make_boxes(tmp_path / "same"), make_boxes(tmp_path / "trained", seed=1)]
    folders.append(make_boxes(tmp_path / "named", id2label={0: "star", 1: "circle"}, label2id={"star": 0, "circle": 1}))
    folders.append(make_boxes(tmp_path / "sized"))
    transformers.YolosImageProcessor(size={"shortest_edge": 48, "longest_edge": 64}).save_pretrained(folders[-1])
    first, same, *others = (detector_fingerprint(open_detector(f"transformers:{folder}", None)) for folder in folders)
    assert first == same and len({first, *others}) == 4


def test_what_cannot_be_loaded_is_one_line(tmp_path, clip):
    for name, message in (
        (tmp_path / "none", "cannot be loaded from this machine"),
        ("nobody/no-such-detector", "cannot be loaded from this machine"),
        (clip, "expected a model for object detection or segmentation, got CLIPModel"),
    ):
        with pytest.raises(InputError, match=f"^--detector: {name}: ") as error:
            open_detector(f"transformers:{name}", None)
        assert message in str(error.value) and "\n" not in str(error.value)
    broken = tmp_path / "broken"
    shutil.copytree(clip, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(InputError, match=f"^--clip: {broken}: cannot be loaded from this machine"):
        Clip.from_name(str(broken))
    with pytest.raises(InputError, match=f"^--clip: {tmp_path}: cannot be loaded from this machine") as error:
        Clip.from_name(str(tmp_path))
    assert "\n" not in str(error.value)


def run(coco, output, *flags):
    argv = ["--coco_dir", coco, "--split", "val", "--real", "--output", output, *flags]
    evaluate.run(evaluate.parse_args([str(part) for part in argv]))
    return json.loads((output / "report.json").read_text())


def test_an_evaluation_with_a_detector_of_boxes(coco, tmp_path):
    folder = make_boxes(tmp_path / "yolos")
    report = run(coco, tmp_path / "out", "--detector", f"transformers:{folder}")
    assert "The detector finds boxes only: no number is about masks." in report["notes"]
    assert "box_AP" in report["metrics"] and not any(name.startswith("mask") for name in report["metrics"])
    assert report["settings"]["detector_fingerprint"] == open_detector(f"transformers:{folder}", None).fingerprint


def test_clip_scores_are_the_models_cosines(coco, clip, tmp_path):
    """Against the library's own logits of picture and text, without their scale; crops are of whole pixels."""
    split = read_split(coco, "val")
    notes = json.loads((coco / "annotations" / "instances_val.json").read_text())["annotations"]
    keys = ("image_id", "category_id", "bbox", "segmentation")
    perfect = tmp_path / "perfect.json"
    perfect.write_text(json.dumps([{key: row[key] for key in keys} | {"score": 0.9} for row in notes]))
    report = run(coco, tmp_path / "out", "--clip", clip, "--detector", f"predictions:{perfect}")

    model = transformers.CLIPModel.from_pretrained(clip).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(clip)
    processor = transformers.CLIPImageProcessor.from_pretrained(clip)

    def cosine(image, text):
        words = tokenizer([text], truncation=True, max_length=16, return_tensors="pt")
        with torch.no_grad():
            outputs = model(**words, **processor(images=[image], return_tensors="pt"))
        return float(outputs.logits_per_image[0, 0] / model.logit_scale.detach().exp())

    found = []
    for scene, row in zip(split.scenes, report["pictures"], strict=True):
        image = scene.real_image()
        assert row["CLIP_global"] == pytest.approx(cosine(image, scene.caption), abs=1e-4)
        for target, instance in zip(scene.asked, row["instances"], strict=True):
            x0, y0, x1, y1 = target.box
            crop = image[int(y0) : int(np.ceil(y1)), int(x0) : int(np.ceil(x1))]
            assert instance["CLIP_local"] == pytest.approx(cosine(crop, target.caption), abs=1e-4)
            found.append(instance["CLIP_local"])
    assert report["metrics"]["CLIP_local"] == pytest.approx(np.mean(found)) and len(set(found)) > 1
    # The file of predictions names no attributes, so CLIP does.
    for instance in (instance for row in report["pictures"] for instance in row["instances"]):
        assert set(instance["found"]) == set(instance["attributes"]) == {"colour", "texture"}
    assert 0 <= report["metrics"]["colour_accuracy"] <= 1


def test_attributes_are_drawn_for_every_instance(coco):
    """As in the paper: a colour or texture and the category are what is asked for; places stay."""
    plain, red = read_split(coco, "val"), read_split(coco, "val", attributes="texture")
    assert plain.fingerprint != red.fingerprint
    pairs = [(a, b) for x, y in zip(plain.scenes, red.scenes, strict=True) for a, b in zip(x.targets, y.targets)]
    for old, new in pairs:
        assert new.attributes["texture"] in ATTRIBUTES["texture"] and set(new.attributes) == {"texture"}
        assert new.caption == f"{new.attributes['texture']} {old.category}" and new.box == old.box
    assert [new.caption for _, new in pairs] == [
        target.caption for scene in read_split(coco, "val", attributes="texture").scenes for target in scene.targets
    ]
    assert len({new.attributes["texture"] for _, new in pairs}) > 1
