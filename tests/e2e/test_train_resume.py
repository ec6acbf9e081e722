"""Whole training runs that are killed and go on, bit for bit."""

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from training_common import save_dataset, save_start, tiny_model
from trees import assert_same_trees

from common import PYTHONPATH, ROOT, SUPPORT
from instdiff_jax.checkpoint.run import CHECKPOINTS
from instdiff_jax.locks import lock_folder
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.training.checkpoints import Checkpoints
from instdiff_jax.training.export import read_run
from instdiff_jax.training.state import make_sharding_plan


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "start")
    save_dataset(folder / "data")
    return folder


def command(inputs: Path, workdir: Path, *overrides: str) -> list[str]:
    paths = [f"--config.data.dir={inputs / 'data'}", f"--config.train.start={inputs / 'start'}"]
    config = f"--config={SUPPORT / 'tiny_config.py'}"
    return [sys.executable, str(ROOT / "train.py"), config, *paths, f"--workdir={workdir}", *overrides]


def environment(inputs: Path) -> dict[str, str]:
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
        "JAX_COMPILATION_CACHE_DIR": str(inputs / "xla"),
    }


def run_train(inputs: Path, workdir: Path, *overrides: str) -> str:
    """A run to its end; returns what it said."""
    result = subprocess.run(
        command(inputs, workdir, *overrides), env=environment(inputs), capture_output=True, text=True, timeout=900
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stderr


def start_train(inputs: Path, workdir: Path, *overrides: str, log: Path, **env: str) -> subprocess.Popen:
    """A run that goes on beside the test, and what it says in a file."""
    with log.open("w") as file:
        return subprocess.Popen(
            command(inputs, workdir, *overrides),
            env=environment(inputs) | env,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )


def saved_steps(workdir: Path) -> list[int]:
    """Steps of the checkpoints that are finished: orbax gives a folder its name last."""
    folder = workdir / CHECKPOINTS
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()) if folder.is_dir() else []


def unfinished(workdir: Path) -> set[str]:
    """Checkpoints that are being written, or were when their writer died."""
    folder = workdir / CHECKPOINTS
    return {path.name for path in folder.iterdir() if not path.name.isdigit()} if folder.is_dir() else set()


def wait_for(happened, *processes: subprocess.Popen) -> None:
    """Returns when something has happened, or when one of the processes has ended."""
    while not happened() and all(process.poll() is None for process in processes):
        time.sleep(0.001)


def final_state(workdir: Path, step: int):
    """A run's state, as it is saved."""
    model, _, settings = read_run(workdir)
    alone = ParallelSettings(data=1, fsdp=1)
    plan = make_sharding_plan(model, settings, alone, make_mesh(alone, jax.devices()[:1]))
    checkpoints = Checkpoints(workdir, {}, read_only=True)
    return checkpoints.restore_at(step, plan.state_shapes())[1]


def numbers(workdir: Path) -> list[tuple]:
    """Step, loss, gradient norm and learning rate of every whole line."""
    lines = (workdir / "metrics.jsonl").read_text().split("\n")[:-1]
    return [tuple(json.loads(line)[name] for name in ("step", "loss", "grad_norm", "learning_rate")) for line in lines]


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(inputs, tmp_path):
    assert "from step 0" in run_train(inputs, tmp_path / "straight")
    process = start_train(inputs, tmp_path / "killed", log=tmp_path / "log.txt")
    wait_for(lambda: saved_steps(tmp_path / "killed"), process)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert saved_steps(tmp_path / "killed") == [5]
    said = run_train(inputs, tmp_path / "killed")
    assert "from step 5" in said and "goodput: steps took" in said
    # Since the run's first start, with what the kill cost.
    first, last = (json.loads(line) for line in (tmp_path / "killed" / "metrics.jsonl").read_text().splitlines()[::9])
    wall, before = (sum(line[name] for name in line if name.startswith("seconds/")) for line in (last, first))
    assert wall - before == pytest.approx(last["time"] - first["time"], abs=1.0)
    assert last["seconds/restart"] > 0 and first["seconds/restart"] == 0
    assert_same_trees(final_state(tmp_path / "killed", 10), final_state(tmp_path / "straight", 10))
    assert numbers(tmp_path / "killed") == numbers(tmp_path / "straight")
    assert [line[0] for line in numbers(tmp_path / "killed")] == list(range(1, 11))


@pytest.mark.slow
@pytest.mark.parametrize("workers", [0, 2])
def test_sigterm_saves_and_ends_well(inputs, tmp_path, workers):
    """The signal goes to the loader's processes too, as a cluster's scheduler sends it."""
    workdir, log = tmp_path / "run", tmp_path / "log.txt"
    flags = ["--config.train.steps=1000000", f"--config.data.workers={workers}"]
    process = start_train(inputs, workdir, *flags, log=log)
    wait_for(lambda: saved_steps(workdir), process)
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait() == 0, log.read_text()[-3000:]
    step = saved_steps(workdir)[-1]
    assert step == numbers(workdir)[-1][0]
    assert f"saved after step {step}" in log.read_text()


@pytest.mark.slow
def test_twenty_kills_lose_only_the_steps_since_the_last_finished_save(inputs, tmp_path):
    """SIGKILL while the program starts, between saves, and with a checkpoint half written."""
    rng, workdir, log = random.Random(0), tmp_path / "run", tmp_path / "log.txt"
    every, newest, startup, in_saves = 2, 0, 0.0, 0
    flags = [f"--config.train.save_every={every}", "--config.train.steps=1000000"]
    # The first one gets as far as a checkpoint.
    moments = ["running", *rng.sample(["starting"] * 4 + ["running"] * 7 + ["saving"] * 8, 19)]
    for moment in moments:
        process, began = start_train(inputs, workdir, *flags, log=log), time.monotonic()
        if moment == "starting":
            time.sleep(rng.random() * startup)
        elif moment == "running":
            wait_for(lambda: saved_steps(workdir)[-1:] > [newest], process)
            startup = time.monotonic() - began
            time.sleep(rng.random())
        else:
            # Leftovers of other saves are removed at the start.
            wait_for(lambda: "from step" in log.read_text(), process)
            wait_for(lambda: unfinished(workdir), process)
            time.sleep(rng.random() * 0.02)
        assert process.poll() is None, log.read_text()[-3000:]
        process.kill()
        process.wait()
        said, before = log.read_text(), newest
        newest = saved_steps(workdir)[-1]
        in_saves += bool(unfinished(workdir))
        # It went on after the newest checkpoint there was, and at most one more save was on its way.
        assert "damaged" not in said and ("from step" not in said or f"from step {before} to" in said)
        assert newest >= before
        assert numbers(workdir)[-1][0] - newest <= 2 * every
    print(f"{len(moments)} kills, {in_saves} with a checkpoint half written; step {newest}")
    assert in_saves >= 4

    flags = [f"--config.train.steps={newest + 3}", f"--config.train.save_every={every}"]
    said = run_train(inputs, workdir, *flags)
    assert f"from step {newest} to" in said and "damaged" not in said
    run_train(inputs, tmp_path / "straight", f"--config.train.steps={newest + 3}", "--config.train.save_every=1000000")
    assert_same_trees(final_state(workdir, newest + 3), final_state(tmp_path / "straight", newest + 3))
    assert numbers(workdir) == numbers(tmp_path / "straight")
    assert tiny_model() == read_run(workdir)[0]


# ---------------------------------------------------------------- several processes


def start_job(inputs: Path, workdir: Path, *overrides: str) -> list[subprocess.Popen]:
    """One run in two processes of one device each; what they say is in WORKDIR.0 and WORKDIR.1."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    job = dict(JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2")
    return [
        start_train(inputs, workdir, *overrides, log=job_log(workdir, i), **job, JAX_PROCESS_ID=str(i))
        for i in range(2)
    ]


def job_log(workdir: Path, process: int) -> Path:
    return workdir.with_suffix(f".{process}")


def finish_job(workdir: Path, processes: list[subprocess.Popen]) -> str:
    """Waits for both; returns what the first has said, where both ended well and alike."""
    codes = [process.wait() for process in processes]
    said = [job_log(workdir, i).read_text() for i in range(2)]
    assert codes == [0, 0], said[0][-2000:] + said[1][-2000:]
    assert said[0].splitlines()[-1] == said[1].splitlines()[-1]
    return said[0]


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 1), (1, 2)], ids=["data", "fsdp"])
def test_a_job_of_two_processes_stops_at_one_step_and_goes_on_bit_for_bit(inputs, tmp_path, mesh):
    mesh = [f"--config.parallel.data={mesh[0]}", f"--config.parallel.fsdp={mesh[1]}"]
    workdir = tmp_path / "run"
    job = start_job(inputs, workdir, *mesh, "--config.train.steps=1000000")
    wait_for(lambda: saved_steps(workdir), *job)
    time.sleep(0.3)
    # One process alone is told.
    job[1].terminate()
    said = finish_job(workdir, job)
    step = saved_steps(workdir)[-1]
    assert f"stopped by a signal, saved after step {step};" in said
    assert numbers(workdir)[-1][0] == step
    shutil.copytree(workdir, tmp_path / "alone")

    flags = [f"--config.train.steps={step + 4}", "--config.train.save_every=1000000"]
    said = finish_job(workdir, start_job(inputs, workdir, *mesh, *flags))
    assert f"from step {step} to" in said
    finish_job(tmp_path / "straight", start_job(inputs, tmp_path / "straight", *mesh, *flags))
    assert_same_trees(final_state(workdir, step + 4), final_state(tmp_path / "straight", step + 4))
    assert numbers(workdir) == numbers(tmp_path / "straight")

    # The same examples come where the number of processes has changed.
    assert f"from step {step} to" in run_train(inputs, tmp_path / "alone", *flags)
    ours, theirs = (np.array(numbers(tmp_path / name))[-4:, 1] for name in ("alone", "run"))
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.slow
def test_a_signal_to_every_process_stops_a_job_at_one_step(inputs, tmp_path):
    workdir = tmp_path / "run"
    job = start_job(inputs, workdir, "--config.train.steps=1000000")
    wait_for(lambda: saved_steps(workdir), *job)
    for process in job:
        process.terminate()
    said = finish_job(workdir, job)
    assert f"stopped by a signal, saved after step {saved_steps(workdir)[-1]};" in said


@pytest.mark.slow
def test_a_job_whose_folder_is_in_use_ends_with_one_line_in_every_process(inputs, tmp_path):
    workdir = tmp_path / "run"
    with lock_folder(workdir):
        job = start_job(inputs, workdir)
        assert [process.wait(300) for process in job] == [2, 2]
    for i in range(2):
        said = [line for line in job_log(workdir, i).read_text().splitlines() if "rror" in line]
        assert len(said) == 1 and f"in use by another run (process {os.getpid()} on" in said[0], said
