"""Typed settings and the command line's --config."""

import importlib
import re

import pytest

from configs import shapes
from instdiff_jax.cli.config_flags import read_config, read_settings
from instdiff_jax.config import NEGATIVE_PROMPT, CheckpointSettings, ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.training.settings import TRAINABLE, OptimizerSettings, RunSettings
from instdiff_jax.tree import flatten


def test_overrides_and_the_rest():
    config, rest = read_config(["--output", "x", "--config.model.unet.num_heads=4", "--seed=1"], CheckpointSettings)
    assert config.model.unet.num_heads == 4
    assert rest == ["--output", "x", "--seed=1"]


def test_config_as_two_arguments():
    config, rest = read_config(
        ["--config", "configs/sd15.py", "--config.sampling.steps", "7", "more"], CheckpointSettings
    )
    assert config.sampling.steps == 7
    assert rest == ["more"]


@pytest.mark.parametrize(
    "argv",
    [
        ["--config.model.nothing=1"],
        ["--config.sampling.stepz=1"],
        ["--config.sampling.steps=many"],
        ["--config=no/such/file.py"],
        ["--config=configs/shapes.py:nothing"],
    ],
)
def test_what_cannot_be_read_is_one_line(argv):
    with pytest.raises(InputError) as error:
        read_config(argv, CheckpointSettings)
    assert "config" in str(error.value)
    assert len(str(error.value).splitlines()) == 1 and "Traceback" not in str(error.value)


def test_defaults_are_the_released_models_and_no_file_is_executed(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    for name in ("sd15", "coco"):
        (tmp_path / "configs" / f"{name}.py").write_text("raise SystemExit('executed')\n")
    monkeypatch.chdir(tmp_path)
    run, _ = read_settings([], RunSettings)
    assert run.model == ModelConfig() and run.model.unet.channel_mult == (1, 2, 4, 4)
    assert run.sampling == SamplingConfig(negative_prompt=NEGATIVE_PROMPT)
    assert run.train.trainable == TRAINABLE["paper"] and run.parallel.fsdp == 1


CONFIGS = ["sd15", "coco", "coco_one_gpu", *(f"shapes:{stage}" for stage in shapes.STAGES)]


def read_file(name: str, *flags: str) -> RunSettings:
    file, _, stage = name.partition(":")
    return read_settings([f"--config=configs/{file}.py" + f":{stage}" * bool(stage), *flags], RunSettings)[0]


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_state_only_what_differs_from_the_defaults(name):
    file, _, stage = name.partition(":")
    module = importlib.import_module(f"configs.{file}")
    stated = flatten(module.get_config(*[stage] * bool(stage)).to_dict())
    defaults = flatten(RunSettings().to_config())
    assert not [path for path, value in stated.items() if defaults[path] == value]
    assert len(stated) > 0 and f"configs/{file}.py" in module.__doc__


def test_what_the_paper_configs_say():
    pod, gpu = read_file("coco"), read_file("coco_one_gpu")
    assert pod.sampling == gpu.sampling == read_file("sd15").sampling
    assert pod.model == gpu.model == ModelConfig()
    assert (pod.train.steps, pod.train.batch_size, pod.train.start) == (100_000, 512, "checkpoints/sd15_base")
    assert pod.train.optimizer == gpu.train.optimizer == OptimizerSettings(learning_rate=5e-5, warmup_steps=5000)
    assert pod.data.examples == gpu.data.examples and pod.data.examples.image_size == 512
    assert (pod.parallel.data, pod.parallel.fsdp, gpu.parallel.data, gpu.parallel.fsdp) == (-1, 16, 1, 1)
    assert (pod.train.accumulate, gpu.train.accumulate, gpu.data.cache_latents) == (1, 64, True)


def test_the_canvas_is_the_maps_but_where_the_latents_side_is_given():
    assert ModelConfig().canvas_side == 512
    values = ModelConfig().to_dict()
    values["unet"]["sample_size"] = 96
    assert ModelConfig.from_dict(values).canvas_side == 96 * 8
    values["unet"]["sample_size"] = -1
    with pytest.raises(InputError, match="unet.sample_size: expected at least 0, got -1"):
        ModelConfig.from_dict(values)


def test_short_forms_in_flags():
    run = read_file("coco", "--config.sampling.alpha=0.8", "--config.train.trainable=all")
    assert run.sampling.alpha == pytest.approx((0.8, 0.0, 0.2))
    assert run.train.trainable == TRAINABLE["all"]


def test_a_key_that_nothing_reads():
    config, _ = read_config([], CheckpointSettings)
    model = config.model.to_dict()
    model["unet"]["num_head"] = 8
    with pytest.raises(InputError, match=r"config\.unet\.num_head: nothing reads this key"):
        ModelConfig.from_dict(model)
    del model["unet"]["num_head"], model["unet"]["context_dim"]
    with pytest.raises(InputError, match=r"config\.unet\.context_dim: missing"):
        ModelConfig.from_dict(model)


@pytest.mark.parametrize(
    ("group", "name", "value", "words"),
    [
        ("unet", "num_heads", 3, "num_heads: expected a divisor of its 320 channels, got 3"),
        ("unet", "num_heads", 0, "num_heads: expected at least 1"),
        ("unet", "channel_mult", (), "channel_mult: expected at least one number"),
        ("text_encoder", "num_heads", 5, "num_heads: expected a divisor of its 768 channels"),
        ("unifusion", "trunk_depths", (3, 3), "trunk_depths: expected as many numbers as in trunk_dims"),
        ("schedule", "timesteps", 1, "timesteps: expected at least 2"),
        ("unet", "num_res_blocks", 10**6, "num_res_blocks: expected at most 16"),
        ("unet", "channel_mult", (1,) * 30, "channel_mult: expected at most 8 numbers"),
        ("text_encoder", "num_layers", 10**6, "num_layers: expected at most 100"),
        ("unifusion", "map_size", 2**31, "map_size: expected at most 1048576"),
        ("schedule", "timesteps", 2**31, "timesteps: expected at most 1048576"),
        ("autoencoder", "scale_factor", 0.0, "scale_factor: expected a number above 0"),
    ],
)
def test_sizes_that_no_network_has(group, name, value, words):
    model = read_config([], CheckpointSettings)[0].model.to_dict()
    model[group][name] = value
    with pytest.raises(InputError, match=f"{group}.{words}"):
        ModelConfig.from_dict(model)


def test_alpha_as_one_number():
    assert SamplingConfig.from_dict({"alpha": 0.8}).alpha == pytest.approx((0.8, 0.0, 0.2))


@pytest.mark.parametrize(
    "values",
    [
        {"steps": 0}, {"steps": 1001}, {"steps": True}, {"steps": 5.0}, {"mis": 1.1}, {"mis": "x"}, {"alpha": 2},
        {"alpha": (0.5, 0.5)}, {"alpha": float("nan")}, {"guidance_scale": -1}, {"guidance_scale": float("nan")},
        {"sampler": "eulr"}, {"merge": "max"}, {"masked_attention": "yes"}, {"negative_prompt": None}, {"step": 3},
        {"guidance_interval": 0.5}, {"guidance_interval": (0.5,)}, {"guidance_interval": (0.6, 0.5)},
        {"sigmas": "karas"}, {"mis_guidance": 1}, {"reuse": 0}, {"reuse": 2.0},
        {"guidance_interval": (-0.1, 0.5)}, {"guidance_interval": (0, 1.1)}, {"guidance_interval": (0, float("nan"))},
    ],
)  # fmt: skip
def test_settings_out_of_range(values):
    with pytest.raises(InputError, match="config.sampling"):
        SamplingConfig.from_dict(values)


@pytest.mark.parametrize(
    "flag, line",
    [
        ("--config.sampling.stepz=3", "--config.sampling.stepz: the config has no key stepz; did you mean steps?"),
        ("--config.sampler.steps=3", "--config.sampler.steps: the config has no key sampler"),
        ("--config.model.unet.rate=3", "--config.model.unet.rate: the config has no key rate"),
        ("--config.sampling.steps=few", "--config: flag --config.sampling.steps=few: invalid literal for int"),
    ],
)
def test_a_flag_that_the_config_has_not(flag, line):
    with pytest.raises(InputError, match=f"^{re.escape(line)}") as error:
        read_config([flag], CheckpointSettings)
    assert "\n" not in str(error.value)
