"""What killed processes left is recognised and removed; nothing else is."""

import os

import pytest
from leftovers import dead_pid, fill, left_behind, names, read

from instdiff_jax import files, processes, temporaries
from instdiff_jax.errors import InputError
from instdiff_jax.files import remove_leftovers, replace_folder, write_text


def test_only_our_leftovers_of_dead_processes_are_removed(tmp_path):
    kept = [
        "data.partial",
        "data.old",
        ".data.part",
        ".data.0123.part",
        left_behind("data", os.getppid()),
        left_behind("data", dead_pid(), host="0" * 8),
    ]
    for name in [*kept, left_behind("data", dead_pid()), left_behind("data", os.getpid())]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.txt").write_text("")
    (tmp_path / left_behind("a.png", dead_pid())).write_text("half")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == sorted(kept)
    remove_leftovers(tmp_path / "missing")


def test_other_hosts_are_judged_by_age(tmp_path):
    """Their processes cannot be seen. What one of them wrote to within a day stays."""
    fresh, stale = (tmp_path / left_behind(name, 1, host="0" * 8) for name in ("fresh", "stale"))
    for folder in (fresh, stale):
        folder.mkdir()
        (folder / "inner").write_text("")
    day = 24 * 3600 + 60
    temporaries.last_change, real = (lambda path: real(path) - day * (path == stale)), temporaries.last_change
    try:
        remove_leftovers(tmp_path)
    finally:
        temporaries.last_change = real
    assert names(tmp_path) == [fresh.name]


def test_a_process_younger_than_what_it_would_have_made_is_another(tmp_path):
    """A container that is started again gives out the same numbers."""
    path = tmp_path / left_behind("data", os.getppid())
    path.mkdir()
    remove_leftovers(tmp_path)
    assert path.exists()
    temporaries.last_change, real = (lambda path: processes.started(os.getppid()) - 61), temporaries.last_change
    try:
        remove_leftovers(tmp_path)
    finally:
        temporaries.last_change = real
    assert not path.exists()


def test_last_change_is_that_of_the_newest_file(tmp_path):
    (tmp_path / "inner").mkdir()
    (tmp_path / "inner" / "file").write_text("")
    os.utime(tmp_path / "inner" / "file", (5e9, 5e9))
    assert temporaries.last_change(tmp_path) == 5e9


def test_large_file_that_a_killed_process_left_is_removed(tmp_path):
    (tmp_path / left_behind("model.pth", dead_pid())).write_text("half")
    write_text(tmp_path / "other.pth", "")
    assert len(names(tmp_path)) == 2
    write_text(tmp_path / "model.pth", "")
    assert names(tmp_path) == ["model.pth", "other.pth"]


def test_leftovers_with_shortened_names(tmp_path, monkeypatch):
    name, pid = "n" * 255, dead_pid()
    with monkeypatch.context() as other:
        other.setattr(os, "getpid", lambda: pid)
        temporaries.name_beside(tmp_path / name, "old").mkdir()
    remove_leftovers(tmp_path, name)
    assert names(tmp_path) == [name]


def test_folder_for_temporary_files_is_removed_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(files.tempfile, "tempdir", str(tmp_path))
    (tmp_path / left_behind("instdiff-aot", dead_pid())).mkdir()
    with files.scratch_folder("aot") as folder:
        assert names(tmp_path) == [folder.name]
    assert not names(tmp_path)


def test_full_disk_in_a_library_is_the_same_line(tmp_path):
    text = "RESOURCE_EXHAUSTED: Error writing: [OS error 28: ENOSPC No space left on device]"
    with pytest.raises(InputError, match="out: cannot be written: No space left on device$"):
        with replace_folder(tmp_path / "out"):
            raise ValueError(text)
    with pytest.raises(ValueError, match="^another$"), files.write_errors(tmp_path / "out"):
        raise ValueError("another")


def test_what_this_process_is_writing_stays(tmp_path):
    with replace_folder(tmp_path / "data") as new:
        fill(new, "new")
        remove_leftovers(tmp_path)
        with replace_folder(tmp_path / "data") as other:
            fill(other, "other")
    assert read(tmp_path / "data") == {"new"}


def test_hidden_old_folder_is_restored(tmp_path):
    old = tmp_path / left_behind("data", dead_pid(), "old")
    old.mkdir()
    fill(old, "old")
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["data"] and read(tmp_path / "data") == {"old"}
    (tmp_path / "data").rename(old)
    files.recover_folder(tmp_path / "data")
    assert names(tmp_path) == ["data"] and read(tmp_path / "data") == {"old"}
    old.mkdir()  # now its replacement is there
    remove_leftovers(tmp_path)
    assert names(tmp_path) == ["data"] and read(tmp_path / "data") == {"old"}
