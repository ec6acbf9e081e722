"""The loader's worker processes: they end with their parent, and what ends them early is one line."""

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
import zlib
from pathlib import Path

import numpy as np
import pytest
from coco_fixture import make_coco

from common import PYTHONPATH
from instdiff_jax.checkpoint.verify import signed
from instdiff_jax.cli import build_coco as coco
from instdiff_jax.data.dataset import InstanceDataset  # noqa: F401  used by the script
from instdiff_jax.data.examples import DataConfig  # noqa: F401
from instdiff_jax.data.loader import DevicePrefetch, LoaderSettings, Sources, make_loader  # noqa: F401
from instdiff_jax.data.phrases import phrase_table
from instdiff_jax.data.segments import FOLDER, remove_segments
from instdiff_jax.errors import InputError


def tokenize(captions):
    return np.zeros((len(captions), 8), np.int32)


def embed(phrases):
    return np.ones((len(phrases), 8), np.float32)


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    make_coco(folder / "coco", train=11, val=2)
    coco.main(["--coco_dir", str(folder / "coco"), "--data_dir", str(folder / "data")])
    phrase_table(folder / "data", "test", embed)
    return folder / "data"


KILLED = """
import multiprocessing.resource_tracker, os, signal, sys
import test_loader_workers as t
from pathlib import Path

if __name__ == "__main__":
    data_dir = Path(sys.argv[1])
    dataset = t.InstanceDataset(data_dir, "train")
    sources = t.Sources(dataset, t.tokenize, t.phrase_table(data_dir, "test"))
    loader = t.make_loader(sources, t.LoaderSettings(t.DataConfig(image_size=64, map_size=64), 4, workers=2))
    [next(loader) for _ in range(4)]
    pids = [child.pid for child in multiprocessing.active_children()]
    print(*pids)
    print(*[path.name for path in Path("/dev/shm").glob(f"instdiff-*-{os.getpid()}-*")], flush=True)
    os.kill(multiprocessing.resource_tracker._resource_tracker._pid, signal.SIGKILL)
    for pid in pids if sys.argv[2] == "all" else []:
        os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("killed", ["main and tracker", "all"])
def test_workers_and_their_shared_memory_end_with_a_killed_parent(data_dir, tmp_path, killed):
    """Even without Python's tracker of shared memory. Where all are killed, the next loader removes what they left."""
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), PYTHONPATH])}
    output = subprocess.run(
        [sys.executable, str(script), str(data_dir), killed], env=env, stdout=subprocess.PIPE, text=True, timeout=300
    ).stdout
    pids, segments = output.splitlines()
    # Its own segments alone: other tests run beside this one.
    workers, segments = [int(pid) for pid in pids.split()], set(segments.split())
    if killed == "all":
        assert segments & set(os.listdir("/dev/shm"))
        remove_segments()
    assert len(workers) == 2 and segments
    end = time.monotonic() + 30
    while time.monotonic() < end and (any(map(is_running, workers)) or segments & set(os.listdir("/dev/shm"))):
        time.sleep(0.1)
    assert not any(map(is_running, workers)) and not segments & set(os.listdir("/dev/shm"))


def test_a_segment_that_never_got_its_size_is_removed():
    """Its worker was killed between creating and sizing it: there is nothing in it to map."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = FOLDER / f"instdiff-{os.stat('/proc/self/ns/pid').st_ino}-{gone.pid}-{uuid.uuid4().hex[:12]}"
    left.touch()
    try:
        remove_segments()
        assert not left.exists()
    finally:
        left.unlink(missing_ok=True)


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("code", "reason"), [(7, "shared memory .* is full"), (9, "want of memory")])
def test_a_worker_that_a_signal_ends_is_one_line(code, reason):
    def batches():
        raise RuntimeError(f"Worker process was terminated unexpectedly with exit code -{code}. Search the logs")
        yield

    prefetch = DevicePrefetch(batches(), lambda batch: batch)
    with pytest.raises(InputError, match=f"config.data.workers: .*{reason}"):
        next(prefetch)
    prefetch.close()


def test_a_dataset_without_instances_is_one_line(data_dir, tmp_path):
    shutil.copytree(data_dir, tmp_path / "data")
    (tmp_path / "data" / "phrases.json").write_text("[]")
    meta = tmp_path / "data" / "dataset.json"
    meta.write_text(
        json.dumps(signed(json.loads(meta.read_text()) | {"phrases": 0, "phrases_crc32": zlib.crc32(b"[]")}))
    )
    with pytest.raises(InputError, match="expected a dataset with instances"):
        phrase_table(tmp_path / "data", "other", embed)
