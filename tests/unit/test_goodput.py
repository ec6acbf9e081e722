"""Goodput adds up to the wall time, also over restarts; Weights & Biases gets what TensorBoard gets."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.training.goodput import CAUSES, Goodput, line_at
from instdiff_jax.training.metrics import MetricsWriter
from instdiff_jax.training.wandb_run import WandbRun, load_wandb


class Clock:
    """A clock that goes on when told."""

    def __init__(self, start: float):
        self.time = start

    def __call__(self) -> float:
        return self.time

    def go(self, seconds: float) -> None:
        self.time += seconds


def seconds(values: dict) -> dict[str, float]:
    return {cause: values[f"seconds/{cause}"] for cause in CAUSES if values[f"seconds/{cause}"]}


def first_process(clock: Clock) -> Goodput:
    goodput = Goodput(clock)
    clock.go(5)
    goodput.switch("data_wait")
    clock.go(2)
    goodput.switch("compile")
    clock.go(20)
    goodput.switch("steps")
    clock.go(60)
    with goodput.of("validation"):
        clock.go(3)
        with goodput.of("samples"):
            clock.go(4)
        clock.go(1)
    with pytest.raises(KeyError), goodput.of("checkpoint"):
        clock.go(6)
        raise KeyError
    clock.go(10)
    return goodput


def test_causes_add_up_to_the_wall_time():
    clock = Clock(1000.0)
    values = first_process(clock).values()
    assert seconds(values) == dict(start=5, data_wait=2, compile=20, steps=70, validation=4, samples=4, checkpoint=6)
    assert sum(seconds(values).values()) == clock.time - 1000
    assert values["goodput"] == pytest.approx(70 / 111)


def test_a_restart_takes_the_time_since_the_last_line_that_is_kept(tmp_path):
    clock, path = Clock(1000.0), tmp_path / "metrics.jsonl"
    assert line_at(path, 7) is None
    lines = [dict(step=7, time=1111.0) | first_process(clock).values(), dict(step=7, validation_loss=0.5)]
    clock.go(30)  # steps 8 and 9, which are lost
    lines.append(dict(step=9, time=clock.time, goodput=1.0))
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 10, "lo')
    clock.go(600)
    goodput = Goodput(clock)
    clock.go(15)
    goodput.resume(line_at(path, 7))
    clock.go(5)
    goodput.switch("steps")
    clock.go(50)
    found = seconds(goodput.values())
    assert found["restart"] == 30 + 600 + 20
    assert found["steps"] == 70 + 50 and found["start"] == 5
    assert sum(found.values()) == clock.time - 1000
    assert str(goodput) == (
        "goodput: steps took 14.8% of 811 s; start 0.6%, restart 80.1%, compile 2.5%, data_wait 0.2%, "
        "checkpoint 0.7%, validation 0.5%, samples 0.5%"
    )


def test_lines_that_are_none_of_a_runs_do_no_harm(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = {"step": 2, "time": 5.0} | Goodput().values()
    foreign = [
        b"3",
        b"[1]",
        b"{}",
        b'{"step": "x"}',
        b'{"step": [2]}',
        b'{"step": null}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"",
    ]
    path.write_bytes(b"\n".join([*foreign, json.dumps(good).encode(), *foreign, b'{"step": 3, "time"']))
    assert line_at(path, 2) == good
    for odd in ({"time": "x"}, {"time": None}, {"seconds/steps": "x"}, {"seconds/compile": []}):
        goodput = Goodput()
        goodput.resume(good | odd)
        assert all(np.isfinite(list(goodput.values().values())))
    MetricsWriter(tmp_path, 2, 4).close()
    assert path.read_text() == json.dumps(good) + "\n"


def test_clocks_that_disagree_and_lines_of_older_versions_do_no_harm():
    clock = Clock(1000.0)
    goodput = Goodput(clock)
    goodput.resume({"step": 3, "loss": 1.0})
    clock.go(5)
    assert seconds(goodput.values()) == {"start": 5}
    late = Goodput(clock)
    late.resume(dict(step=3, time=2000.0) | goodput.values())
    clock.go(4)
    assert seconds(late.values()) == {"start": 5, "restart": 4}


@pytest.fixture
def stand_in(monkeypatch):
    """A module with the calls of wandb that are used, and what they were called with."""
    seen = SimpleNamespace(init=[], metrics=[], logged=[], finished=0)

    def finish():
        seen.finished += 1

    run = SimpleNamespace(
        define_metric=lambda name, step_metric: seen.metrics.append((name, step_metric)),
        log=seen.logged.append,
        finish=finish,
    )

    def init(*, project, id, name, resume, dir, config):
        seen.init.append(dict(project=project, id=id, name=name, resume=resume, dir=dir, config=config))
        return run

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init, Image=lambda image: ("image", image.shape)))
    return seen


def test_weights_and_biases_gets_the_metrics_and_images_of_one_run(tmp_path, stand_in):
    workdir = tmp_path / "run"
    workdir.mkdir()
    for first in (0, 2):
        writer = MetricsWriter(workdir, first, 10, True, WandbRun("layouts", workdir, {"steps": 10}))
        writer.write(first + 1, {"loss": 0.5})
        writer.image(first + 1, "samples", np.zeros((4, 6, 3), np.uint8))
        writer.close()
    one, two = stand_in.init
    assert one == two and one["resume"] == "allow" and (workdir / "wandb_id").read_text() == one["id"]
    assert one["project"] == "layouts" and one["name"] == "run" and one["config"] == {"steps": 10}
    assert stand_in.metrics == [("*", "step")] * 2
    assert stand_in.logged == [
        {"step": 1, "loss": 0.5},
        {"step": 1, "samples": ("image", (4, 6, 3))},
        {"step": 3, "loss": 0.5},
        {"step": 3, "samples": ("image", (4, 6, 3))},
    ]
    assert stand_in.finished == 2


def test_without_its_package_one_line_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match=r"config.train.wandb: .*pip install 'instdiff_jax\[wandb\]'"):
        load_wandb()


def test_weights_and_biases_itself_offline(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="Weights & Biases is an extra: pip install wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    writer = MetricsWriter(tmp_path, 0, 10, True, WandbRun("layouts", tmp_path, {"steps": 10}))
    writer.write(1, {"loss": 0.5})
    writer.image(1, "samples", np.zeros((4, 6, 3), np.uint8))
    writer.close()
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    assert f"run-{(tmp_path / 'wandb_id').read_text()}.wandb" == file.name and file.stat().st_size > 0
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/samples_*.png"))
