"""notebooks/tpu_quickstart.ipynb: the cells that a user runs, in order, on the small model and a CPU."""

import json
import os

from common import ROOT

NOTEBOOK = ROOT / "notebooks" / "tpu_quickstart.ipynb"


def test_the_cells_of_the_quickstart_run_in_order(tmp_path, monkeypatch, capsys):
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert book["nbformat"] == 4
    cells = ["".join(cell["source"]) for cell in book["cells"] if cell["cell_type"] == "code"]
    # Nothing of an earlier run is kept in it.
    assert not any(cell["outputs"] for cell in book["cells"] if cell["cell_type"] == "code")
    monkeypatch.chdir(ROOT)
    environment = dict(INSTDIFF_SMALL="1", INSTDIFF_WORK=str(tmp_path / "work"), JAX_PLATFORMS="cpu")
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


def test_the_settings_of_the_full_run_exist():
    """What the small run does not reach: the flags of the other branch, on a TPU of 8 chips."""
    from instdiff_jax.cli import convert, sample
    from instdiff_jax.cli.config_flags import read_settings
    from instdiff_jax.training.settings import RunSettings

    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    calls: list[list[str]] = []
    names: dict = {}
    for cell in book["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] != "code" or source.startswith(("from PIL", "Image.open")):
            continue
        if "def run(" in source:
            exec(source, names)
            names.update(SMALL=False, WORK="work", run=lambda *words: calls.append(list(map(str, words))) or "8")
            # Cells call python(), which calls run().
        else:
            exec(source.replace("os.makedirs(", "str("), names)
    ours = [words[1:] for words in calls if words[0] == names["sys"].executable]
    (trained,) = [words[1:] for words in ours if words[0] == "train.py"]
    run, rest = read_settings(trained, RunSettings)
    assert rest == ["--workdir=work/run"] and run.train.batch_size == 32 and run.parallel.fsdp == 8
    for words in ours:
        if words[0] == "sample.py":
            assert sample.parse_args(words[1:]).steps == 50
    (converted,) = [words for words in ours if words[:3] == ["-m", "instdiff_jax", "convert"]]
    assert read_settings  # the converter reads its own flags
    assert converted[3:] == ["--input", "instancediffusion_sd15.pth", "--output", "work/sd15"] and convert.main
    assert any(words[0] == "wget" for words in calls)
