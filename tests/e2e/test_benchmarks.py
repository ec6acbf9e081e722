"""The benchmarks run and write their tables. No time is asserted."""

import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import make_tiny_checkpoint

from benchmarks import cli, gpu, memory, models, processes, sampling, startup, tables, train_step, unet
from benchmarks.processes import Worker
from benchmarks.tables import Column
from instdiff_jax.errors import InputError

sys.path.append(str(models.ROOT / "docs"))

import make_performance  # noqa: E402

REFERENCE = os.environ.get("INSTDIFF_REFERENCE")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return str(make_tiny_checkpoint(tmp_path_factory.mktemp("model") / "tiny"))


@pytest.fixture
def two_sides(monkeypatch):
    """Our code takes the place of the baseline too."""

    def sides(args, model, dtype):
        return {name: Worker("benchmarks.ours:Ours", model, dtype) for name in ("ours", "official")}

    monkeypatch.setattr(cli, "sides", sides)


def read(folder: Path, name: str) -> list[dict]:
    """The rows of the only table of that name, after checking that its Markdown matches its JSON."""
    (path,) = folder.glob(f"{name}_*.json")
    report = json.loads(path.read_text())
    assert path.with_suffix(".md").read_text() == tables.render(report)
    assert report["machine"]["commit"] and report["machine"]["jax"]
    return report["rows"]


def finite(rows: list[dict], *keys: str) -> bool:
    return bool(rows) and all(math.isfinite(row[key]) and row[key] > 0 for row in rows for key in keys)


def test_a_table_is_what_its_json_says(tmp_path):
    columns = [Column("name", "name"), Column("value", "value", ".2f"), Column("share", "share", ".0%")]
    rows = [dict(name="a", value=1.234, share=0.5), dict(name="b", value=math.nan)]
    tables.write_table(tmp_path, "made", "Made up", columns, rows, ["A note."])
    assert read(tmp_path, "made")[0] == rows[0]
    (path,) = tmp_path.glob("*.md")
    lines = path.read_text().splitlines()
    assert "A note." in lines[0]
    assert lines[2:] == ["| name | value | share |", "| --- | --- | --- |", "| a | 1.23 | 50% |", "| b | – | – |"]


def test_sides_take_turns():
    order = []

    def side(name, times):
        return lambda: order.append(name) or times.pop()

    taken = processes.alternate({"a": side("a", [3.0, 1.0, 2.0]), "b": side("b", [5.0, 5.0, 9.0])}, repeats=3)
    assert order == list("ababab")
    assert taken == {"a": 2.0, "b": 5.0}
    assert processes.alternate({"a": side("a", [4.0, 4.0])}, repeats=2, budget=0.0) == {"a": 4.0}
    assert order == list("abababa")


def test_models_by_name(checkpoint):
    assert models.find_model("full").config.unet.model_channels == 320
    assert models.find_model("small", 256).canvas == 256
    assert models.find_model(checkpoint).canvas == 32  # its pictures, not its maps of 64
    with pytest.raises(InputError, match="--model nothing"):
        models.find_model("nothing")


def test_layouts_stay_on_the_canvas():
    for count in (1, 6, 30):
        layout = models.make_layout(count, 64)
        boxes = np.array([instance.box for instance in layout.instances])
        assert len(boxes) == count
        assert boxes.min() >= 0 and boxes.max() <= 64
        assert len({instance.caption for instance in layout.instances}) == count


def test_the_docs_tables_are_those_of_the_results():
    """`python docs/make_performance.py` was run after the last benchmark."""
    text = make_performance.PAGE.read_text(encoding="utf-8")
    assert make_performance.fill(text) == text
    assert "<!-- table " in text


def test_tables_of_other_machines_have_a_place(tmp_path):
    report = json.loads((tables.RESULTS / "startup_box_float32_cpu.json").read_text())
    for device in ("cpu", "nvidia_h200"):
        report["title"] = f"Of {device}"
        (tmp_path / f"startup_full_bfloat16_{device}.json").write_text(json.dumps(report))
    text = make_performance.fill("a\n<!-- table others -->\n<!-- end -->\nb", tmp_path)
    assert "**Of nvidia_h200**" in text and "Of cpu" not in text
    assert make_performance.fill(text, tmp_path) == text


@pytest.mark.slow
def test_sampling(checkpoint, two_sides, tmp_path):
    flags = ["--model", checkpoint, "--canvas", "32", "--images", "1", "2", "--instances", "2", "--steps", "3"]
    sampling.main([*flags, "--repeats", "1", "--output", str(tmp_path)])
    rows = read(tmp_path, "sampling")
    assert [(row["images"], row["mis"]) for row in rows] == [(1, 0.0), (2, 0.0), (1, 0.36), (2, 0.36)]
    # 2·(S+1) evaluations without the multi-instance sampler, 2·((n+1)·(M+1) + S−M) with M = 1: the grid of 3 has S = 4.
    assert [row["evaluations"] for row in rows] == [10, 10, 18, 18]
    assert finite(rows, "seconds", "per_evaluation", "full_job", "utilisation", "peak", "official_ratio")


@pytest.mark.slow
def test_unet(checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--canvas", "32", "--repeats", "1", "--output", str(tmp_path)]
    unet.main([*flags, "--rows", "1", "2"])
    rows = read(tmp_path, "unet")
    assert finite(rows, "seconds", "plain", "tflops", "utilisation", "peak")
    assert rows[1]["tflops"] == pytest.approx(2 * rows[0]["tflops"])
    parts = {row["part"]: row["seconds"] for row in read(tmp_path, "parts")}
    for name in ("UNet: convolutions", "UNet: projections", "UNet: attention", "UNet: norms", "image: autoencoder"):
        assert parts[name] > 0


@pytest.mark.slow
def test_training_step(checkpoint, two_sides, tmp_path):
    flags = ["--model", checkpoint, "--canvas", "32", "--repeats", "1", "--output", str(tmp_path)]
    train_step.main([*flags, "--batch", "2"])
    assert finite(read(tmp_path, "train_step"), "seconds", "rate", "utilisation", "peak", "official_ratio")


@pytest.mark.slow
def test_startup(checkpoint, tmp_path):
    startup.main(
        ["--model", checkpoint, "--canvas", "32", "--instances", "2", "--steps", "2", "--output", str(tmp_path)]
    )
    rows = read(tmp_path, "startup")
    assert len(rows) == 3
    assert finite(rows, "first", "end", "loading", "sampling", "peak")
    assert all(row["first"] <= row["end"] for row in rows)
    startup.main(["--model", checkpoint, "--loading", "--output", str(tmp_path)])
    rows = read(tmp_path, "loading")
    assert [row["checksums"] for row in rows] == ["compared", "not compared (--no_verify)"]
    assert finite(rows, "size", "seconds", "least", "ratio") and rows[1]["ratio"] == 1


@pytest.mark.slow
def test_memory(checkpoint, tmp_path):
    flags = ["--model", checkpoint, "--canvas", "32", "--dtype", "float32", "--rows", "1", "3"]
    memory.main([*flags, "--output", str(tmp_path)])
    rows = {row["what"]: row for row in read(tmp_path, "memory")}
    assert 0 < rows["loop over 1 rows"]["peak"] < rows["loop over 3 rows"]["peak"]
    assert 0 < rows["16 GB"]["images"] < rows["24 GB"]["images"] < rows["24 GB"]["plain"]


@pytest.mark.slow
@pytest.mark.skipif(not REFERENCE, reason="INSTDIFF_REFERENCE does not name a clone of the official repository")
def test_the_official_code_is_the_baseline(tmp_path):
    flags = ["--model", "tiny", "--repeats", "1", "--reference", REFERENCE, "--output", str(tmp_path)]
    unet.main([*flags, "--rows", "1"])
    (row,) = read(tmp_path, "unet")
    assert finite([row], "official_ratio", "official_peak")
    # The sides hold the same weights and get the same inputs: what is timed is the same function.
    assert row["official_difference"] <= 5e-5
    sampling.main([*flags, "--instances", "1", "--mis", "0.5", "--steps", "2"])
    assert finite(read(tmp_path, "sampling"), "official_ratio", "official_per_evaluation")
    train_step.main([*flags, "--batch", "1"])
    assert finite(read(tmp_path, "train_step"), "official_ratio")


def test_a_side_that_fails_is_left_out_and_named():
    def broken():
        raise RuntimeError("out of memory\nmore")

    failed = {}
    assert processes.alternate({"a": lambda: 1.0, "b": broken}, 2, failed=failed) == {"a": 1.0}
    assert failed == {"b_failed": "RuntimeError: out of memory"}
    with pytest.raises(RuntimeError):
        processes.alternate({"b": broken}, 2)


@pytest.mark.parametrize("module", [memory, startup])
def test_flags_that_would_do_nothing_are_refused(module):
    with pytest.raises(InputError, match="--repeats: this benchmark has no baseline"):
        module.parse_args(["--repeats", "7"])


def run_dry(tmp_path, *flags: str) -> dict:
    gpu.main(["--dry", "--output", str(tmp_path / "out"), *flags])
    rows = json.loads((tmp_path / "out" / "gpu.json").read_text())["rows"]
    assert {name: (row["state"], row["log"]) for name, row in rows.items() if row["state"] != "done"} == {}
    return rows


def test_a_dry_run_finds_the_kernels(tmp_path):
    """The whole way of one row: its process and its worker's, the profiler, both files."""
    rows = run_dry(tmp_path, "--model", "tiny", "--minutes", "3", "--rows", "kernels")
    (raw,) = rows["kernels"]["raw"]
    assert 3 <= len(raw["kernels"]) <= 15 and raw["milliseconds"] > 0
    assert sum(kernel["share"] for kernel in raw["kernels"]) <= 1 + 1e-6
    assert [k["milliseconds"] for k in raw["kernels"]] == sorted(
        (k["milliseconds"] for k in raw["kernels"]), reverse=True
    )
    assert rows["kernels"]["machine"]["jax"]


@pytest.mark.slow
def test_a_dry_run_of_all_rows(tmp_path):
    flags = ["--reference", REFERENCE] if REFERENCE else []
    rows = run_dry(tmp_path, "--model", "tiny", "--minutes", "30", *flags)
    assert list(rows) == [row.name for row in gpu.ROWS]
    assert all(row["lines"] for row in rows.values())
