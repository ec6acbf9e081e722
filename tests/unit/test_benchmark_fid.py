"""FID inside `instdiff benchmark`: a known answer, what is refused, and what Inception is given."""

import json
import pickle
import sys
import types

import numpy as np
import pytest
from PIL import Image

from instdiff_jax.cli import benchmark as command
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detectors import open_features
from instdiff_jax.files import read_json

SIDE = 32
asked = []


def brightness(images):
    """One feature: the mean of a picture."""
    asked.append(images.shape)
    return images.reshape(len(images), -1).mean(1, keepdims=True)


def infinite(images):
    return np.full((len(images), 1), np.nan)


def write_gray(path, value, size=(SIDE, SIDE)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value,) * 3).save(path)


def prepare(folder):
    """Three drawn pictures, two real ones of other sizes, and predictions of nothing."""
    images = [{"id": k, "width": SIDE, "height": SIDE, "file_name": f"{k}.png"} for k in (1, 2, 3)]
    row = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [0, 0, 8, 8], "area": 64, "iscrowd": 0}
    data = {"images": images, "annotations": [row], "categories": [{"id": 1, "name": "dog"}]}
    (folder / "instances_val.json").write_text(json.dumps(data))
    (folder / "predictions.json").write_text("[]")
    for k in (1, 2, 3):
        write_gray(folder / "out" / "images" / f"{k}.png", 10 * k)
    write_gray(folder / "real" / "a.png", 100, (48, 20))
    write_gray(folder / "real" / "more" / "b.png", 140)
    flags = ["coco-box", "--data", folder / "instances_val.json", "--output", folder / "out", "--size", SIDE]
    return [str(flag) for flag in [*flags, "--detector", f"predictions:{folder / 'predictions.json'}"]]


def test_the_distance_is_in_the_table_beside_the_papers(tmp_path, capsys):
    flags = [*prepare(tmp_path), "--real", str(tmp_path / "real"), "--features", f"python:{__name__}:brightness"]
    asked.clear()
    command.main(flags)
    told = capsys.readouterr().out
    # Means 20 and 120, standard deviations 10 and √800.
    expected = 100**2 + (10 - 800**0.5) ** 2
    assert read_json(tmp_path / "out" / "results.json")["numbers"]["FID"] == pytest.approx(expected, rel=1e-12)
    assert f"| this run | 0.0 | 0.0 | 0.0 | {expected:.1f} |" in told
    assert "| InstanceDiffusion (printed, 1) | 38.8 | 55.4 | 52.9 | 23.9 |" in told
    assert "| GLIGEN (printed, 2) | 24.1 | 42.6 | 35.9 |  |" in told, "its FID is not known"
    assert "FID (lower is better): 3 drawn and 2 real pictures" in told
    assert asked == [(3, SIDE, SIDE, 3), (2, SIDE, SIDE, 3)]
    command.main(flags)
    assert len(asked) == 2 and f"{expected:.1f}" in capsys.readouterr().out, "measured once"
    write_gray(tmp_path / "real" / "c.png", 0)
    command.main(flags)
    assert len(asked) == 4 and "3 drawn and 3 real pictures" in capsys.readouterr().out
    write_gray(tmp_path / "real" / "c.png", 9)
    command.main(flags)
    assert len(asked) == 6, "as many pictures, another one"


def test_what_is_missing_is_one_line_before_anything_is_judged(tmp_path):
    flags = prepare(tmp_path)
    plug = f"python:{__name__}:brightness"
    for more, message in (
        (["--features", plug], "--real: expected a folder of real pictures"),
        (
            ["--real", tmp_path / "real"],
            "--features: expected inception:FILE or python:MODULE:FUNCTION, .* got nothing",
        ),
        (["--real", tmp_path / "real", "--features", "npz:x"], "--features: expected inception:FILE or"),
        (["--real", tmp_path / "none", "--features", plug], "none: expected two or more real pictures, found 0"),
        (["--real", tmp_path / "real" / "more", "--features", plug], "expected two or more real pictures, found 1"),
        (["--real", tmp_path / "real", "--features", "python:no_such:plug"], "--features: .*cannot be imported"),
    ):
        with pytest.raises(InputError, match=message):
            command.main([*flags, *map(str, more)])
    assert not (tmp_path / "out" / "judged").exists()
    with pytest.raises(InputError, match="features of the real pictures: expected finite numbers"):
        command.main([*flags, "--real", str(tmp_path / "real"), "--features", f"python:{__name__}:infinite"])
    (tmp_path / "real" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="broken.png: cannot be read as an image"):
        command.main([*flags, "--real", str(tmp_path / "real"), "--features", plug])
    assert not (tmp_path / "out" / "fid.json").exists()


def test_inception_is_given_bytes_and_a_file_that_executes_nothing(tmp_path, monkeypatch):
    torch = pytest.importorskip("torch")
    given = []

    class Network:
        def __init__(self, name, features, feature_extractor_weights_path):
            given.append((features, feature_extractor_weights_path))

        def __call__(self, images):
            assert images.dtype == torch.uint8 and images.shape[1] == 3
            return (images.float().mean((2, 3)),)

    fake = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    fake.FeatureExtractorInceptionV3 = Network
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    torch.save({"weight": torch.zeros(1)}, tmp_path / "weights.pth")
    features = open_features(f"inception:{tmp_path / 'weights.pth'}", None)
    images = np.random.default_rng(0).integers(0, 256, (2, 5, 4, 3)).astype(np.uint8)
    assert features(images) == pytest.approx(images.mean((1, 2)), abs=1e-4)
    assert given == [(["2048"], str(tmp_path / "weights.pth"))]

    class Evil:
        def __reduce__(self):
            return open, (str(tmp_path / "written"), "w")

    (tmp_path / "evil.pth").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pth", "missing.pth"):
        with pytest.raises(InputError, match=f"--features: .*{name}: cannot be loaded") as error:
            open_features(f"inception:{tmp_path / name}", None)
        assert "\n" not in str(error.value)
    assert not (tmp_path / "written").exists() and len(given) == 1
    monkeypatch.setitem(sys.modules, fake.__name__, None)
    with pytest.raises(InputError, match="--features: expected torch-fidelity to be installed"):
        open_features("inception:weights.pth", None)
