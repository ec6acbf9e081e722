"""train.py's command line and export: what goes wrong is one line, and a short run's model comes out whole."""

import json
import os
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from training_common import save_dataset, save_start, tiny_batch, tiny_model

from common import PARITY, SUPPORT
from instdiff_jax.checkpoint.folder import read_config, restore_params
from instdiff_jax.cli import export as export_command
from instdiff_jax.cli import train
from instdiff_jax.cli.config_flags import read_config as read_flags
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.errors import InputError
from instdiff_jax.models.kernels import cpu
from instdiff_jax.training import export, loop, metrics
from instdiff_jax.training.metrics import Clock, MetricsWriter, ProfilerWindow, peak_flops
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.tree import flatten

CONFIG = f"--config={SUPPORT / 'tiny_config.py'}"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "start")
    save_dataset(folder / "data")
    return folder


def flags(inputs, *more: str) -> list[str]:
    return [CONFIG, f"--config.data.dir={inputs / 'data'}", f"--config.train.start={inputs / 'start'}", *more]


def complaint(capsys, call, argv) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        call(argv)
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert said.startswith("error: ") and "\n" not in said
    return said


BAD = {
    "--config.train.start=missing": "missing: not a checkpoint folder",
    "--config.data.dir=missing": "missing/dataset.json: expected a dataset",
    "--config.data.train_split=test": "split test: expected one of train, val",
    "--config.parallel.data=3": "does not match the 1 devices",
    "--config.train.accumulate=3": "config.train.batch_size: expected a multiple of 3",
    "--config.train.steps=0": "config.train.steps: expected a whole number of at least 1",
    "--config.train.trainable=most": "config.train.trainable: expected paper, all or pairs",
    "--config.train.task=upscaling": "config.train.task: expected one of diffusion, autoencoder, text",
    "--config.train.stepz=3": "stepz",
    "--config.model.unet.num_heads=4": "config.model.unet.num_heads: expected 2 as in",
    "--config.data.examples.map_size=128": "config.data.examples.map_size: expected the model's 64, got 128",
    "--config.train.seed=-1": "config.train.seed: expected a whole number from 0 to 2^32 - 1, got -1",
    "--config.train.optimizer.learning_rate=-1.0": "config.train.optimizer.learning_rate: expected 0 or a positive",
    "--config.model.unet.num_heads=3": "config.model.unet.num_heads: expected a divisor of its",
    "--config.model.unet.model_channels=48": "config.model.unet.model_channels: expected a multiple of the norms' 32",
    "--config.model.autoencoder.ch=16": "config.model.autoencoder.ch: expected a multiple of the norms' 32",
    "--config.model.unifusion.trunk_dims=(8,8,16,24)": "trunk_dims, map_size: expected the last number times",
    "--config.model.schedule.linear_end=2.0": "linear_end: expected 0 < linear_start <= linear_end < 1",
    "--config.model.unet.in_channels=3": "config.model.unet.in_channels: expected autoencoder.z_channels",
    "--config.model.unet.context_dim=32": "config.model.unet.context_dim: expected text_encoder.hidden_size",
    "--config.data.prefetch=0": "config.data.prefetch: expected at least 1, got 0",
    "--config.data.examples.flip=2.0": "config.data.examples.flip: expected a number from 0 to 1",
    "--config.data.examples.image_size=17": "config.data.examples.image_size: expected a multiple of 4, got 17",
}


@pytest.mark.parametrize("name", ["coco", "coco_one_gpu", "finetune_one_gpu", "shapes"])
def test_every_setting_of_a_run_can_be_given_as_a_flag(name):
    """A config's keys are the flags there are: one that is not listed cannot be set."""
    config, _ = read_flags([f"--config=configs/{name}.py"], RunSettings)
    run = RunSettings.from_dict(config.to_dict())
    assert set(flatten(run.to_dict())) == set(flatten(config.to_dict()))


@pytest.mark.parametrize("flag", BAD)
def test_bad_settings_end_in_one_line(inputs, tmp_path, capsys, flag):
    argv = flags(inputs, f"--workdir={tmp_path / 'run'}", flag)
    assert BAD[flag] in complaint(capsys, train.main, argv)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--config.train.validate_every=5", "--config.data.validation_split=absent"], "split absent: expected one of"),
        (["--config.train.sample_every=5", "--config.train.sample_layouts=nowhere"], "nowhere: expected a folder of"),
    ],
)
def test_what_is_needed_later_is_looked_for_first(inputs, tmp_path, capsys, more, message):
    argv = flags(inputs, f"--workdir={tmp_path / 'run'}", *more)
    assert message in complaint(capsys, train.main, argv)
    assert not (tmp_path / "run").exists()


def test_a_config_key_that_nothing_reads_ends_in_one_line(inputs, tmp_path, capsys):
    for line, words in {
        "config.train.lerning_rate = 1.0": "config.train.lerning_rate: nothing reads this key",
        "config.extra = 1": "config.extra: nothing reads this key",
        "1 / 0": "--config: ZeroDivisionError: division by zero",
        "nobody": "--config: NameError: name 'nobody' is not defined",
    }.items():
        file = tmp_path / "odd.py"
        body = f"  config = tiny_config.get_config()\n  {line}\n  return config\n"
        file.write_text(f"import tiny_config\n\n\ndef get_config():\n{body}")
        assert words in complaint(capsys, train.main, [f"--config={file}", f"--workdir={tmp_path / 'run'}"])


def test_no_config_and_no_workdir(inputs, capsys, tmp_path):
    # The defaults are the paper's recipe.
    argv = [f"--config.data.dir={inputs / 'data'}", f"--workdir={tmp_path / 'x'}"]
    assert "checkpoints/sd15_base: not a checkpoint" in complaint(capsys, train.main, argv)
    file = tmp_path / "file"
    file.write_text("")
    assert "cannot be written" in complaint(capsys, train.main, flags(inputs, f"--workdir={file / 'run'}"))
    with pytest.raises(SystemExit) as end:
        train.main([CONFIG])
    assert end.value.code == 2


def test_export_says_what_is_missing(tmp_path, capsys):
    argv = [f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"]
    assert "config.json: expected the config of a training run" in complaint(capsys, export_command.main, argv)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_from_a_base_without_adapters_trains_validates_and_exports(tmp_path, capsys):
    absent = ("fusers", "scaleu", "unifusion", "trunk")
    save_start(tmp_path / "start", absent)
    save_dataset(tmp_path / "data")
    more = ["--config.train.steps=4", "--config.train.save_every=2", "--config.train.validate_every=2"]
    more += ["--config.data.validation_split=val", "--config.data.cache_latents=True", f"--workdir={tmp_path / 'run'}"]
    more += ["--config.train.sample_every=4", f"--config.train.sample_layouts={PARITY.parent.parent / 'examples'}"]
    train.main(flags(tmp_path, *more))
    said = capsys.readouterr().err
    assert "from step 0 to 4 on 1 devices" in said and "trained to step 4" in said
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "validation_loss" in line] == [2, 4]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert os.listdir(tmp_path / "run" / "samples") == ["00000004.png"]
    assert any(name.startswith("events") for name in os.listdir(tmp_path / "run" / "tensorboard"))

    export_command.main([f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"])
    model, _, lacks = read_config(tmp_path / "out")
    assert lacks == () and model.unet == tiny_model().unet
    params, base = (flatten(restore_params(tmp_path / name, as_numpy=True)) for name in ("out", "start"))
    for path, leaf in base.items():
        np.testing.assert_array_equal(params[path], leaf)
    moved = [path for path, leaf in params.items() if path not in base and np.abs(leaf).max() > 0]
    assert {"unifusion", "unet"} == {path[0] for path in moved}

    # Another start under the same run: an error, not a model put together from two.
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["train"]["start"] = str(tmp_path / "out")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="damaged or edited"):
        export.export(tmp_path / "run", tmp_path / "again")
    del config["crc32"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="changed since the run"):
        export.export(tmp_path / "run", tmp_path / "again")


def test_updates_skipped_in_a_row_end_the_run_with_its_state_saved(inputs, tmp_path, capsys):
    # The first update with a rate above 0 throws every parameter far away.
    argv = flags(inputs, f"--workdir={tmp_path / 'run'}", "--config.train.optimizer.learning_rate=1e30")
    capsys.readouterr()
    began = time.time()
    with pytest.raises(SystemExit) as end:
        train.main(argv)
    assert end.value.code == 2
    *_, goodput, last = capsys.readouterr().err.strip().splitlines()
    assert goodput.startswith("goodput: steps took ") and "compile" in goodput
    assert last.startswith(f"error: {tmp_path / 'run'}: stopped after step") and "3 times in a row" in last
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["skipped_in_row"] >= 3 and lines[-1]["loss"] is None
    # Every moment of the run counts once.
    taken = {name: value for name, value in lines[-1].items() if name.startswith("seconds/")}
    assert sum(taken.values()) <= lines[-1]["time"] - began
    assert lines[-1]["goodput"] == pytest.approx(taken["seconds/steps"] / sum(taken.values()))
    assert taken["seconds/compile"] > 0 and taken["seconds/start"] > 0 and taken["seconds/restart"] == 0
    assert str(lines[-1]["step"]) in os.listdir(tmp_path / "run" / "checkpoints")


def test_the_profiler_traces_the_steps_asked_for(tmp_path):
    for folder, first in ((tmp_path / "some", 1), (tmp_path / "none", -1)):
        window = ProfilerWindow(folder, first, 2)
        for step in range(4):
            window.before(step)
            window.after(step, jnp.sin(jnp.ones(3)))
        window.close()
    assert len(list((tmp_path / "some" / "profile").rglob("*.xplane.pb"))) == 1
    assert not (tmp_path / "none").exists()


def test_a_resumed_run_does_not_repeat_its_numbers(tmp_path):
    writer = MetricsWriter(tmp_path, 0, 10)
    for step in range(1, 8):
        writer.write(step, {"loss": step})
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')
    writer = MetricsWriter(tmp_path, 5, 10)
    writer.write(6, {"loss": float("nan")})
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] is None


@pytest.mark.parametrize(
    ("kind", "tera"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),  # what jax calls a v5e
        ("TPU v5e", 197),
        ("TPU v5p", 459),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
    ],
)
def test_known_chips(kind, tera):
    assert peak_flops(kind) == tera * 1e12
    assert peak_flops("cpu") is None


@pytest.mark.parametrize(("kind", "share"), [("TPU v5 lite", 0.5), ("TPU v5e", 0.5), ("TPU v4", 98.5 / 275)])
def test_utilisation_of_a_chip(monkeypatch, kind, share):
    """10 steps of 39.4 TFLOP in 4 s are 98.5 TFLOP/s: half of what Google says a v5e can do in bfloat16."""
    now = [100.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now[0])
    clock = Clock(64, lambda: 39.4e12, types.SimpleNamespace(device_kind=kind))
    clock.start(5, 0.5)
    now[0] += 4
    values = clock.report(15, 1.5)
    assert values["mfu"] == pytest.approx(share)
    assert values["images_per_second"] == 160 and values["seconds_per_step"] == 0.4 and values["data_wait"] == 0.25
    assert clock.report(15, 1.5) == {}


def test_no_utilisation_of_an_unknown_chip():
    clock = Clock(64, lambda: pytest.fail("nothing to divide by"), jax.devices("cpu")[0])
    clock.start(0, 0.0)
    assert "mfu" not in clock.report(1, 0.0)


def test_a_devices_share_of_a_step_is_counted_once(monkeypatch):
    """Rows are split over the devices; computing again and taking the batch in parts is no work of the model."""
    # Its gradient computes the forward products again, and small batches do not take it.
    monkeypatch.setattr(cpu, "is_available", lambda: False)
    batch = jax.eval_shape(lambda: tiny_batch(0, 8))

    def flops(devices, *more):
        run, _ = read_settings([CONFIG, "--config.train.batch_size=8", *more], RunSettings)
        return loop.local_flops(run, batch, types.SimpleNamespace(size=devices))

    whole = flops(1)
    assert whole == 2 * flops(2)
    assert whole == flops(1, "--config.train.remat=blocks", "--config.train.accumulate=2")
    # What trains costs its gradients, too.
    assert whole < flops(1, "--config.train.trainable=all") < 3 * whole
