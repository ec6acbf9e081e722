"""Kills commands at random moments and looks at what is left; prints a line of JSON about each kill.

    python kill_cases.py INPUTS FOLDER KILLS COMMAND[,COMMAND…]

Each command runs in a fork of this process, which has imported all that they need. INPUTS is made by `make_inputs`.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import common

MARK = "INSTDIFF_KILL_CASES"  # marks this process and all that come from it
SEGMENTS = Path("/dev/shm")


def make_inputs(folder: Path) -> Path:
    from coco_fixture import make_coco
    from tiny_checkpoint import make_layout, make_tiny_checkpoint
    from training_common import save_dataset, save_start

    save_start(folder / "start")
    save_dataset(folder / "data")
    make_tiny_checkpoint(folder / "checkpoint")
    make_coco(folder / "coco", broken=False)
    (folder / "scenes").mkdir()
    for i in range(3):
        (folder / "scenes" / f"scene{i}.json").write_text(make_layout(1, seed=i).to_json())
    return folder


def start(inputs: Path, folder: Path, kills: int, commands: str, seed: int = 0) -> list[dict]:
    """Runs this file; returns what it says about each kill."""
    env = os.environ | {"PYTHONPATH": common.PYTHONPATH, "JAX_PLATFORMS": "cpu", MARK: str(folder)}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(inputs / "xla"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    command = [sys.executable, __file__, str(inputs), str(folder), str(kills), commands, str(seed)]
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout[-2000:] + ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


# ---------------------------------------------------------------- processes


def fork(act: Callable[[], object], log: Path) -> int:
    """Runs `act` in a child with a session of its own; what it says goes to a file."""
    log.write_bytes(b"")  # nobody reads what the one before it said
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        with log.open("wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        act()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


def command(argv: list) -> Callable[[], None]:
    from instdiff_jax import cli

    return lambda: cli.main([str(value) for value in argv])


def finish(pid: int, log: Path) -> str:
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    said = log.read_text(errors="replace")
    assert code == 0, f"{code}: {said[-3000:]}"
    return said


def orphans() -> list[int]:
    """Processes that come from this one, without it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            marked = f"{MARK}={os.environ[MARK]}".encode() in (folder / "environ").read_bytes().split(b"\0")
            dead = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            if marked and not dead and int(folder.name) != os.getpid():
                found.append(int(folder.name))
    return found


def segments(pid: int) -> list[str]:
    """Shared memory of a training run."""
    return [path.name for path in SEGMENTS.glob(f"instdiff-*-{pid}-*")]


def gone(what: Callable[[], list], patience: float = 30.0) -> bool:
    end = time.monotonic() + patience
    while found := what():
        if time.monotonic() > end:
            print(found, file=sys.stderr)
            return False
        time.sleep(0.05)
    return True


def leftovers(folder: Path) -> list[str]:
    """Temporary files and folders, of us and of orbax."""
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*")]
    return [name for name in names if "instdiff" in name or "orbax-checkpoint-tmp" in name or ".partial" in name]


# ---------------------------------------------------------------- commands that write once


def whole_checkpoint(path: Path) -> None:
    from instdiff_jax.checkpoint.folder import restore_params

    restore_params(path)


def whole_dataset(path: Path) -> None:
    from instdiff_jax.data.dataset import InstanceDataset

    for split in ("train2017", "val2017"):
        dataset = InstanceDataset(path, split)
        assert [dataset[i].image for i in range(len(dataset))]


def whole_file(path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, "numpy") as file:
        assert [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118


def whole_pictures(path: Path) -> None:
    from PIL import Image

    for file in path.rglob("[!.]*.png"):
        with Image.open(file) as image:
            image.load()
    for file in path.rglob("[!.]*.json"):
        json.loads(file.read_text())


def jobs(inputs: Path, folder: Path) -> dict[str, tuple[list, Path, Callable[[Path], None], bool]]:
    """Name -> flags, what is written, what looks whether it is whole, and whether it must be there at any time."""
    tiny = ["--checkpoint", inputs / "checkpoint", "--steps", 1, "--mis", 0]
    measured = ["--split", "val2017", "--coco_dir", inputs / "coco", "--real", "--features", "none"]
    back, out = folder / "file" / "back.safetensors", folder / "out"
    coco = ["--coco_dir", inputs / "coco", "--overwrite"]
    return {
        "export": (
            ["--workdir", inputs / "run", "--output", out / "e", "--overwrite"],
            out / "e",
            whole_checkpoint,
            True,
        ),
        "convert": (
            [*convert_flags(inputs, back), "--output", out / "c", "--overwrite"],
            out / "c",
            whole_checkpoint,
            True,
        ),
        "to_pytorch": (["--input", inputs / "checkpoint", "--to_pytorch", back], back, whole_file, True),
        "build-coco": ([*coco, "--data_dir", out / "b"], out / "b", whole_dataset, True),
        "evaluate": ([*measured, "--output", out / "m"], out / "m", whole_pictures, False),
        "sample": ([*tiny, "--layout", inputs / "scenes", "--output", out / "s"], out / "s", whole_pictures, False),
    }


def kill_writer(inputs: Path, folder: Path, name: str, kills: int, rng: random.Random) -> None:
    argv, place, whole, lasting = jobs(inputs, folder)[name]
    place.parent.mkdir(exist_ok=True)
    log, argv = folder / "log.txt", ["convert" if name == "to_pytorch" else name, *argv]
    finish(fork(command(argv), log), log)
    began = time.monotonic()
    finish(fork(command(argv), log), log)
    lasts = time.monotonic() - began
    for k in range(kills):
        if not lasting:
            shutil.rmtree(place, ignore_errors=True)
        pid = fork(command(argv), log)
        # Half of them near the end, where it writes.
        time.sleep(lasts * (rng.random() if k % 2 else rng.uniform(0.6, 1.0)))
        os.kill(pid, signal.SIGKILL)
        killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) < 0
        left = leftovers(folder)
        if lasting or place.exists():
            finish(fork(lambda: whole(place), log), log)
        # The next start removes what is left, and ends well.
        if left or k == kills - 1:
            finish(fork(command(argv), log), log)
            finish(fork(lambda: whole(place), log), log)
        report = {
            "command": name,
            "killed": killed,
            "left": len(left),
            "after": leftovers(folder),
            "orphans": orphans(),
        }
        print(json.dumps(report), flush=True)


def convert_flags(inputs: Path, back: Path) -> list:
    """Reads a PyTorch file with the sizes of the tiny model."""
    model = json.loads((inputs / "checkpoint" / "config.json").read_text())["model"]
    (inputs / "model.py").write_text(CONFIG.format(model=model, tokenizer=str(common.PARITY / "tokenizer")))
    return ["--input", back, "--config", inputs / "model.py"]


CONFIG = """
from ml_collections import ConfigDict

def get_config():
    model = {model!r}
    model["text_encoder"]["tokenizer"] = {tokenizer!r}
    return ConfigDict({{"model": model, "sampling": {{}}}})
"""


# ---------------------------------------------------------------- training


def training(inputs: Path, workdir: Path, steps: int) -> list:
    flags = {"data.dir": inputs / "data", "train.start": inputs / "start", "train.steps": steps}
    flags |= {"train.save_every": 2, "data.workers": 1}
    config = [f"--config.{key}={value}" for key, value in flags.items()]
    return ["train", f"--config={common.SUPPORT / 'tiny_config.py'}", *config, f"--workdir={workdir}"]


def saved(workdir: Path) -> int:
    return max((int(path.name) for path in (workdir / "checkpoints").glob("*") if path.name.isdigit()), default=0)


def kill_training(inputs: Path, folder: Path, kills: int, rng: random.Random) -> None:
    workdir, log = folder / "killed", folder / "train.txt"
    for k in range(kills):
        pid = fork(command(training(inputs, workdir, 1_000_000)), log)
        at = rng.choice(["start", "steps", "saved", "saving"]) if k else "saved"
        before, began = saved(workdir), time.monotonic()
        if at != "start":
            marks = {"steps": "\nstep ", "saving": "\nstep ", "saved": "from step"}
            while marks[at] not in log.read_text(errors="replace") or (at == "saved" and saved(workdir) == before):
                assert os.waitpid(pid, os.WNOHANG)[0] == 0, log.read_text()[-3000:]
                time.sleep(0.002)
        while at == "saving" and not list((workdir / "checkpoints").glob("*tmp*")):
            time.sleep(0.001)
        time.sleep(rng.random() * {"start": 8, "steps": 0.5, "saved": 0.05, "saving": 0.02}[at])
        everything = k % 4 == 3  # the workers and Python's tracker of shared memory too
        (os.killpg if everything else os.kill)(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        workers = gone(orphans)
        memory = everything or gone(lambda pid=pid: segments(pid))
        report = {"command": "train", "at": at, "everything": everything, "step": saved(workdir), "workers": workers}
        report |= {"memory": memory, "left": len(leftovers(workdir)), "back": saved(workdir) < before}
        print(json.dumps(report | {"seconds": round(time.monotonic() - began, 1)}), flush=True)
    last = saved(workdir) + 2
    said = finish(fork(command(training(inputs, workdir, last)), log), log)
    finish(fork(command(training(inputs, folder / "straight", last)), log), log)
    report = {"command": "train", "resumed": f"from step {last - 2} to" in said, "after": leftovers(folder)}
    report |= {"memory": not list(SEGMENTS.glob(f"instdiff-*-{os.getpid()}-*")), "orphans": orphans()}
    report |= {"equal": results(workdir, last) == results(folder / "straight", last), "last": last}
    print(json.dumps(report), flush=True)


def results(workdir: Path, step: int) -> tuple:
    """The checksums of a run's last state, and all its losses."""
    facts = json.loads((workdir / "checkpoints" / str(step) / "facts" / "metadata").read_text())
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return facts["checksums"], [(line["step"], line["loss"], line["grad_norm"]) for line in lines]


def main() -> None:
    import grain  # noqa: F401
    import orbax.checkpoint  # noqa: F401
    import tensorflow_datasets  # noqa: F401

    import instdiff_jax.cli.convert
    import instdiff_jax.cli.evaluate
    import instdiff_jax.data.build_coco
    import instdiff_jax.evaluation.generate
    import instdiff_jax.training.loop  # noqa: F401

    inputs, folder, kills, rng = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[5]))
    try:
        for name in sys.argv[4].split(","):
            if name == "train":
                kill_training(inputs, folder, kills, rng)
            else:
                kill_writer(inputs, folder, name, kills, rng)
    finally:
        for pid in orphans():  # of a case that failed
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main()
