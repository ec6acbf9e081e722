"""Commands on a full disk: one line that names where, exit code 2, nothing half written, and they go on exactly."""

import os
import socket
import subprocess
import sys

import full_disk_cases
import pytest
from coco_fixture import make_coco
from tiny_checkpoint import make_layout, make_tiny_checkpoint
from training_common import save_dataset, save_start

import common

# Each case, and where its line says that the disk is full.
COMMANDS = {
    "to_pytorch safetensors": "back.safetensors",
    "to_pytorch pth": "back.pth",
    "convert": "converted",
    "convert large": "converted",
    "build-coco": "built",
    "evaluate": "measured/",
    "checkpoint": "saved/checkpoints",
}
TRAINING = {
    "phrases": "data/phrases/",
    "latents": "data/latents/",
    "metrics": "small/",
    "train": "run/checkpoints",
    "export": "exported",
    "sample": "pictures/",
}
# What was whole before the disk was full stays, and the next start goes on from there.
WHOLE = {
    "phrases": ("data/phrases",),
    "latents": ("data/phrases", "data/latents"),
    "metrics": ("small",),
    "train": ("run",),
    "sample": ("pictures",),
    "evaluate": ("measured",),
    "checkpoint": ("saved",),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "start")
    save_dataset(folder / "data")
    make_tiny_checkpoint(folder / "checkpoint")
    make_coco(folder / "coco", broken=False)
    (folder / "scene.json").write_text(make_layout(1).to_json())
    return folder


def check(done, places, folder, how):
    """What is wrong with each case."""
    reason, problems = "No space left on device" if how == "mounted" else "File too large", []
    for name, place in places.items():
        if how == "limited" and name in ("phrases", "metrics"):
            continue  # smaller than any limit that lets the run start
        case, whole = done[name], WHOLE.get(name, ("-",))
        errors = [line for line in case["said"] if "rror" in line or "Traceback" in line]
        good = case["code"] == 2 and len(errors) == 1 and case["said"][-1] == errors[0] and len(case["said"]) < 12
        good = good and errors[0].startswith(f"error: {folder / place}") and errors[0].endswith(reason)
        left = [path for path in case["left"] if not path.startswith(whole) or "instdiff-" in path or "tmp" in path]
        if not good or left:
            problems.append((case, left))
    return problems


def how_to(folder):
    return "mounted" if full_disk_cases.can_mount(folder) else "limited"


@pytest.mark.slow
def test_commands_on_a_full_disk(inputs, tmp_path):
    how = how_to(tmp_path)
    done = {case["name"]: case for case in full_disk_cases.start(inputs, tmp_path, how, "commands")}
    assert not check(done, COMMANDS, tmp_path, how)


@pytest.mark.slow
def test_training_on_a_full_disk(inputs, tmp_path):
    how = how_to(tmp_path)
    done = {case["name"]: case for case in full_disk_cases.start(inputs, tmp_path, how, "training")}
    assert not check(done, TRAINING, tmp_path, how)
    again = "\n".join(done["train again"]["said"])
    assert done["train again"]["code"] == 0 and f"from step {2 if how == 'mounted' else 0} to" in again
    assert done["results"]["equal"]


# Both in one namespace, so that they see the same small disk. A checkpoint has 19 MB: the second one does not fit.
JOB = """
if [ "$1" = mounted ]; then mount -t tmpfs -o size=30m none "$0"; else ulimit -f 1000; fi
log=$2; shift 2
for i in 0 1; do JAX_PROCESS_ID=$i "$@" > "$log.$i" 2>&1 & pids[$i]=$!; done
for i in 0 1; do wait ${pids[$i]}; echo $?; done
ls "$0/checkpoints"
"""


@pytest.mark.slow
def test_a_job_of_two_processes_on_a_full_disk(inputs, tmp_path):
    """Both end with one line and exit code 2: the one that could not write, and the one that waits for it."""
    how, workdir = how_to(tmp_path), tmp_path / "run"
    workdir.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, str(common.ROOT / "train.py"), f"--config={common.SUPPORT / 'tiny_config.py'}"]
    command += [f"--config.data.dir={inputs / 'data'}", f"--config.train.start={inputs / 'start'}"]
    command += [f"--workdir={workdir}", "--config.train.save_every=2", "--config.train.steps=8"]
    around = full_disk_cases.UNSHARE if how == "mounted" else []
    env = os.environ | {"PYTHONPATH": common.PYTHONPATH, "JAX_PLATFORMS": "cpu"}
    env |= {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    job = [*around, "bash", "-c", JOB, str(workdir), how, str(tmp_path / "log"), *command]
    ended = subprocess.run(job, env=env, capture_output=True, text=True, timeout=400)
    logs = [(tmp_path / f"log.{i}").read_text() for i in range(2)]
    assert ended.stdout.split()[:2] == ["2", "2"], (ended, *logs)
    assert ended.stdout.split()[2:] == (["2"] if how == "mounted" else [])
    for log in logs:
        errors = [line for line in log.splitlines() if "rror" in line or "Traceback" in line]
        assert len(errors) == 1 and errors[0].startswith("error: "), log
    reason = "No space left on device" if how == "mounted" else "File too large"
    assert any(reason in log for log in logs)
