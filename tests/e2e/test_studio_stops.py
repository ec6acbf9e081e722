"""`instdiff studio` is killed, started again, and told to stop, while clients wait for pictures."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from tiny_checkpoint import make_layout

import common

SEGMENTS = Path("/dev/shm")
CLIENTS = 6
SLOW = dict(steps=100, sampler="heun")  # nobody's picture is ready at once


@pytest.fixture
def start(tiny_checkpoint, tmp_path):
    """Starts the studio on a port (0: any); returns the process and its address. What it leaves lies in tmp_path."""
    running = []
    (tmp_path / "tmp").mkdir()
    paths = os.pathsep.join((str(common.ROOT), os.environ.get("PYTHONPATH", "")))
    env = os.environ | {"PYTHONPATH": paths, "JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path / "tmp")}
    env |= {"JAX_COMPILATION_CACHE_DIR": str(common.ROOT / ".pytest_cache" / "xla")}
    env |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    flags = ["--no_browser", "--checkpoint", str(tiny_checkpoint)]

    def start(port: int) -> tuple[subprocess.Popen, str]:
        command = [sys.executable, "-m", "instdiff_jax", "studio", "--port", str(port), *flags]
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        running.append(process)
        url = process.stdout.readline().split()[-1]
        while httpx.get(f"{url}readyz", timeout=600).status_code != 200:
            time.sleep(0.1)
        return process, url

    yield start
    for process in running:
        process.kill()
        process.wait()
        process.stdout.close()


def ask(url: str, number: int) -> int:
    """The status of a request; 0 for an error of the connection."""
    body = dict(layout=make_layout(1 + number % 3, seed=number).to_dict(), **SLOW)
    try:
        return httpx.post(f"{url}v1/images", json=body, timeout=600).status_code
    except httpx.TransportError:
        return 0


@contextlib.contextmanager
def clients(url: str):
    """The futures of requests that the server has begun to draw, or keeps waiting."""
    with ThreadPoolExecutor(CLIENTS) as pool:
        asked = [pool.submit(ask, url, number) for number in range(CLIENTS)]
        while httpx.get(f"{url}metrics").text.count("instdiff_waiting_images 0.0"):
            assert not all(one.done() for one in asked)
        yield asked


def children(pid: int) -> list[int]:
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.slow
@pytest.mark.skipif(not SEGMENTS.is_dir(), reason="needs Linux")
def test_killed_and_started_again_then_told_to_stop(start, tmp_path):
    segments = set(SEGMENTS.iterdir())
    process, url = start(0)
    port = int(url.rstrip("/").rpartition(":")[2])
    with clients(url) as asked:
        assert not children(process.pid)
        process.kill()
        assert [one.result(timeout=60) for one in asked] == [0] * CLIENTS
    process.wait(60)
    assert not list((tmp_path / "tmp").iterdir()) and set(SEGMENTS.iterdir()) <= segments
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=10)

    process, again = start(port)
    assert again == url
    with clients(url) as asked:
        process.send_signal(signal.SIGTERM)
        statuses = [one.result(timeout=300) for one in asked]
    assert 200 in statuses and set(statuses) <= {200, 503}
    process.wait(60)
    assert process.returncode in (0, -signal.SIGTERM)
    assert not list((tmp_path / "tmp").iterdir()) and set(SEGMENTS.iterdir()) <= segments
