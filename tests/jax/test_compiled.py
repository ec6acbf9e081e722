"""Programs compiled ahead of time; instdiff_jax/sampling/compiled.py."""

import json
from unittest import mock

import jax
import jax.numpy as jnp
import pytest
from tiny_checkpoint import make_layout

from instdiff_jax import Pipeline
from instdiff_jax.checkpoint.verify import signed
from instdiff_jax.cli.compile import parse_args
from instdiff_jax.errors import InputError
from instdiff_jax.sampling import compiled

OPTIONS = [
    "jax_compilation_cache_dir",
    "jax_enable_compilation_cache",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_min_entry_size_bytes",
    "jax_persistent_cache_enable_xla_caches",
]


@pytest.fixture(scope="module", autouse=True)
def as_before():
    """Each test may change jax's cache; the tests after these have the old one."""
    before = {name: getattr(jax.config, name) for name in OPTIONS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compiled.compilation_cache.reset_cache()


def work(scale: float) -> float:
    """Two programs, in the place of a pipeline's."""
    return float(jax.jit(lambda x: jnp.sin(x) * 3.5)(scale) + jax.jit(lambda x: jnp.cos(x @ x).sum())(jnp.ones((9, 9))))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The programs of `work`."""
    jax.clear_caches()  # what other tests compiled would not be written
    path = tmp_path_factory.mktemp("compiled") / "work"
    with mock.patch.object(compiled, "_run", lambda *_: work(2.0)):
        count = compiled.fill(path, mock.MagicMock(), [1], (32, 32), {})
    note = json.loads((path / compiled.NOTE).read_text())
    assert count == len(note["files"]) == len(list(path.iterdir())) - 1 >= 2
    return path


@pytest.fixture
def events(monkeypatch):
    """jax's events while listeners live, which end with the test."""
    seen, single, timed = [], [], []
    monkeypatch.setattr(jax.monitoring, "register_event_listener", single.append)
    monkeypatch.setattr(jax.monitoring, "register_event_duration_secs_listener", timed.append)

    def event(name, **values):
        seen.append(name)
        for listener in single:
            listener(name, **values)

    def duration(name, seconds, **values):
        for listener in timed:
            listener(name, seconds, **values)

    jax._src.monitoring.register_event_listener(event)
    jax._src.monitoring.register_event_duration_secs_listener(duration)
    yield seen
    jax._src.monitoring.unregister_event_listener(event)
    jax._src.monitoring.unregister_event_duration_listener(duration)


def all_found(events: list[str]) -> bool:
    asked = events.count("/jax/compilation_cache/compile_requests_use_cache")
    return events.count("/jax/compilation_cache/cache_hits") == asked > 0


def test_a_later_process_compiles_nothing_and_writes_nothing(folder, events, monkeypatch, capsys):
    """As in a new process: nothing is in memory. What is not in the folder is compiled, which is one line."""
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    monkeypatch.setattr(compiled, "_LONG", 0.0)  # every program that is not there is named
    jax.clear_caches()
    assert compiled.use_compiled(folder)
    work(3.0)
    assert all_found(events) and capsys.readouterr().err == ""
    jax.jit(lambda x: x * 3.25 + 1)(2.0)
    line = capsys.readouterr().err
    assert line.startswith(f"{folder}: a program is not among them and was compiled in ") and line.count("\n") == 1
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.slow
def test_a_pipelines_programs(tiny_checkpoint, tmp_path, events, monkeypatch, capsys):
    """Other steps, α, mis, solver and seeds need no program."""
    jax.clear_caches()
    compiled.fill(
        tmp_path / "two", lambda: Pipeline.from_checkpoint(tiny_checkpoint), [2], (32, 32), dict(steps=8, mis=0.5)
    )
    monkeypatch.setattr(compiled, "_LONG", 0.0)
    jax.clear_caches()
    assert compiled.use_compiled(tmp_path / "two")
    events.clear()
    pipeline, progress = Pipeline.from_checkpoint(tiny_checkpoint), lambda done, total: None
    pipeline(make_layout(1), [5], steps=11, mis=0.3, alpha=0.6, sampler="euler", progress=progress)
    pipeline(make_layout(1), [1, 2], steps=9, mis=0.0, progress=progress)
    assert all_found(events) and capsys.readouterr().err == ""


def test_jobs_for_some_rows():
    """Pictures without the multi-instance sampler, a picture with its instances, and a mask."""
    jobs = [(len(layout.instances), images, changed) for layout, images, changed in compiled._jobs([1, 8], (96, 64))]
    assert jobs == [(1, 1, dict(mis=0.0)), (1, 8, dict(mis=0.0)), (7, 1, {}), (1, 1, dict(mis=0.0))]
    layouts = [layout for layout, _, _ in compiled._jobs([1, 31], (96, 64))]
    assert {(layout.width, layout.height) for layout in layouts} == {(96, 64)}
    assert layouts[-1].instances[0].mask.all() and layouts[0].instances[0].mask is None


@pytest.mark.parametrize(
    "key, value, words",
    [
        ("jax", "0.1", "made for jax 0.1, here it is "),
        ("device", "H100", "made for device H100, here it is "),
        ("processor", "another", "made for processor another, here it is "),
        ("driver", "7", "made for driver 7, here it is none"),
    ],
)
def test_another_machines_folder_is_not_used_and_named(folder, tmp_path, capsys, key, value, words):
    note = json.loads((folder / compiled.NOTE).read_text())
    note["machine"][key] = value
    (tmp_path / compiled.NOTE).write_text(json.dumps(signed({name: note[name] for name in ("machine", "files")})))
    cache = jax.config.jax_compilation_cache_dir
    assert not compiled.use_compiled(tmp_path)
    line = capsys.readouterr().err
    assert line.startswith(f"{tmp_path}: not used, programs are compiled: {words}") and line.count("\n") == 1
    assert jax.config.jax_compilation_cache_dir == cache


def test_damaged_and_missing_programs_are_not_used(folder, tmp_path, capsys):
    note = json.loads((folder / compiled.NOTE).read_text())
    first, second, *_ = note["files"]
    for name in note["files"]:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    (tmp_path / compiled.NOTE).write_text(json.dumps(note))
    data = bytearray((tmp_path / first).read_bytes())
    data[len(data) // 2] ^= 1
    (tmp_path / first).write_bytes(data)
    assert not compiled.use_compiled(tmp_path)
    assert f"{first} is damaged" in capsys.readouterr().err
    (tmp_path / second).unlink()
    assert not compiled.use_compiled(tmp_path)
    assert "No such file" in capsys.readouterr().err


def test_what_is_no_such_folder_is_an_error(folder, tmp_path):
    with pytest.raises(InputError, match="compiled.json"):
        compiled.use_compiled(tmp_path)
    (tmp_path / compiled.NOTE).write_text("{}")
    with pytest.raises(InputError, match="expected what instdiff compile writes"):
        compiled.use_compiled(tmp_path)
    note = json.loads((folder / compiled.NOTE).read_text())
    note["machine"]["jax"] = "edited"
    (tmp_path / compiled.NOTE).write_text(json.dumps(note))
    with pytest.raises(InputError, match="damaged or edited"):
        compiled.use_compiled(tmp_path)
    with pytest.raises(InputError, match="--output .*: is there already"):
        compiled.fill(folder, mock.MagicMock(), [1], None, {})


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--rows", "0"], "--rows: expected whole numbers of at least 1"),
        (["--rows", "40"], "--rows: expected at most 31"),
        (["--height", "64"], "--height: expected with --width"),
    ],
)
def test_flags_are_checked(flags, words):
    with pytest.raises(InputError, match=words):
        parse_args(["--output", "x", *flags])
