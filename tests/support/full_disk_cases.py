"""Runs commands on a disk that is full, in one process; prints what each did as a line of JSON.

    python full_disk_cases.py INPUTS FOLDER mounted|limited commands|training

"mounted" mounts a small tmpfs at FOLDER first (in a namespace of its own, see `start`). "limited" is for machines where
that is not allowed: there no file may grow beyond the same number of bytes.
"""

import contextlib
import io
import json
import logging
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from kill_cases import convert_flags, results

import common

MEGABYTES = 96


def can_mount(folder: Path) -> bool:
    """Whether a file system may be mounted there by a user."""
    try:
        command = [*UNSHARE, "mount", "-t", "tmpfs", "none", str(folder)]
        return subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        return False


UNSHARE = ["unshare", "--map-root-user", "--mount"]


def start(inputs: Path, folder: Path, how: str, which: str) -> list[dict]:
    """Runs this file; returns what the commands did."""
    command = [sys.executable, __file__, str(inputs), str(folder), how, which]
    if how == "mounted":
        mount = f'mount -t tmpfs -o size={MEGABYTES}m none "$0" && exec "$@"'
        command = [*UNSHARE, "bash", "-c", mount, str(folder), *command]
    env = os.environ | {"PYTHONPATH": common.PYTHONPATH, "JAX_PLATFORMS": "cpu"}
    ended = subprocess.run(command, env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-4000:]
    return [json.loads(line) for line in ended.stdout.splitlines()]


@contextlib.contextmanager
def little_room(folder: Path, how: str, kilobytes: int) -> Iterator[None]:
    """Inside, only so much can be written in the folder (or to one file)."""
    if how == "limited":
        resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes << 10, resource.RLIM_INFINITY))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return
    filler, free = folder / "filler", shutil.disk_usage(folder).free
    with filler.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, free - (kilobytes << 10))
    try:
        yield
    finally:
        filler.unlink()


@contextlib.contextmanager
def captured(file: Path) -> Iterator[None]:
    """Both outputs of this process, threads and libraries in C++ included, in a file."""
    before = os.dup(1), os.dup(2)
    with file.open("wb") as target:
        for number in (1, 2):
            os.dup2(target.fileno(), number)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, old in zip((1, 2), before, strict=True):
            os.dup2(old, number)
            os.close(old)


def run(name: str, folder: Path, log: Path, kilobytes: int | None, how: str, argv: list) -> None:
    from instdiff_jax import cli

    before = {str(path.relative_to(folder)) for path in folder.rglob("*")}
    room = contextlib.nullcontext() if kilobytes is None else little_room(folder, how, kilobytes)
    code = 0
    with captured(log), room:
        try:
            if argv[0] == "save_checkpoints":
                save_checkpoints(argv[1])
            else:
                cli.main([str(value) for value in argv])
        except SystemExit as error:
            code = error.code
    left = sorted({str(path.relative_to(folder)) for path in folder.rglob("*")} - before)
    said = [line.rpartition("\r")[2] for line in log.read_text().splitlines()]
    print(json.dumps({"name": name, "code": code, "said": said, "left": left}), flush=True)


def main(inputs: Path, folder: Path, how: str, which: str) -> None:
    import jax

    logging.basicConfig(stream=io.TextIOWrapper(io.FileIO(2, "wb", closefd=False), write_through=True))
    jax.config.update("jax_disable_most_optimizations", True)

    def case(name: str, kilobytes: int | None, *argv) -> None:
        run(name, folder, inputs / "log.txt", kilobytes, how, list(argv))

    (commands if which == "commands" else training)(inputs, folder, how, case)


def commands(inputs: Path, folder: Path, how: str, case: Callable[..., None]) -> None:
    """Those that compile nothing."""
    from instdiff_jax.checkpoint import parts

    to = ["convert", "--input", inputs / "checkpoint", "--to_pytorch"]
    for end in ("safetensors", "pth"):
        case(f"to_pytorch {end}", 1_000, *to, folder / f"back.{end}")
    case("to_pytorch", None, *to, inputs / "back.safetensors")
    back = ["convert", *convert_flags(inputs, inputs / "back.safetensors"), "--output", folder / "converted"]
    case("convert", 1_000, *back)
    parts.SMALL_PART = 0  # one file per array, as in large parts
    case("convert large", 1_000, *back)
    case("build-coco", 8, "build-coco", "--coco_dir", inputs / "coco", "--data_dir", folder / "built")
    flags = ["--coco_dir", inputs / "coco", "--split", "val2017", "--output", folder / "measured", "--real"]
    case("evaluate", 1 if how == "limited" else 8, "evaluate", *flags, "--features", "none")
    case("checkpoint", 24, "save_checkpoints", folder / "saved")


def save_checkpoints(workdir: Path) -> None:
    """A training run's checkpoints and metrics, until the disk is full."""
    from run_cases import FACTS, small_state

    from instdiff_jax.errors import exit_on_input_error
    from instdiff_jax.training.checkpoints import Checkpoints
    from instdiff_jax.training.metrics import MetricsWriter

    with exit_on_input_error():
        checkpoints = Checkpoints(workdir, FACTS)
        with contextlib.closing(MetricsWriter(workdir, 0, 9)) as writer, contextlib.closing(checkpoints):
            writer.write(1, {"loss": 1.0})
            checkpoints.save(1, small_state(1))
            checkpoints.wait()


def training(inputs: Path, folder: Path, how: str, case: Callable[..., None]) -> None:
    """Those that compile."""
    import jax

    jax.config.update("jax_compilation_cache_dir", str(inputs / "xla"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    train = ["train", f"--config={common.SUPPORT / 'tiny_config.py'}", f"--config.train.start={inputs / 'start'}"]
    train += ["--config.train.save_every=2", "--config.train.steps=4"]
    shutil.copytree(inputs / "data", folder / "data")
    case("train straight", None, *train, f"--config.data.dir={inputs / 'data'}", f"--workdir={inputs / 'straight'}")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # nothing is added where the disk is full
    train += [f"--config.data.dir={folder / 'data'}"]
    if how == "mounted":  # two phrases are fewer bytes than a run's config
        case("phrases", 0, *train, f"--workdir={inputs / 'other'}")
    case("latents", 12, *train, f"--workdir={inputs / 'third'}", "--config.data.cache_latents=True")
    if how == "mounted":
        case("metrics", 8, *train, f"--workdir={folder / 'small'}")
    case("train", 21_000 if how == "mounted" else 1_000, *train, f"--workdir={folder / 'run'}")  # a checkpoint is 19 MB
    case("train again", None, *train, f"--workdir={folder / 'run'}")
    ends = [results(workdir, 4) for workdir in (folder / "run", inputs / "straight")]
    print(json.dumps({"name": "results", "equal": ends[0] == ends[1]}), flush=True)
    case("export", 1_000, "export", "--workdir", folder / "run", "--output", folder / "exported")
    tiny = ["--checkpoint", inputs / "checkpoint", "--steps", 1, "--mis", 0]
    case("sample", 1, "sample", *tiny, "--layout", inputs / "scene.json", "--output", folder / "pictures")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4])
