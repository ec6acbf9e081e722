"""Files and folders in a bucket: written whole, copied here once, and errors of one line."""

import http.server
import json
import os
import subprocess
import sys
import threading
import time

import jax
import pytest
from bucket import environment

from common import ROOT
from instdiff_jax import buckets, copies, files, paths
from instdiff_jax.errors import InputError
from instdiff_jax.training.metrics import ProfilerWindow


@pytest.fixture
def place(bucket, request):
    """A folder in the bucket for one test."""
    return buckets.as_path(bucket) / request.node.name


def names(folder) -> list[str]:
    return list(buckets.files_below(folder))


def fill(folder, **contents: str) -> None:
    for name, text in contents.items():
        files.write_text(folder / name.replace("__", "/"), text)


def test_paths_keep_their_two_slashes(bucket, tmp_path):
    path = buckets.as_path(f"{bucket}/a") / "b.json"
    assert str(path) == f"{bucket}/a/b.json" and (path.stem, path.suffix) == ("b", ".json")
    # What argparse or pathlib made one of.
    assert str(buckets.as_path(str(path).replace("//", "/"))) == str(path) == str(buckets.absolute(path))
    assert buckets.as_path(tmp_path) is not None and not buckets.is_bucket(tmp_path)
    assert type(buckets.as_path(str(tmp_path))) is type(tmp_path)
    assert not buckets.is_bucket("gs") and not buckets.is_bucket("folder/gs://x")


def test_a_file_is_written_whole_or_not_at_all(place):
    files.write_json(place / "x.json", {"a": [1]})
    assert files.read_json(place / "x.json") == {"a": [1]}

    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.write_file(place / "x.json", fail)
    assert files.read_json(place / "x.json") == {"a": [1]} and names(place) == ["x.json"]


def test_files_below_lists_as_on_this_machine(place, tmp_path):
    """Fingerprints depend on the order."""
    for folder in (place, tmp_path):
        fill(folder, a__b="1", z="12", a__a__c="123")
        files.write_text(folder / "a-b", "")
    assert list(buckets.files_below(place).items()) == list(buckets.files_below(tmp_path).items())
    assert names(place) == ["a/a/c", "a/b", "a-b", "z"]
    assert names(place / "missing") == names(tmp_path / "missing") == []


def test_a_folder_is_replaced_and_its_last_file_comes_last(place, monkeypatch):
    order = []
    fill(place, config="old", params__stale="1", params__kept="2")

    def seen(path):
        order.append((path.name, names(place)))

    unlink, write = type(place).unlink, type(place).write_bytes
    monkeypatch.setattr(type(place), "unlink", lambda path, **options: (seen(path), unlink(path, **options))[1])
    monkeypatch.setattr(type(place), "write_bytes", lambda path, data: (seen(path), write(path, data))[1])
    with files.replace_folder(place, last="config") as folder:
        fill(folder, config="new", params__kept="3", params__new="4")
        assert names(place) == ["config", "params/kept", "params/stale"]
    assert order == [
        ("config", ["config", "params/kept", "params/stale"]),
        ("stale", ["params/kept", "params/new", "params/stale"]),
        ("config", ["params/kept", "params/new"]),
    ]
    assert paths.read_file(place / "config") == b"new" and paths.read_file(place / "params/kept") == b"3"
    with pytest.raises(KeyboardInterrupt), files.replace_folder(place, last="config") as folder:
        fill(folder, config="half")
        raise KeyboardInterrupt
    assert names(place) == ["config", "params/kept", "params/new"] and paths.read_file(place / "config") == b"new"


def test_a_copy_brings_what_changed_and_drops_what_is_gone(place, monkeypatch):
    fill(place, a="1", b__c="22", other="x")
    copied, write = [], files.write_file

    def watched(path, *rest, **options):
        copied.append(path.name)
        write(path, *rest, **options)

    monkeypatch.setattr(copies, "write_file", watched)

    def copy():
        copied.clear()
        folder = copies.local_copy(place, lambda name: name != "other")
        return {name: (folder / name).read_text() for name in names(folder)}, sorted(copied)

    assert copy() == ({"a": "1", "b/c": "22"}, ["a", "c"])
    assert copy() == ({"a": "1", "b/c": "22"}, [])
    time.sleep(0.01)
    fill(place, a="2")  # as long as before
    (place / "b" / "c").unlink()
    fill(place, d="4")
    assert copy() == ({"a": "2", "d": "4"}, ["a", "d"])
    # What a killed process had not finished: a whole file without its time.
    local = copies.local_copy(place, lambda name: name != "other")
    (local / "a").write_text("3")
    assert copy() == ({"a": "2", "d": "4"}, ["a"])


def test_what_is_added_to_a_copy_is_shared_once(place, monkeypatch):
    fill(place, a="1")
    local = copies.local_copy(place)
    fill(local, b="2", last="3")
    copies.share_copy(local, place, last="last")
    assert names(place) == ["a", "b", "last"]
    monkeypatch.setattr(copies, "write_file", None)  # nothing is copied back
    assert copies.local_copy(place) == local


def test_names_in_a_bucket_do_not_lead_out_of_the_copy(place):
    buckets._file_system().pipe_file(f"{place}/../../escaped", b"x")
    assert names(place) == ["../../escaped"]
    with pytest.raises(InputError, match=r"expected a path inside .*, got '../../escaped'"):
        copies.local_copy(place)


def test_a_copy_that_has_no_room_says_so(place, monkeypatch):
    fill(place, a="1" * 5000)
    monkeypatch.setattr(copies.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    with pytest.raises(InputError, match=r"0\.0 GB to copy, and 0\.0 GB of room in .*XDG_CACHE_HOME=DIR"):
        copies.local_copy(place)


def test_a_profile_goes_to_the_bucket(place):
    window = ProfilerWindow(place, first=3, count=1)
    window.before(3)
    window.after(3, jax.numpy.ones(2))
    found = [name for name in names(place) if name.endswith(".xplane.pb")]
    assert len(found) == 1 and found[0].startswith("profile/plugins/profile/")


def test_of_two_runs_the_later_one_goes_on(place):
    first = buckets.Owner(place)
    first.check()
    second = buckets.Owner(place)
    second.check()
    with pytest.raises(InputError, match=f"another run has started there .process {os.getpid()} on .*; this one stops"):
        first.check()


COMMANDS = """
import json, sys
from instdiff_jax.cli import main
for command in json.loads(sys.argv[1]):
    try:
        main(command)
    except SystemExit as end:
        print("exit code", end.code, file=sys.stderr)
"""


def run(*commands: list[str], **env: str) -> list[str]:
    """What commands say that end with exit code 2, each in one line."""
    done = subprocess.run(
        [sys.executable, "-c", COMMANDS, json.dumps(commands)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
        capture_output=True,
        text=True,
    )
    lines = done.stderr.splitlines()
    assert lines[1::2] == ["exit code 2"] * len(commands) == ["exit code 2"] * (len(lines) // 2), done.stderr
    return lines[::2]


def test_what_is_missing_is_one_line(bucket, tmp_path):
    nowhere, out = "gs://no-such-bucket-here", ["--output", str(tmp_path / "out")]
    assert run(
        ["sample", "--layout", f"{nowhere}/x.json", *out],
        ["sample", "--layout", f"{bucket}/x.json", *out],
        ["sample", "--layout", f"{bucket}/none", *out],
        ["sample", "--checkpoint", f"{bucket}/none", *out],
        ["sample", "--output", f"{nowhere}/out"],
        ["export", "--workdir", f"{bucket}/none", *out],
        ["train", "--workdir", f"{nowhere}/run"],
        ["train", "--workdir", f"{bucket}/run", "--config.data.dir", f"{bucket}/none"],
        ["build-coco", "--coco_dir", f"{bucket}/coco", "--data_dir", str(tmp_path / "data")],
    ) == [
        f"error: {nowhere}/x.json: cannot be read: no such object or bucket",
        f"error: {bucket}/x.json: cannot be read: no such object or bucket",
        f"error: {bucket}/none: nothing there that can be read",
        f"error: {bucket}/none: not a checkpoint folder: no config.json there",
        f"error: {nowhere}/out: cannot be written: no such object or bucket",
        f"error: {bucket}/none/config.json: expected the config of a training run "
        "(cannot be read: no such object or bucket)",
        f"error: {nowhere}/run: cannot be written: no such object or bucket",
        f"error: {bucket}/none: nothing there that can be read",
        f"error: --coco_dir: expected a path on this machine, got {bucket}/coco; copy or mount it",
    ]


class Forbidden(http.server.BaseHTTPRequestHandler):
    """Refuses everything, as Google does without a permission."""

    def _refuse(self):
        body = b'{"error": {"code": 403, "message": "caller does not have storage.objects access"}}'
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(403)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_DELETE = _refuse

    def log_message(self, *args):
        pass


@pytest.fixture
def forbidden():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Forbidden) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield environment(f"http://127.0.0.1:{server.server_port}")
        server.shutdown()


def test_what_is_forbidden_is_one_line(forbidden, tmp_path):
    out = ["--output", str(tmp_path / "out")]
    lines = run(
        ["sample", "--layout", "gs://locked/x.json", *out],
        ["sample", "--layout", "gs://locked/folder", *out],
        ["sample", "--output", "gs://locked/out"],
        ["sample", "--checkpoint", "gs://locked/sd15", *out],
        ["export", "--workdir", "gs://locked/run", *out],
        ["train", "--workdir", "gs://locked/run"],
        **forbidden,
    )
    for line in lines:
        assert line.startswith("error: gs://locked/") and "caller does not have storage.objects access" in line


def test_without_the_packages_one_line_names_the_extra(tmp_path):
    (tmp_path / "gcsfs.py").write_text("raise ImportError('not here')")
    lines = run(
        ["sample", "--layout", "gs://a/x.json"],
        ["train", "--workdir", "gs://a/run"],
        PYTHONPATH=os.pathsep.join([str(tmp_path), str(ROOT)]),
    )
    said = "paths that start with gs:// need gcsfs; pip install 'instdiff_jax[gcs]'"
    assert lines == [f"error: --layout: {said}", f"error: {said}"]
