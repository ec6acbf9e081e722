"""From a COCO folder to pictures by the commands alone: build, train, go on, export, to PyTorch and back, sample."""

import json

import numpy as np
import pytest
from coco_fixture import make_coco
from PIL import Image
from training_common import save_start

from common import SUPPORT
from instdiff_jax.checkpoint.folder import restore_params
from instdiff_jax.cli import build_coco as coco
from instdiff_jax.cli import convert, export, sample, train
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.tree import flatten

CONFIG = f"--config={SUPPORT / 'tiny_config.py'}"
LAYOUT = {
    "caption": "a picture of shapes",
    "width": 16,
    "height": 16,
    "annos": [
        {"caption": "a circle", "bbox": [1, 1, 8, 8]},
        {"caption": "a square", "mask": [[8, 8, 15, 8, 15, 15, 8, 15]]},
    ],
}


def draw(checkpoint, layout, output) -> np.ndarray:
    """The picture of a layout."""
    flags = ["--checkpoint", checkpoint, "--layout", layout, "--output", output, "--steps", 2, "--mis", 0.5]
    sample.run(sample.parse_args(list(map(str, flags))))
    return np.asarray(Image.open(output / layout.stem / "0.png"))


@pytest.mark.slow
def test_a_coco_folder_becomes_a_model_that_draws(tmp_path, capsys):
    # JPEG files, polygons, run lengths and a crowd; a file that ends early, one that is missing, broken annotations.
    data, run = tmp_path / "data", tmp_path / "run"
    coco.main(["--coco_dir", str(make_coco(tmp_path / "coco")), "--data_dir", str(data), "--workers", "1"])
    skipped = {entry["name"] for entry in json.loads((data / "report.json").read_text())["skipped"]}
    assert {"short.jpg", "gone.jpg"} <= skipped
    dataset = InstanceDataset(data, "train")
    instances = [instance for i in range(len(dataset)) for instance in dataset[i].instances]
    assert len(dataset) == 12 and any(one.crowd for one in instances) and sum(bool(one.mask) for one in instances) > 12

    save_start(tmp_path / "start", absent=("fusers", "scaleu", "unifusion", "trunk"))
    flags = [CONFIG, f"--workdir={run}", f"--config.data.dir={data}", f"--config.train.start={tmp_path / 'start'}"]
    flags += [
        "--config.train.trainable=all",
        "--config.train.save_every=1000",
        "--config.train.optimizer.warmup_steps=5",
    ]
    for steps in (60, 120):
        train.main([*flags, f"--config.train.steps={steps}"])
    assert f"{run}: from step 60 to 120" in capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 121))
    losses = [line["loss"] for line in lines]
    first, last = np.mean(losses[:5]), np.mean(losses[-20:])
    print(f"loss {first:.3f} at the start, {last:.3f} at the end")
    assert last < 0.6 * first

    export.main([f"--workdir={run}", f"--output={tmp_path / 'model'}"])
    convert.main(["--input", str(tmp_path / "model"), "--to_pytorch", str(tmp_path / "model.pth")])
    convert.main([CONFIG, "--input", str(tmp_path / "model.pth"), "--output", str(tmp_path / "back")])
    ours, back = (flatten(restore_params(tmp_path / name, as_numpy=True)) for name in ("model", "back"))
    assert ours.keys() == back.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, back[path], err_msg="/".join(path))

    export.main([f"--workdir={run}", f"--to_diffusers={tmp_path / 'diffusers'}"])
    convert.main([CONFIG, "--input", str(tmp_path / "diffusers"), "--output", str(tmp_path / "again")])
    again = flatten(restore_params(tmp_path / "again", as_numpy=True))
    assert again.keys() == ours.keys()
    for path, leaf in ours.items():
        np.testing.assert_array_equal(leaf, again[path], err_msg="/".join(path))

    layout = tmp_path / "scene.json"
    layout.write_text(json.dumps(LAYOUT))
    picture = draw(tmp_path / "back", layout, tmp_path / "from_folder")
    assert picture.shape == (16, 16, 3) and picture.std() > 0
    # A run's folder is a checkpoint too.
    np.testing.assert_array_equal(draw(run, layout, tmp_path / "from_run"), picture)
