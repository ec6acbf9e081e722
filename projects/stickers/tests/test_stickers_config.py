"""The config of the model of things: four stages, one model, each stage trains what it says."""

import dataclasses

import pytest

from common import ROOT
from configs import stickers
from instdiff_jax.checkpoint.folder import read_config
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import make_mesh
from instdiff_jax.training.inputs import check_data
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.start import start_params
from instdiff_jax.training.state import make_sharding_plan


def stage(name):
    return read_settings([f"--config=configs/stickers.py:{name}"], RunSettings)[0]


def _parts(run):
    return run.model, run.train, run.parallel, make_mesh(run.parallel)


@pytest.mark.parametrize(
    "name, start, networks",
    [
        ("autoencoder", "", {"autoencoder"}),
        ("text", "runs/stickers_1", {"text_encoder"}),
        ("decoder", "runs/stickers_2", {"autoencoder"}),
        ("adapters", "runs/stickers_3", {"unet", "unifusion"}),
    ],
)
def test_each_stage_trains_its_networks_from_the_one_before(name, start, networks):
    run = stage(name)
    check_data(run)
    plan = make_sharding_plan(*_parts(run))
    assert set(plan.trainable) == networks and run.train.start == start
    assert f"configs/stickers.py:{name}" in stickers.__doc__ and f"--output {start}" in stickers.__doc__
    assert run.model == stage("adapters").model
    # 16x16 latents, as many as the UNet of the shapes has.
    assert 128 // 2 ** (len(run.model.autoencoder.ch_mult) - 1) == 16


def test_the_decoders_stage_leaves_the_latents():
    trained = make_sharding_plan(*_parts(stage("decoder"))).trainable["autoencoder"]
    assert set(trained) == {"decoder", "post_quant_conv"}


def test_training_goes_on_from_the_checkpoint():
    """As checkpoints/README.md says."""
    start = str(ROOT / "checkpoints" / "stickers")
    run = stage("adapters")
    settings = dataclasses.replace(run.train, start=start, switch_prediction=True)
    plan = make_sharding_plan(run.model, settings, run.parallel, make_mesh(run.parallel))
    trainable, frozen = start_params(plan, run.model, settings)
    _, _, absent = read_config(start)
    assert not absent and set(frozen) == {"autoencoder", "text_encoder"}
    assert trainable["unet"]["position_in"]["kernel"].any()


def test_an_unknown_stage_is_one_line():
    with pytest.raises(
        InputError, match="configs/stickers.py:fusers: expected one of autoencoder, text, decoder, adapters"
    ):
        stage("fusers")
