"""Sampling against the official code's latents and pictures: the sampler, the pipeline and the command."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from parity_checks import CHECKS, SAMPLER, params_of
from pictures import official_pixels, sampling_settings, small_checkpoint

from common import channels_last, parity, relative_error

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.mark.parametrize("check", params_of("sampler_small_box"))
def test_latents_equal_the_official_samplers(check):
    assert check.measure() <= check.tolerance


def groups(*files):
    """The checks of one file and cost together: they share pictures, which another process would draw again."""
    for file, cost in itertools.product(files, ("fast", "slow")):
        checks = [check for check in CHECKS if (check.file, check.cost) == (file, cost)]
        if checks:
            yield pytest.param(checks, marks=() if cost == "fast" else pytest.mark.slow, id=f"{file}-{cost}")


@pytest.mark.parametrize("checks", groups("end_to_end_small_box", "end_to_end_small_mask"))
def test_pipeline_equals_the_official_one(checks):
    far = {check.entry: check.measure() for check in checks}
    assert all(far[check.entry] <= check.tolerance for check in checks), far


@pytest.mark.slow
def test_command_equals_the_official_one(tmp_path):
    """`sample.py --noise --save_latents`, as a user runs it; slow, for it compiles everything again."""
    from PIL import Image

    data = parity("end_to_end_small_mask")
    (tmp_path / "scene.json").write_text(str(data["layout"]))
    np.save(tmp_path / "noise.npy", channels_last(data["noise"]))
    flags = dict(sampling_settings(data), format="mask", num_images=2, output=tmp_path / "out")
    flags |= dict(checkpoint=small_checkpoint(), layout=tmp_path / "scene.json", noise=tmp_path / "noise.npy")
    command = [sys.executable, ROOT / "sample.py", "--save_latents"]
    command += [part for name, value in flags.items() for part in (f"--{name}", value)]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "XDG_CACHE_HOME": str(tmp_path / "cache")}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    latents = np.load(tmp_path / "out" / "scene" / "latents.npy")
    assert latents.dtype == np.float32 and relative_error(latents, channels_last(data["latents"])) <= SAMPLER
    images = np.stack([np.asarray(Image.open(tmp_path / "out" / "scene" / f"{seed}.png")) for seed in (0, 1)])
    assert np.abs(images.astype(int) - official_pixels(data)).max() <= 1
