"""What `instdiff evaluate` reads: references, predictions, an upper bound, features and a folder's settings."""

import functools
import io
import json
import shutil
from pathlib import Path

import numpy as np

from tests.fuzz.annotations import SIZES, coco_values, write_coco
from tests.fuzz.cases import Kind, command
from tests.fuzz.mutate import any_file, json_file

SIZE = 32


def _predictions() -> list[dict]:
    rows = []
    for image_id in SIZES:
        for category, score in ((1, 0.9), (2, 0.5), (18, 1)):
            box = [5, 4, 10, 14]
            row = {"image_id": image_id, "category_id": category, "score": score, "bbox": box}
            ring = [5, 4, 15, 4, 15, 18, 5, 18]
            rows.append(
                row | {"segmentation": [ring] if category < 18 else {"size": [SIZE, SIZE], "counts": [1000, 24]}}
            )
    return rows


def _features() -> bytes:
    rng, buffer = np.random.default_rng(0), io.BytesIO()
    np.savez(buffer, generated=rng.standard_normal((6, 4)), real=rng.standard_normal((7, 4)))
    return buffer.getvalue()


class Inputs:
    """A COCO folder, predictions, features and the report of an upper bound."""

    def __init__(self, folder: Path):
        write_coco(None, folder, "")
        (folder / "predictions.json").write_bytes(json_file(None, _predictions()))
        (folder / "features.npz").write_bytes(_features())
        self.source = folder
        evaluate(folder, folder / "bound")
        shutil.copyfile(folder / "bound" / "report.json", folder / "upper.json")

    def write(self, rng, folder: Path, what: str) -> None:
        for name in ("coco", "predictions.json", "features.npz", "upper.json"):
            source = self.source / name
            (shutil.copytree if source.is_dir() else shutil.copyfile)(source, folder / name)
        if what == "settings.json":
            shutil.copytree(self.source / "bound", folder / "out")
        path = {
            "references": folder / "coco" / "annotations" / "instances_train.json",
            "captions": folder / "coco" / "annotations" / "captions_train.json",
            "settings.json": folder / "out" / "settings.json",
            "image": folder / "coco" / "train" / "5.png",
        }.get(what, folder / what)
        is_json = path.suffix == ".json"
        data = path.read_bytes()
        if what == "features.npz" and rng is not None and rng.random() < 0.5:
            data = _odd_features(rng)
        path.write_bytes(json_file(rng, json.loads(data)) if is_json else any_file(rng, data))


def _odd_features(rng) -> bytes:
    odd = [
        np.zeros((6, 4)),
        np.full((6, 4), np.nan),
        np.full((6, 4), 1e200),
        np.zeros((1, 4)),
        np.zeros((0, 4)),
        np.zeros((6, 0)),
        np.zeros(6),
        np.zeros((2, 3, 4)),
        np.zeros((6, 4), complex),
        np.zeros((6, 4), bool),
        np.array([["x"] * 4] * 6),
        np.array([[None] * 4] * 6, object),
        np.zeros((6, 4), "datetime64[s]"),
    ]
    buffer = io.BytesIO()
    good = np.random.default_rng(0).standard_normal((6, 4))
    np.savez(buffer, **{rng.choice(["generated", "x"]): rng.choice([good, *odd]), "real": rng.choice([good, *odd])})
    return buffer.getvalue()


def evaluate(folder: Path, output: Path, *flags: object) -> dict:
    """`instdiff evaluate --real`; returns its report, whose numbers are checked."""
    common = ("--coco_dir", folder / "coco", "--split", "train", "--real", "--size", SIZE, "--output", output)
    detector = f"predictions:{folder / 'predictions.json'}"
    features = f"npz:{folder / 'features.npz'}"
    command(
        *("evaluate", *common, "--detector", detector, "--features", features, *flags),
        output=output,
        writes_early=True,  # the images
    )
    report = json.loads((output / "report.json").read_text(), parse_constant=_no_constant)
    assert report["metrics"]["images"] == len(report["pictures"]) > 0
    ids = [row["image_id"] for row in report["pictures"]]
    assert len(set(ids)) == len(ids)
    for name, value in report["metrics"].items():
        assert np.isfinite(value) and value >= 0, name
        assert name in ("images", "instances", "FID") or value <= 1, name
    for row in report["pictures"]:
        for instance in row["instances"]:
            assert instance["category"] and np.isfinite(instance["box"]).all()
    return report


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def _evaluate(folder: Path, *flags: str) -> None:
    flags = tuple(folder / flag if flag.endswith(".json") else flag for flag in flags)
    report = evaluate(folder, folder / "out", *flags)
    assert len(coco_values()["images"]) >= report["metrics"]["images"]


def kinds(folder: Path) -> list[Kind]:
    inputs = Inputs(folder)

    def kind(what: str, weight: int, *flags: str) -> Kind:
        write = functools.partial(_write, inputs, what)
        return Kind(f"evaluate, {what}", write, lambda place: _evaluate(place, *flags), weight)

    return [
        kind("predictions.json", 6),
        kind("references", 5),
        kind("captions", 1),
        kind("upper.json", 3, "--upper_bound", "upper.json"),
        kind("features.npz", 2),
        kind("settings.json", 1),
        kind("image", 1),
    ]


def _write(inputs: Inputs, what: str, rng, folder: Path) -> None:
    inputs.write(rng, folder, what)
