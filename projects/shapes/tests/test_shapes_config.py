"""The small model's config: four stages, one model, each stage trains what it says."""

import subprocess
import sys

import pytest

from configs import shapes
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import make_mesh
from instdiff_jax.training.inputs import check_data
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.state import make_sharding_plan
from instdiff_jax.tree import flatten


def read_run(argv):
    return read_settings(argv, RunSettings)[0]


def stage(name):
    return read_run([f"--config=configs/shapes.py:{name}"])


def trained(name):
    run = stage(name)
    check_data(run)
    plan = make_sharding_plan(run.model, run.train, run.parallel, make_mesh(run.parallel))
    return set(plan.trainable), plan


def test_each_stage_trains_its_networks():
    assert trained("autoencoder")[0] == {"autoencoder"}
    assert trained("text")[0] == {"text_encoder"}
    assert trained("base")[0] == {"unet"}
    networks, plan = trained("adapters")
    assert networks == {"unet", "unifusion"}
    assert set(plan.frozen) == {"autoencoder", "text_encoder"}
    assert "fuser" in plan.trainable["unet"]["mid_attn"]
    paper = ["--config=configs/shapes.py:adapters", "--config.train.trainable=paper"]
    run = read_run(paper)
    plan = make_sharding_plan(run.model, run.train, run.parallel, make_mesh(run.parallel))
    names = ["/".join(path) for path in flatten(plan.trainable["unet"])]
    assert names and all("fuser" in name or "scaleu" in name for name in names)


def test_all_stages_have_one_model_and_the_last_is_the_default():
    models = [stage(name).model for name in shapes.STAGES]
    assert all(model == models[0] for model in models) and len(models) == 4
    assert shapes.get_config().to_dict() == shapes.get_config("adapters").to_dict()


def test_each_stage_starts_where_the_docstring_exports_the_one_before():
    starts = {"autoencoder": "", "text": "runs/shapes_1", "base": "runs/shapes_2", "adapters": "runs/shapes_3"}
    for name, folder in starts.items():
        assert stage(name).train.start == folder
        assert f"configs/shapes.py:{name}" in shapes.__doc__
        assert f"--output {folder}" in shapes.__doc__


def test_an_unknown_stage_is_one_line():
    with pytest.raises(InputError, match="configs/shapes.py:fusers: expected one of autoencoder, text, base, adapters"):
        stage("fusers")
    command = [sys.executable, "train.py", "--config=configs/shapes.py:fusers", "--workdir=none"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
