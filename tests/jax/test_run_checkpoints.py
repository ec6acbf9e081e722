"""Checkpoints of a run: which are kept, damaged ones, those of another run, and kills during saves."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import pytest
from run_cases import FACTS, small_state
from training_common import make_run, save_start, tiny_model, tiny_settings
from trees import assert_same_trees

from common import PYTHONPATH, SUPPORT
from instdiff_jax.checkpoint import run
from instdiff_jax.checkpoint.folder import restore_params
from instdiff_jax.checkpoint.run import CHECKPOINTS, intact_step
from instdiff_jax.errors import InputError
from instdiff_jax.files import write_json
from instdiff_jax.sampling.loading import checkpoint_fingerprint
from instdiff_jax.training import checkpoints
from instdiff_jax.training.checkpoints import DAMAGED, Checkpoints
from instdiff_jax.training.export import export
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.start import run_facts
from instdiff_jax.training.state import merge_params


def shapes():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), small_state(0))


def save_steps(workdir: Path, steps, **options) -> None:
    checkpoints = Checkpoints(workdir, FACTS, **options)
    for step in steps:
        checkpoints.save(step, small_state(step))
    checkpoints.close()


def restore(workdir: Path, facts=FACTS):
    checkpoints = Checkpoints(workdir, facts)
    try:
        return checkpoints.restore(shapes())
    finally:
        checkpoints.close()


def data_files(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    assert restore(tmp_path) is None
    save_steps(tmp_path, range(1, 9), keep_newest=2, keep_every=3)
    assert sorted(int(path.name) for path in (tmp_path / CHECKPOINTS).iterdir()) == [3, 6, 7, 8]
    assert_same_trees(restore(tmp_path), small_state(8))


def zero_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


BASE = '"base_fingerprint": "b"'


def change_facts(folder: Path, old: str, new: str) -> None:
    path = folder / "facts" / "metadata"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


DAMAGE = {
    "a data file cut short": lambda folder: os.truncate(data_files(folder)[0], 100),
    "a data file lost": lambda folder: data_files(folder)[0].unlink(),
    "bytes zeroed": lambda folder: zero_bytes(data_files(folder)[0]),
    "one bit flipped": lambda folder: flip_a_bit(data_files(folder)[0]),
    "the state lost": lambda folder: shutil.rmtree(folder / "state"),
    "the facts cut short": lambda folder: os.truncate(folder / "facts" / "metadata", 10),
    "the facts not text": lambda folder: (folder / "facts" / "metadata").write_bytes(b"\xff" * 50),
    "a list for facts": lambda folder: (folder / "facts" / "metadata").write_text("[1]"),
    "a letter of a fingerprint": lambda folder: change_facts(folder, BASE, BASE.replace('b"', 'c"')),
    "a letter of a key": lambda folder: change_facts(folder, '"seed"', '"seee"'),
    "a letter of an array's path": lambda folder: change_facts(folder, '"checksums": {"', '"checksums": {"_'),
    "a list for checksums": lambda folder: change_facts(folder, '"checksums": {', '"checksums": [], "x": {'),
    "the notes lost": lambda folder: (folder / "state" / "_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage):
    save_steps(tmp_path, [5, 10])
    DAMAGE[damage](tmp_path / CHECKPOINTS / "10")
    with pytest.warns(UserWarning, match=r"checkpoints/10: damaged"):
        state = restore(tmp_path)
    assert_same_trees(state, small_state(5))
    assert (tmp_path / DAMAGED / "10").is_dir()
    # The run comes by that step again, and can save it.
    save_steps(tmp_path, [10])
    assert_same_trees(restore(tmp_path), small_state(10))


def flip_everywhere(folder: Path) -> None:
    for path in data_files(folder / "state"):
        flip_a_bit(path)


READ = {name: DAMAGE[name] for name in ("the facts cut short", "a letter of a fingerprint", "the state lost")}


@pytest.mark.parametrize("damage", [*READ.values(), flip_everywhere], ids=[*READ, "bits of the arrays"])
def test_reading_a_run_takes_the_checkpoint_before_a_damaged_one(tmp_path, damage):
    """As training does, so that sample, evaluate and export do; its fingerprint is of the step that is taken."""
    write_json(tmp_path / "config.json", {})
    save_steps(tmp_path, [5])
    before = checkpoint_fingerprint(tmp_path)
    save_steps(tmp_path, [10])
    assert intact_step(tmp_path) == 10 and checkpoint_fingerprint(tmp_path) != before
    damage(tmp_path / CHECKPOINTS / "10")
    with pytest.warns(UserWarning, match=r"checkpoints/10: damaged .*; taking the one before it"):
        assert checkpoint_fingerprint(tmp_path) == before
    with pytest.raises(InputError, match="checkpoints/10: damaged"):
        run._restore_averaged(tmp_path, 10, verify=True)
    damage(tmp_path / CHECKPOINTS / "5")
    with warnings.catch_warnings(action="ignore"), pytest.raises(InputError, match="checkpoints/5: damaged"):
        intact_step(tmp_path)


@pytest.mark.parametrize(
    "note",
    [
        b'{"commit_timestamp_nsecs": "x"}',
        b'{"commit_timestamp_nsecs": ' + b"9" * 5000 + b"}",
        b'{"item_handlers": ' + b"[" * 20000 + b"]" * 20000 + b"}",
        b'"text"',
        b"[1]",
        b'{"custom_metadata": 1}',
        b'{"metrics": 1, "init_timestamp_nsecs": []}',
    ],
    ids=["type", "long number", "deep", "text", "list", "custom", "metrics"],
)
def test_orbaxs_own_damaged_notes_are_named(tmp_path, note):
    save_steps(tmp_path, [1, 2])
    (path,) = (tmp_path / CHECKPOINTS / "2").glob("_CHECKPOINT_METADATA")
    path.write_bytes(note)
    for read in (restore, intact_step):
        with pytest.raises(InputError, match="checkpoints: one of its _CHECKPOINT_METADATA files is damaged"):
            read(tmp_path)
    path.unlink()
    assert intact_step(tmp_path) == 2


def test_a_run_trained_anew_is_another_model(tmp_path):
    """Its newest step counts, by the checksums of its arrays; older steps may go."""
    write_json(tmp_path / "a" / "config.json", {})
    save_steps(tmp_path / "a", [9, 10])
    first = checkpoint_fingerprint(tmp_path / "a")
    shutil.rmtree(tmp_path / "a" / CHECKPOINTS / "9")
    assert checkpoint_fingerprint(tmp_path / "a") == first
    write_json(tmp_path / "b" / "config.json", {})
    again = Checkpoints(tmp_path / "b", FACTS)
    again.save(10, small_state(11)._replace(step=small_state(10).step))
    again.close()
    assert checkpoint_fingerprint(tmp_path / "b") != first


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    save_steps(tmp_path, [5, 10])
    for step in ("5", "10"):
        zero_bytes(data_files(tmp_path / CHECKPOINTS / step)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Nor does it when it is started again: a job's scheduler does that by itself.
        for _ in range(2):
            with pytest.raises(InputError, match="no checkpoint there can be read; the damaged ones are in"):
                restore(tmp_path)


def test_running_out_of_memory_is_no_damage(tmp_path, monkeypatch):
    save_steps(tmp_path, [5])
    manager = checkpoints.ocp.CheckpointManager

    def full(self, step, args=None, **options):
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 1 bytes")

    monkeypatch.setattr(manager, "restore", full)
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        restore(tmp_path)
    assert (tmp_path / CHECKPOINTS / "5").is_dir() and not (tmp_path / DAMAGED).exists()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(base_fingerprint="c"), "the base checkpoint's fingerprint .*: expected the run's b, got c"),
        (dict(dataset_fingerprint="e"), "the dataset's fingerprint"),
        (dict(seed=1), "config.train.seed: expected the run's 0, got 1"),
        (dict(batch_size=8), "config.train.batch_size"),
        (dict(model={"sizes": [2, 2]}), "config.model"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_checkpoint_of_another_run_is_an_error(tmp_path, change, words):
    save_steps(tmp_path, [5])
    with pytest.raises(InputError, match=words):
        restore(tmp_path, FACTS | change)
    assert (tmp_path / CHECKPOINTS / "5").is_dir()


def test_a_run_whose_base_was_known_by_the_ends_of_its_files_goes_on(tmp_path):
    save_steps(tmp_path, [5])
    newer = FACTS | dict(base_fingerprint="every byte", older_base_fingerprint=FACTS["base_fingerprint"])
    assert_same_trees(restore(tmp_path, newer), small_state(5))
    with pytest.raises(InputError, match="expected the run's b, got every byte"):
        restore(tmp_path, newer | dict(older_base_fingerprint="c"))


def kill_while_saving(workdir: Path, rng: random.Random, start: int) -> int:
    """Saves step after step until it is killed at a random moment; returns the last step known to be saved."""
    process = subprocess.Popen(
        [sys.executable, str(SUPPORT / "run_cases.py"), str(workdir), str(start)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH},
    )
    lines = [process.stdout.readline() for _ in range(2)]
    time.sleep(rng.random())
    process.send_signal(signal.SIGKILL)
    lines += process.stdout.read().splitlines()
    process.wait()
    return max(int(line) for line in lines if line.strip())


@pytest.mark.parametrize("kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_during_saves_lose_no_finished_checkpoint(tmp_path, kills):
    rng, saved = random.Random(kills), 0
    for _ in range(kills):
        saved = kill_while_saving(tmp_path, rng, saved + 1)
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing that looks like a checkpoint is damaged
            state = restore(tmp_path)
        assert int(state.step) in (saved, saved + 1)
        assert_same_trees(state, small_state(int(state.step)))
        saved = int(state.step)


def test_a_saved_run_becomes_a_checkpoint_folder(tmp_path):
    """The averaged parameters of the run, and the frozen ones of its base."""
    save_start(tmp_path / "start")
    run, workdir = RunSettings(tiny_model(), train=tiny_settings(start=str(tmp_path / "start"))), tmp_path / "run"
    laid_out = make_run(run.model, run.train)
    state, frozen = laid_out.start()
    average = jax.tree.map(lambda leaf: leaf + 1, state.params)
    saved = Checkpoints(workdir, run_facts(run.train, run.model, "dataset"))
    saved.save(3, state._replace(optimizer=state.optimizer._replace(ema=average)))
    saved.close()
    write_json(workdir / "config.json", run.to_dict())
    assert export(workdir, tmp_path / "out") == 3
    assert_same_trees(restore_params(tmp_path / "out", as_numpy=True), merge_params(average, frozen))
    with pytest.raises(InputError, match="no checkpoint of step 4 there"):
        export(workdir, tmp_path / "again", step=4)
