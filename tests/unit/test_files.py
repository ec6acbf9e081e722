"""Files and folders are whole or not there, whatever happens to the process that writes them."""

import json
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from leftovers import fill, names, read

from instdiff_jax import files
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, remove_leftovers, replace_folder, write_file, write_json, write_text


def full_disk(file):
    file.write(b"half")
    raise OSError(28, "No space left on device")


# ---------------------------------------------------------------- files


def test_file_is_written_into_missing_folders(tmp_path):
    path = tmp_path / "a" / "b" / "c.txt"
    write_text(path, "grüße")
    assert path.read_bytes() == "grüße".encode()
    assert names(path.parent) == ["c.txt"]


def test_full_disk_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.bin"
    write_file(path, lambda file: file.write(b"old"))
    with pytest.raises(InputError) as error:
        write_file(path, full_disk)
    assert str(error.value) == f"{path}: cannot be written: No space left on device"
    assert path.read_bytes() == b"old" and names(tmp_path) == ["a.bin"]


def test_any_error_leaves_the_old_file(tmp_path):
    path = tmp_path / "a.bin"
    write_text(path, "old")

    def interrupted(file):
        file.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_file(path, interrupted)
    assert path.read_text() == "old" and names(tmp_path) == ["a.bin"]


def test_file_gets_the_permissions_of_a_new_file(tmp_path):
    write_text(tmp_path / "ours", "")
    (tmp_path / "plain").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_links_stay_and_devices_are_written_directly(tmp_path):
    (tmp_path / "real").mkdir()
    target, link = tmp_path / "real" / "a.txt", tmp_path / "link.txt"
    target.write_text("old")
    link.symlink_to(target)
    write_text(link, "new")
    assert link.is_symlink() and target.read_text() == "new"
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    write_text(null, "gone")
    assert null.is_symlink() and Path("/dev/null").is_char_device()


def test_folder_in_the_place_of_a_file(tmp_path):
    with pytest.raises(InputError, match="cannot be written: is a folder"):
        write_text(tmp_path, "text")
    write_text(tmp_path / "file", "")
    with pytest.raises(InputError, match="cannot be written"):
        write_text(tmp_path / "file" / "below", "text")


def test_longest_names_can_be_written(tmp_path):
    for name in ("n" * 255, "ü" * 127):
        write_text(tmp_path / name, "text")
        assert (tmp_path / name).read_text() == "text"


def test_json_comes_back_as_it_was(tmp_path):
    value = {"caption": "ein Gemälde 日本", "half": "\ud800", "number": 1.5, "list": [1, None]}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    write_json(tmp_path / "b.json", "日本")
    assert "日本" in (tmp_path / "b.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        (b"{", "not valid JSON: Expecting"),
        (b'"\xff"', "not valid JSON: expected UTF-8, got the byte 0xff"),
        (b"[" * 200_000, "not valid JSON: too deeply nested"),
    ],
)
def test_bad_json_is_one_line_that_names_the_file(tmp_path, content, words):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError) as error:
        read_json(path)
    assert str(error.value).startswith(f"{path}: {words}") and "\n" not in str(error.value)


def test_json_with_a_byte_order_mark(tmp_path):
    (tmp_path / "a.json").write_bytes(b"\xef\xbb\xbf[1]")
    assert read_json(tmp_path / "a.json") == [1]


def test_a_key_that_occurs_twice_is_named(tmp_path):
    (tmp_path / "a.json").write_text('{"annos": [{"bbox": [1, 2, 3, 4], "caption": "a", "bbox": [5, 6, 7, 8]}]}')
    with pytest.raises(InputError, match="a.json: not valid JSON: the key 'bbox' occurs twice in one object"):
        read_json(tmp_path / "a.json")


# ---------------------------------------------------------------- folders


@pytest.fixture(params=["exchange", "two moves"])
def moves(request, monkeypatch):
    if request.param == "two moves":
        monkeypatch.setattr(files, "_exchange", lambda a, b: False)


def test_folder_is_made_and_replaced(tmp_path, moves):
    path = tmp_path / "a" / "data"
    for text in ("first", "second"):
        with replace_folder(path) as new:
            assert names(new) == [] and new.parent == path.parent
            fill(new, text)
        assert read(path) == {text} and names(path.parent) == ["data"]


def test_failure_leaves_the_old_folder(tmp_path, moves):
    path = tmp_path / "data"
    with replace_folder(path) as new:
        fill(new, "old")
    with pytest.raises(RuntimeError), replace_folder(path) as new:
        fill(new, "half")
        raise RuntimeError
    assert read(path) == {"old"} and names(tmp_path) == ["data"]
    with pytest.raises(InputError) as error, replace_folder(path) as new, open(new / "x", "wb") as file:
        full_disk(file)
    assert str(error.value) == f"{path}: cannot be written: No space left on device"
    assert read(path) == {"old"} and names(tmp_path) == ["data"]


def test_failed_second_move_brings_the_old_folder_back(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_exchange", lambda a, b: False)
    path = tmp_path / "data"
    with replace_folder(path) as new:
        fill(new, "old")
    rename = os.rename

    def fail(source, target):
        if str(source).endswith(".part"):
            raise OSError(5, "Input/output error", str(source), None, str(target))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(InputError, match="data: cannot be written: Input/output error$"), replace_folder(path) as new:
        fill(new, "new")
    assert read(path) == {"old"} and names(tmp_path) == ["data"]


def test_file_in_the_place_of_a_folder_stays(tmp_path):
    write_text(tmp_path / "data", "mine")
    with pytest.raises(InputError, match="is not a folder"), replace_folder(tmp_path / "data"):
        pass
    assert (tmp_path / "data").read_text() == "mine"


def test_errors_of_other_files_name_them(tmp_path):
    with pytest.raises(InputError, match="data: cannot be written: No such file or directory: .*missing.txt"):
        with replace_folder(tmp_path / "data"):
            open(tmp_path / "missing.txt")


WRITER = """
    import sys
    from pathlib import Path
    from instdiff_jax import files, processes
    path, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
    if not exchange:
        files._exchange = lambda a, b: False
    for k in range(10**9):
        with files.replace_folder(path, sync=False) as new:
            for i in range(5):
                (new / f"{i}.txt").write_text(str(k))
        files.write_text(path.with_suffix(".txt"), str(k) * 10_000, sync=False)
        if k == 0:
            print("started", flush=True)
"""


@pytest.mark.parametrize("how", ["exchange", "two moves"])
def test_killed_at_any_moment(tmp_path, how):
    """Folder and file are whole after `kill -9`, and the next start cleans up."""
    path, randomness = tmp_path / "data", random.Random(0)
    (tmp_path / "data.partial").mkdir()
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), path, how], stdout=subprocess.PIPE, text=True
        )
        child.stdout.readline()
        time.sleep(randomness.uniform(0, 0.05))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        remove_leftovers(tmp_path)
        assert names(tmp_path) == ["data", "data.partial", "data.txt"]
        assert names(path) == [f"{i}.txt" for i in range(5)] and len(read(path)) == 1
        text = (tmp_path / "data.txt").read_text()
        assert text == text[: len(text) // 10_000] * 10_000


def test_two_processes_write_one_folder(tmp_path):
    path = tmp_path / "data"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER).replace("10**9", "40"), path, "exchange"],
            stdout=subprocess.DEVNULL,
        )
        for _ in range(2)
    ]
    assert [child.wait() for child in children] == [0, 0]
    assert names(tmp_path) == ["data", "data.txt"] and len(read(path)) == 1
    assert json.loads(read(path).pop()) == 39


def test_settings_that_a_record_lacks_have_their_defaults():
    defaults = {"sampling": {"steps": 50, "range": (0.0, 1.0), "inner": {"a": 1, "b": 2}}, "model": {"c": 3}}
    record = {"sampling": {"steps": 4, "inner": {"a": 5}}, "seed": 1}
    filled = {"steps": 4, "range": [0.0, 1.0], "inner": {"a": 5, "b": 2}}
    assert files.with_defaults(record, defaults) == {"sampling": filled, "seed": 1}
    assert record["sampling"] == {"steps": 4, "inner": {"a": 5}}
