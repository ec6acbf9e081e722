"""Two runs do not write to one folder at once; a dead run keeps nobody out."""

import os
import signal
import subprocess
import sys
import tempfile
import time

import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.locks import NAME, lock_folder
from instdiff_jax.sampling.outputs import COMMON, OutputFolder, RunRecord
from instdiff_jax.sampling.shards import Shard

HOLD = """
import sys, time
from pathlib import Path
from instdiff_jax.locks import lock_folder
from instdiff_jax.sampling.outputs import COMMON, RunRecord
from instdiff_jax.sampling.shards import Shard
with lock_folder(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder, key=""):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), key], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.parametrize(("theirs", "ours"), [("", ""), ("a", "b"), ("a", "")])
def test_another_run_is_named_until_it_dies(tmp_path, theirs, ours):
    other = hold(tmp_path, theirs)
    try:
        with pytest.raises(InputError, match=f"in use by another run \\(process {other.pid} on "):
            with lock_folder(tmp_path, ours):
                pass
    finally:
        other.send_signal(signal.SIGKILL)
        other.wait()
    with lock_folder(tmp_path, ours):
        assert (tmp_path / NAME).exists()
    assert not list(tmp_path.iterdir())


def test_runs_of_one_key_share_a_folder(tmp_path):
    other = hold(tmp_path, "a")
    try:
        began = time.monotonic()
        with lock_folder(tmp_path, "a"):
            pass
        assert time.monotonic() - began < 1 and (tmp_path / NAME).exists()
    finally:
        other.kill()
        other.wait()


def test_a_folder_that_another_run_removes_is_made_again(tmp_path, monkeypatch):
    """A shard with nothing to write removes the folder it made, at any moment before this one has its lock."""
    folder, real, removed = tmp_path / "out", tempfile.TemporaryFile, []

    def after_removal(dir):
        if not removed:
            removed.append(os.rmdir(dir))
        return real(dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", after_removal)
    with OutputFolder(folder, [0]).opened([]):
        assert removed and folder.is_dir()
        folder.rmdir()
        with lock_folder(folder, "a"):
            assert (folder / NAME).exists()
    assert not folder.exists()


def test_sampler_of_other_settings_is_kept_out(tmp_path):
    values = dict.fromkeys(COMMON)
    with RunRecord(tmp_path, Shard(0, 2), values).lock():
        with RunRecord(tmp_path, Shard(1, 2), values).lock():
            pass
        with pytest.raises(InputError, match=f"in use by another run \\(process {os.getpid()} on "):
            with RunRecord(tmp_path, Shard(0, 1), values | {"dtype": "float32"}).lock():
                pass
    assert not list(tmp_path.iterdir())
