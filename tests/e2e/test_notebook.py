"""notebooks/tpu_quickstart.ipynb: the cells that a user runs, in order, on the small model and a CPU."""

import json
import os
import sys

from common import ROOT
from instdiff_jax.cli import build_coco, sample
from instdiff_jax.cli.config_flags import read_settings
from instdiff_jax.training.settings import RunSettings

NOTEBOOK = ROOT / "notebooks" / "tpu_quickstart.ipynb"


def test_the_cells_of_the_quickstart_run_in_order(tmp_path, monkeypatch, capsys):
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    # Nothing of an earlier run is kept in it.
    assert not any(cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(ROOT)
    environment = dict(INSTDIFF_SMALL="1", INSTDIFF_WORK=str(tmp_path / "work"), JAX_PLATFORMS="cpu")
    # Its programs run for seconds.
    environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".pytest_cache" / "xla")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    names: dict = {}
    for number, cell in enumerate(cells):
        exec(compile(cell, f"{NOTEBOOK.name}, code cell {number}", "exec"), names)
    work = tmp_path / "work"
    said = capsys.readouterr().out
    assert "trained to step 2" in said and "val2017: 4 images" in said
    for folder in ("before", "after"):
        assert {"contact_sheet.png", "run.json", "boxes_pair"} <= set(os.listdir(work / folder))
    assert (work / "before" / "boxes_pair" / "0.png").read_bytes() != (
        work / "after" / "boxes_pair" / "0.png"
    ).read_bytes()


def test_the_flags_of_the_full_run_exist(tmp_path, monkeypatch):
    """The branch that the small run does not take, on a TPU of 8 chips, up to its commands."""
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    sources = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    calls: list[list[str]] = []
    names: dict = {}
    (tmp_path / "instdiff_jax").mkdir()  # as if it had been cloned
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("INSTDIFF_SMALL", raising=False)
    for number, source in enumerate(sources):
        if "Image.open" not in source:
            exec(source, names)
        if number == 0:
            names.update(run=lambda *words: calls.append([str(word) for word in words]) or "8")
    monkeypatch.chdir(ROOT)
    assert [words[0] for words in calls if words[0] != sys.executable] == [
        "git",
        "wget",
        "unzip",
        "wget",
        "unzip",
    ]
    ours = [words[1:] for words in calls if words[0] == sys.executable]
    (trained,) = [words[1:] for words in ours if words[0] == "train.py"]
    run, rest = read_settings(trained, RunSettings)
    assert rest == ["--workdir=work/run"] and run.train.batch_size == 32 and run.parallel.fsdp == 8
    assert [sample.parse_args(words[1:]).steps for words in ours if words[0] == "sample.py"] == [50, 50]
    (built,) = [words[3:] for words in ours if words[:3] == ["-m", "instdiff_jax", "build-coco"]]
    assert build_coco.parse_args(built).splits == run.data.train_split
    (converted,) = [words[3:] for words in ours if words[:3] == ["-m", "instdiff_jax", "convert"]]
    assert converted == ["--input", "instancediffusion_sd15.pth", "--output", "work/sd15"]
