"""Checkpoints of a run: kept, damaged, of another run; and whole runs that are killed and go on, bit for bit."""

import json
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
import jax.numpy as jnp
import numpy as np
import pytest
from training_common import save_dataset, save_start, tiny_model

from common import PARITY
from instdiff_jax.errors import InputError
from instdiff_jax.export import read_run
from instdiff_jax.parallel import ParallelSettings, make_mesh
from instdiff_jax.training.checkpoints import DAMAGED, FOLDER, Checkpoints
from instdiff_jax.training.state import init_state, make_layout

ROOT = PARITY.parent.parent
FACTS = dict(seed=0, batch_size=4, base="start", base_fingerprint="b", dataset_fingerprint="d", model={"sizes": [1, 2]})


def small_state(step: int):
    """A training state of a few arrays."""
    rng = np.random.default_rng(step)
    params = {"unet": {"kernel": rng.standard_normal((64, 48), np.float32), "bias": np.ones(48, np.float32)}}
    return init_state(jax.tree.map(jnp.asarray, params))._replace(step=jnp.int32(step))


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


def assert_same(a, b) -> None:
    for ours, theirs in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))


def data_files(folder: Path) -> list[Path]:
    files = [path for path in folder.rglob("*") if path.is_file() and path.parent.name == "d"]
    return sorted(files, key=lambda path: path.stat().st_size, reverse=True)


def test_the_newest_and_every_nth_are_kept(tmp_path):
    assert restore(tmp_path) is None
    save_steps(tmp_path, range(1, 9), keep_newest=2, keep_every=3)
    assert sorted(int(path.name) for path in (tmp_path / FOLDER).iterdir()) == [3, 6, 7, 8]
    assert_same(restore(tmp_path), small_state(8))


def zero_bytes(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 64] = bytes(64)
    path.write_bytes(bytes(content))


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))


DAMAGE = {
    "a data file cut short": lambda folder: os.truncate(data_files(folder)[0], 100),
    "a data file lost": lambda folder: data_files(folder)[0].unlink(),
    "bytes zeroed": lambda folder: zero_bytes(data_files(folder)[0]),
    "one bit flipped": lambda folder: flip_a_bit(data_files(folder)[0]),
    "the state lost": lambda folder: shutil.rmtree(folder / "state"),
    "the facts cut short": lambda folder: os.truncate(folder / "facts" / "metadata", 10),
    "the notes lost": lambda folder: (folder / "state" / "_METADATA").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(tmp_path, damage):
    save_steps(tmp_path, [5, 10])
    DAMAGE[damage](tmp_path / FOLDER / "10")
    with pytest.warns(UserWarning, match=r"checkpoints/10: damaged"):
        state = restore(tmp_path)
    assert_same(state, small_state(5))
    assert (tmp_path / DAMAGED / "10").is_dir()
    # The run comes by that step again, and can save it.
    save_steps(tmp_path, [10])
    assert_same(restore(tmp_path), small_state(10))


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(tmp_path):
    save_steps(tmp_path, [5, 10])
    for step in ("5", "10"):
        zero_bytes(data_files(tmp_path / FOLDER / step)[0])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(InputError, match="none of the checkpoints of steps"):
            restore(tmp_path)


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
    assert (tmp_path / FOLDER / "5").is_dir()


SAVER = """
import sys
sys.path[:0] = [{tests!r}, {root!r}]
from pathlib import Path
from test_train_resume import FACTS, Checkpoints, small_state
checkpoints = Checkpoints(Path(sys.argv[1]), FACTS, keep_newest=2)
for step in range(int(sys.argv[2]), 10_000):
    checkpoints.save(step, small_state(step))
    checkpoints._manager.wait_until_finished()
    print(step, flush=True)
"""


def kill_while_saving(workdir: Path, rng: random.Random, start: int) -> int:
    """Saves step after step until it is killed at a random moment; returns the last step known to be saved."""
    script = SAVER.format(tests=str(ROOT / "tests"), root=str(ROOT))
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(workdir), str(start)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
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
        assert_same(state, small_state(int(state.step)))
        saved = int(state.step)


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "start")
    save_dataset(folder / "data")
    return folder


def command(inputs: Path, workdir: Path, *overrides: str) -> list[str]:
    paths = [f"--config.data.dir={inputs / 'data'}", f"--config.train.start={inputs / 'start'}"]
    config = f"--config={ROOT / 'tests' / 'tiny_config.py'}"
    return [sys.executable, str(ROOT / "train.py"), config, *paths, f"--workdir={workdir}", *overrides]


def environment(inputs: Path) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path,
        "JAX_COMPILATION_CACHE_DIR": str(inputs / "xla"),
    }


def run_train(inputs: Path, workdir: Path, *overrides: str) -> str:
    """A run to its end; returns what it said."""
    result = subprocess.run(
        command(inputs, workdir, *overrides), env=environment(inputs), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def saved_steps(workdir: Path) -> list[int]:
    folder = workdir / FOLDER
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def kill_run(inputs: Path, workdir: Path, after: float, number=signal.SIGKILL, *overrides: str) -> int:
    """Starts a run and sends a signal some seconds after its first new checkpoint; returns its exit code."""
    old = saved_steps(workdir)
    with (workdir.parent / "log.txt").open("a") as log:
        process = subprocess.Popen(
            command(inputs, workdir, *overrides), env=environment(inputs), stdout=log, stderr=log
        )
        while process.poll() is None and not set(saved_steps(workdir)) - set(old):
            time.sleep(0.01)
        time.sleep(after)
        if process.poll() is None:
            process.send_signal(number)
        return process.wait()


def final_state(workdir: Path, step: int):
    """A run's state, as it is saved."""
    model, _, settings = read_run(workdir)
    alone = ParallelSettings(data=1, fsdp=1)
    layout = make_layout(model, settings, alone, make_mesh(alone, jax.devices()[:1]))
    checkpoints = Checkpoints(workdir, {}, read_only=True)
    return checkpoints.restore_at(step, layout.state_shapes())[1]


def numbers(workdir: Path) -> list[tuple]:
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"], line["grad_norm"], line["learning_rate"]) for line in lines]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(inputs, tmp_path):
    assert "from step 0" in run_train(inputs, tmp_path / "straight")
    assert kill_run(inputs, tmp_path / "killed", 0.0) == -signal.SIGKILL
    assert saved_steps(tmp_path / "killed") == [5]
    assert "from step 5" in run_train(inputs, tmp_path / "killed")
    assert_same(final_state(tmp_path / "killed", 10), final_state(tmp_path / "straight", 10))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")
    assert [line[0] for line in numbers(tmp_path / "killed")] == list(range(1, 11))


@pytest.mark.slow
def test_sigterm_saves_and_ends_well(inputs, tmp_path):
    assert kill_run(inputs, tmp_path / "run", 0.5, signal.SIGTERM, "--config.train.steps=100000") == 0
    step = saved_steps(tmp_path / "run")[-1]
    assert step == numbers(tmp_path / "run")[-1][0]
    assert f"saved after step {step}" in (tmp_path / "log.txt").read_text()


@pytest.mark.slow
def test_random_kills_lose_only_the_steps_since_the_last_save(inputs, tmp_path):
    rng = random.Random(0)
    steps = ["--config.train.steps=60", "--config.train.save_every=2", "--config.train.log_every=2"]
    run_train(inputs, tmp_path / "straight", *steps)
    before = 0
    for _ in range(5):
        kill_run(inputs, tmp_path / "killed", rng.random(), signal.SIGKILL, *steps)
        assert saved_steps(tmp_path / "killed")[-1] >= before
        before = saved_steps(tmp_path / "killed")[-1]
    said = run_train(inputs, tmp_path / "killed", *steps)
    assert f"from step {before}" in said and "damaged" not in said
    assert_same(final_state(tmp_path / "killed", 60), final_state(tmp_path / "straight", 60))
    assert tiny_model() == read_run(tmp_path / "killed")[0]
