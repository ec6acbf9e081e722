"""The study of the paper's tables: its command in a reduced run, resuming, bad input, and which tasks there are."""

import dataclasses
import json

import numpy as np
import pytest
from tiny_checkpoint import SIDE, make_tiny_checkpoint, make_tiny_segmenter

from instdiff_jax.config import SamplingConfig
from instdiff_jax.evaluation import generate
from instdiff_jax.evaluation.files import image_path, write_image
from projects.common.study import command as study_command
from projects.common.study import cost as study_cost
from projects.common.study.results import make_targets
from projects.common.study.rows import Row, Task
from projects.common.study.runs import Study, StudySettings
from projects.common.study.sections import SECTIONS, Sizes, make_sections, make_tasks
from projects.shapes.study import SUBJECT, main

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("study")
    return make_tiny_checkpoint(root / "checkpoint"), make_tiny_segmenter(root / "segmenter")


def study(folders, root, *flags):
    checkpoint, segmenter = folders
    argv = ["--checkpoint", checkpoint, "--segmenter", segmenter, "--workdir", root / "work", "--docs", root / "docs"]
    sizes = {"size": SIDE, "count": 2, "seeds": 1, "small_count": 2, "small_seeds": 1, "reference_count": 3, "steps": 3}
    given = [text for name, value in sizes.items() if f"--{name}" not in flags for text in (f"--{name}", value)]
    main([str(part) for part in [*argv, *given, *flags]])
    return json.loads((root / "docs" / "results.json").read_text())


def image_times(root):
    return {path: path.stat().st_mtime_ns for path in (root / "work" / "pictures").rglob("*.png")}


# ---------------------------------------------------------------- the command


def test_a_reduced_run_and_its_resuming(folders, tmp_path, monkeypatch, capsys):
    sections, made = "formats,baselines,mis", []

    def write(path, pixels, whole=generate.write_image):
        if len(made) == 7:
            raise KeyboardInterrupt
        whole(path, pixels)
        made.append(path)

    # Killed in the middle of a row: the finished images stay.
    monkeypatch.setattr(generate, "write_image", write)
    with pytest.raises(KeyboardInterrupt):
        study(folders, tmp_path, "--sections", sections)
    monkeypatch.undo()
    first = image_times(tmp_path)
    assert set(first) == set(made)

    results = study(folders, tmp_path, "--sections", sections)
    done = image_times(tmp_path)
    assert first.items() <= done.items(), "images were made again"
    own = SamplingConfig.from_dict(results["made"]["sampling"])
    tasks = make_tasks(make_sections(SUBJECT, sections.split(",")), Sizes(2, 1, 2, 1), own)
    assert len(done) == 2 * len(tasks)
    assert all(row["seeds"] == 1 and row["metrics"] for table in results["tables"].values() for row in table["rows"])
    assert len(results["targets"]) == len(make_targets(SUBJECT.goals)) and results["comparisons"]
    text = (tmp_path / "docs" / "results.md").read_text()
    # (A share of an upper bound of zero, which so small a detector may have, reads "not measured".)
    assert "--sections formats,baselines,mis" in text
    for name in results["tables"]:
        assert SECTIONS[name].title in text
    assert (tmp_path / "docs" / "figures" / "results_mis.png").read_bytes().startswith(b"\x89PNG")

    # Nothing is missing, so nothing is generated or measured, and the numbers are the same.
    with monkeypatch.context() as patch:
        patch.setattr("projects.common.study.runs.Pipeline", None)
        patch.setattr("projects.common.study.runs.inspect", None)
        again = study(folders, tmp_path, "--sections", sections)
    assert image_times(tmp_path) == done and again["tables"] == results["tables"]

    # A second seed adds its images; the numbers of the first stay.
    more = study(folders, tmp_path, "--sections", "baselines", "--seeds", 2)
    assert done.items() <= image_times(tmp_path).items()
    for before, after in zip(results["tables"]["baselines"]["rows"], more["tables"]["baselines"]["rows"], strict=True):
        assert after["seeds"] == (1 if before["settings"]["pictures"] == "real" else 2)
        assert after["metrics"]["FID"]["by_seed"][0] == before["metrics"]["FID"]["mean"]

    # No time left: the page shows what is measured, and says what is not.
    capsys.readouterr()
    short = study(folders, tmp_path, "--sections", "formats,leakage", "--minutes", 0)
    assert "--minutes 0 are over" in capsys.readouterr().err
    assert short["tables"]["formats"] == results["tables"]["formats"]
    assert not any(row["seeds"] for row in short["tables"]["leakage"]["rows"])
    assert "not measured" in (tmp_path / "docs" / "results.md").read_text()


@pytest.mark.slow
def test_a_reduced_run_of_everything(folders, tmp_path):
    results = study(folders, tmp_path)
    assert set(results["tables"]) == set(SECTIONS)
    assert all(row["seeds"] == 1 for table in results["tables"].values() for row in table["rows"])
    parts = {part["part"]: part for part in results["cost"]["parts"]}
    pieces = [part for part in parts.values() if "evaluations" in part]
    # With guidance. The grid of --steps 3 has 4 steps: 2 of MIS with 5 rows, and PLMS evaluates twice in the first.
    assert sum(part["evaluations"] for part in pieces) == 2 * (5 * 3 + 2)
    assert all(part["seconds"] > 0 for part in parts.values())
    assert all(part["gflop"] > 0 and part["temporary_mb"] > 0 for part in pieces)
    assert "not measured" not in (tmp_path / "docs" / "results.md").read_text().lower()
    assert all({"UNets", "speedup", "distance"} <= set(row["metrics"]) for row in results["tables"]["fewer"]["rows"])
    for name in ("leakage", "instances", "alpha", "mis", "guidance", "solvers"):
        assert (tmp_path / "docs" / "figures" / f"results_{name}.png").exists()


def test_bad_input_is_one_line(folders, tmp_path, capsys):
    checkpoint, segmenter = folders
    good = {"checkpoint": checkpoint, "segmenter": segmenter, "workdir": tmp_path / "work", "docs": tmp_path / "docs"}
    good |= dict.fromkeys(("count", "small_count", "reference_count"), 2)
    for bad, message in (
        ({"sections": "formats,speed"}, "--sections: expected some of formats, "),
        ({"sections": ","}, "got none"),
        ({"count": 1}, "--count: expected a number of at least 2, got 1"),
        ({"checkpoint": tmp_path / "none"}, f"{tmp_path / 'none'}"),
        ({"segmenter": tmp_path / "none"}, "config.json: cannot be read"),
        ({"size": 44, "sections": "formats"}, "expected sides that are multiples of 8 pixels"),
        # Another workdir, as the scenes of 44 pixels exist by now.
        (
            {"size": 42, "sections": "mis", "workdir": tmp_path / "other"},
            "width: expected a multiple of 4 pixels, got 42",
        ),
    ):
        flags = [str(part) for name, value in (good | bad).items() for part in (f"--{name}", value)]
        with pytest.raises(SystemExit) as stop:
            main(flags)
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "docs").exists()


# ---------------------------------------------------------------- what is to be done


OWN = SamplingConfig(steps=20, sampler="dpm++", guidance_scale=4.0, alpha=(0.75, 0.0, 0.25), mis=0.36)


def test_the_order_of_tasks():
    tasks = make_tasks(make_sections(SUBJECT), Sizes(500, 3, 100, 2), OWN)
    seeds = [task.seed for task in tasks.values()]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    assert [task.row.label for task in tasks.values()][:2] == ["real images", "box"]
    assert all(task.seed == 0 for task in tasks.values() if task.row.source == "real")
    # The row with the checkpoint's own settings is in every sweep, but is measured once.
    assert [key for key, task in tasks.items() if key[0] == "main-box" and task.seed == 0 and task.count == 100] == [
        ("main-box", 0, 100)
    ]


def test_slugs_are_unique():
    rows = {row.slug(OWN): row for section in make_sections(SUBJECT).values() for row in section.rows}
    made = {(row.scenes, row.source, row.format, row.drop, row.scaleu, row.settings(OWN)) for row in rows.values()}
    assert len(made) == len(rows)
    assert Row("x", sampling={"mis": 0.36}).slug(OWN) == "main-box" != Row("x", sampling={"mis": 0.0}).slug(OWN)


@pytest.mark.parametrize("mis", [0.0, 0.25])
def test_mis_is_on_where_a_row_says_so(mis):
    """Also with a checkpoint whose own settings have it off."""
    own = dataclasses.replace(OWN, mis=mis)
    fractions = {row.label: row.settings(own).mis for row in SECTIONS["leakage"].rows}
    assert fractions["MIS alone"] == fractions["MIS and masked attention"] == (mis or 0.36)
    assert fractions["neither"] == fractions["masked attention alone"] == 0.0


def test_what_options_cost(folders, tmp_path):
    """An evaluation that reuses features counts as its fraction of FLOPs; distance is that of pixels."""
    study = Study(StudySettings(*folders, tmp_path, SIDE, 2, "float32"), SUBJECT)
    rows = {row.label: row for row in SECTIONS["fewer"].rows}
    tasks = {label: Task(row, 0, 2) for label, row in rows.items()}
    keys = {label: (row.slug(study.sampling), 0, 2) for label, row in rows.items()}
    assert len(set(keys.values())) == len(rows)
    costs = {label: study_cost.option_costs(study, task, {}) for label, task in tasks.items()}
    # 20 steps with guidance, 7 of them for 5 rows; 50, and 18 of them.
    whole = 2 * (7 * 5 + 13)
    fifty = 2 * (18 * 5 + 32)
    assert costs["all of it"] == {"UNets": whole, "speedup": fifty / whole}
    assert costs["50 steps"] == {"UNets": fifty, "speedup": 1} and costs["no MIS"]["UNets"] == 2 * 20
    share = study_cost.finish_share(study.config, SIDE)
    assert 0.05 < share < 0.5
    # 4 of 7 evaluations are whole; of the others fusers are on for 8: 4 of those and 3 of the last 5.
    fresh = 2 * (4 * 5 + (4 + 3))
    assert costs["features reused once"]["UNets"] == pytest.approx(fresh + (whole - fresh) * share)

    for label, value in (("50 steps", 10), ("15 steps", 13)):
        for scene in study.split("main", 2).scenes:
            pixels = np.full((SIDE, SIDE, 3), value, np.uint8)
            write_image(image_path(study.folder(tasks[label]), scene), pixels)
    there = {keys["50 steps"]: {}}
    assert study_cost.option_costs(study, tasks["15 steps"], there)["distance"] == 3
    assert study_cost.option_costs(study, tasks["50 steps"], there)["distance"] == 0


def test_scenes_are_held_out():
    seeds = [seed for kind in SUBJECT.scenes.values() for seed in (kind.seed, kind.reference_seed)]
    assert len(set(seeds)) == len(seeds) and not {*range(10)} & set(seeds)


@pytest.mark.parametrize("flags", [["--minutes", "5"], ["--minutes=5"]])
def test_the_page_names_a_command_that_makes_all_of_it(monkeypatch, flags):
    """It leaves --minutes out."""
    said = []
    monkeypatch.setattr(study_command, "run", lambda args, command, find: said.append((args.minutes, command)))
    main(["--docs", "a b", *flags, "--count", "9"])
    assert said == [(5.0, "python -m projects.shapes.study --docs 'a b' --count 9")]
