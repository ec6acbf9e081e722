"""configs/finetune_one_gpu.py on a tiny model: little trains, and what a step needs is said before the first one."""

import re

import jax
import numpy as np
import pytest
from training_common import make_run, save_dataset, save_start, tiny_batch, tiny_model, tiny_settings

from common import ROOT
from configs.finetune_one_gpu import TRAINABLE
from instdiff_jax.checkpoint.folder import restore_params
from instdiff_jax.cli import export, train
from instdiff_jax.training import memory
from instdiff_jax.training.step import compile_step, make_train_step
from instdiff_jax.tree import flatten

CONFIG = """import tiny_config
from configs import finetune_one_gpu


def get_config():
    config, ours = tiny_config.get_config(), finetune_one_gpu.get_config()
    with config.train.ignore_type():
        config.train.update(ours.train)
    config.train.sample_every = 0
    return config
"""


@pytest.mark.slow
def test_only_attention_of_the_fusers_and_scaleu_change(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(ROOT))
    save_start(tmp_path / "start")
    save_dataset(tmp_path / "data")
    (tmp_path / "config.py").write_text(CONFIG)
    flags = [f"--config={tmp_path / 'config.py'}", f"--config.data.dir={tmp_path / 'data'}"]
    flags += [f"--config.train.start={tmp_path / 'start'}", "--config.train.steps=3", f"--workdir={tmp_path / 'run'}"]
    train.main([*flags, "--config.train.optimizer.warmup_steps=1"])
    said = capsys.readouterr().err
    line = re.search(r"memory of a step on a device: (\S+) GB \(state (\S+), frozen (\S+), batch \S+, (.+)\)", said)
    assert line and line[4].endswith("from the compiled step")
    assert said.index(line[0]) < said.index("trained to step 3")
    export.main([f"--workdir={tmp_path / 'run'}", f"--output={tmp_path / 'out'}"])
    before, after = (flatten(restore_params(tmp_path / name, as_numpy=True)) for name in ("start", "out"))
    moved = {"/".join(path) for path in before if not np.array_equal(before[path], after[path])}
    rules = "|".join(rule for rule, _ in TRAINABLE[:-1])
    named = {name for name in map("/".join, before) if re.fullmatch(rules, name)}
    assert moved <= named and {name.split("/")[-2] for name in moved if "fuser" in name} >= {"q", "out", "proj"}
    assert any("scaleu" in name for name in moved)


def test_memory_is_counted_from_shapes_where_the_compiler_does_not_say(monkeypatch):
    model, settings = tiny_model(), tiny_settings(trainable=TRAINABLE, batch_size=2)
    run = make_run(model, settings)
    state, frozen = run.start()
    batch = tiny_batch(0, 2)
    trained = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    counted = memory.plan_memory(run.plan, batch)
    # Parameters, their average and two moments in float32, and four counters.
    assert counted.state == 16 * trained + 16 and counted.rest == 4 * trained
    assert counted.frozen == sum(leaf.nbytes for leaf in jax.tree.leaves(frozen))
    assert counted.batch == sum(leaf.nbytes for leaf in jax.tree.leaves(batch))
    assert "an estimate from shapes without activations" in str(counted)
    step = compile_step(make_train_step(model, settings, run.plan), run.plan)
    compiled, measured = memory.compile_measured(step, state, frozen, batch)
    assert measured.compiled and measured.rest > counted.rest and measured[:3] == counted[:3]
    monkeypatch.setattr(type(compiled), "memory_analysis", lambda self: None)
    assert memory.compile_measured(step, state, frozen, batch)[1] == counted


@pytest.mark.parametrize("limit, words", [(None, "step)"), (16 * 10**9, "; the device has 16.00)")])
def test_the_line_names_what_the_device_has(limit, words):
    line = str(memory.StepMemory(10**9, 2 * 10**9, 10**7, 3 * 10**9, True, limit))
    assert line.startswith("memory of a step on a device: 6.01 GB (state 1.00, frozen 2.00, batch 0.01, ")
    assert line.endswith(words)
