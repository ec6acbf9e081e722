"""examples/ray_data.py on two actors of this machine."""

import importlib.util
import json
import os

import pytest

from common import PYTHONPATH, ROOT
from instdiff_jax import Layout, Pipeline


@pytest.mark.slow
def test_two_actors_sample_what_one_pipeline_does(tmp_path, tiny_checkpoint, monkeypatch, capsys):
    # On a busy machine: Ray's workers yield to everybody (nice 15), and would never come to sample.
    monkeypatch.setenv("RAY_worker_niceness", "0")
    monkeypatch.setenv("RAY_raylet_start_wait_time_s", "300")
    ray = pytest.importorskip("ray", reason='Ray is 70 MB and no requirement of the project: pip install "ray[data]"')
    import numpy as np
    from PIL import Image

    spec = importlib.util.spec_from_file_location("ray_data", ROOT / "examples" / "ray_data.py")
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    layouts = tmp_path / "layouts"
    layouts.mkdir()
    for i in range(4):
        anno = {"caption": "a circle", "bbox": [i, 1, 8, 8]}
        scene = {"caption": "a picture of shapes", "width": 16, "height": 16, "annos": [anno]}
        (layouts / f"scene{i}.json").write_text(json.dumps(scene))
    monkeypatch.setenv("PYTHONPATH", PYTHONPATH, prepend=os.pathsep)  # Ray may itself come from there
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": {"JAX_PLATFORMS": "cpu"}})
    try:
        flags = ["--checkpoint", tiny_checkpoint, "--layouts", layouts, "--output", tmp_path / "images"]
        flags = [*map(str, flags), "--actors", "2", "--batch_size", "2", "--steps", "2", "--num_images", "2"]
        assert example.main(flags) == 8
        # Nothing is made twice.
        (tmp_path / "images" / "scene2" / "1.png").unlink()
        assert example.main(flags) == 2 and example.main(flags) == 0
    finally:
        ray.shutdown()
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint)
    for i in range(4):
        for result in pipeline(Layout.from_json(layouts / f"scene{i}.json"), seeds=[0, 1], steps=2):
            image = np.asarray(Image.open(tmp_path / "images" / f"scene{i}" / f"{result.seed}.png"))
            assert np.abs(image.astype(int) - result.array).max() <= 1
