"""The study of the paper's tables: a reduced run of its command, resuming, bad input, and what its page says."""

import dataclasses
import json
import types
import zlib

import jax
import numpy as np
import pytest
from tiny_checkpoint import SIDE, make_tiny_checkpoint, make_tiny_segmenter

from instdiff_jax.config import SamplingConfig
from instdiff_jax.evaluation import generate
from instdiff_jax.evaluation.files import picture_path, write_picture
from projects.shapes.study import __main__ as study_command
from projects.shapes.study import cost as study_cost
from projects.shapes.study.__main__ import main
from projects.shapes.study.report import page, write_study
from projects.shapes.study.results import TARGETS, make_results, paired_difference
from projects.shapes.study.rows import NAMES, SCENES, SECTIONS, Row, Sizes, Task, make_tasks
from projects.shapes.study.runs import Study


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The programs here run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


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


def pictures(root):
    return {path: path.stat().st_mtime_ns for path in (root / "work" / "pictures").rglob("*.png")}


# ---------------------------------------------------------------- the command


def test_a_reduced_run_and_its_resuming(folders, tmp_path, monkeypatch, capsys):
    sections, made = "formats,baselines,mis", []

    def write(path, pixels, whole=generate.write_picture):
        if len(made) == 7:
            raise KeyboardInterrupt
        whole(path, pixels)
        made.append(path)

    # Killed in the middle of a row: what is done stays.
    monkeypatch.setattr(generate, "write_picture", write)
    with pytest.raises(KeyboardInterrupt):
        study(folders, tmp_path, "--sections", sections)
    monkeypatch.undo()
    first = pictures(tmp_path)
    assert set(first) == set(made)

    results = study(folders, tmp_path, "--sections", sections)
    done = pictures(tmp_path)
    assert first.items() <= done.items(), "pictures were made again"
    own = SamplingConfig.from_dict(results["made"]["sampling"])
    tasks = make_tasks(sections.split(","), Sizes(2, 1, 2, 1), own)
    assert len(done) == 2 * len(tasks)
    assert all(row["seeds"] == 1 and row["metrics"] for table in results["tables"].values() for row in table["rows"])
    assert len(results["targets"]) == len(TARGETS) and results["comparisons"]
    text = (tmp_path / "docs" / "results.md").read_text()
    # (A share of an upper bound of zero, which so small a detector may have, reads "not measured".)
    assert "--sections formats,baselines,mis" in text
    for name in results["tables"]:
        assert SECTIONS[name].title in text
    assert (tmp_path / "docs" / "figures" / "results_mis.png").read_bytes().startswith(b"\x89PNG")

    # All is there: nothing is drawn or measured, and the numbers are the same.
    with monkeypatch.context() as patch:
        patch.setattr("projects.shapes.study.runs.Pipeline", None)
        patch.setattr("projects.shapes.study.runs.inspect", None)
        again = study(folders, tmp_path, "--sections", sections)
    assert pictures(tmp_path) == done and again["tables"] == results["tables"]

    # A second seed adds its own pictures; the first one's numbers stay.
    more = study(folders, tmp_path, "--sections", "baselines", "--seeds", 2)
    assert done.items() <= pictures(tmp_path).items()
    for before, after in zip(results["tables"]["baselines"]["rows"], more["tables"]["baselines"]["rows"], strict=True):
        assert after["seeds"] == (1 if before["settings"]["pictures"] == "real" else 2)
        assert after["metrics"]["FID"]["by_seed"][0] == before["metrics"]["FID"]["mean"]

    # No time left: what there is, is shown, and the rest is said to be missing.
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
    # With guidance: the first of 3 steps is MIS's, for 5 rows, and PLMS evaluates twice in it.
    assert sum(part["evaluations"] for part in pieces) == 2 * (5 * 2 + 2)
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
        # Elsewhere: the scenes of 44 pixels are there by now.
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
    tasks = make_tasks(list(NAMES), Sizes(500, 3, 100, 2), OWN)
    seeds = [task.seed for task in tasks.values()]
    assert seeds == sorted(seeds) and set(seeds) == {0, 1, 2}
    assert [task.row.label for task in tasks.values()][:2] == ["real images", "box"]
    assert all(task.seed == 0 for task in tasks.values() if task.row.pictures == "real")
    # The row that every sweep passes through is drawn once, with the checkpoint's own settings.
    assert [key for key, task in tasks.items() if key[0] == "main-box" and task.seed == 0 and task.count == 100] == [
        ("main-box", 0, 100)
    ]


def test_slugs_tell_pictures_apart():
    rows = {row.slug(OWN): row for section in SECTIONS.values() for row in section.rows}
    made = {(row.scenes, row.pictures, row.format, row.drop, row.scaleu, row.settings(OWN)) for row in rows.values()}
    assert len(made) == len(rows)
    assert Row("x", sampling={"mis": 0.36}).slug(OWN) == "main-box" != Row("x", sampling={"mis": 0.0}).slug(OWN)


@pytest.mark.parametrize("mis", [0.0, 0.25])
def test_mis_is_on_where_a_row_says_so(mis):
    """Also with a checkpoint that leaves it out by itself."""
    own = dataclasses.replace(OWN, mis=mis)
    fractions = {row.label: row.settings(own).mis for row in SECTIONS["leakage"].rows}
    assert fractions["MIS alone"] == fractions["MIS and masked attention"] == (mis or 0.36)
    assert fractions["neither"] == fractions["masked attention alone"] == 0.0


def test_what_options_cost(folders, tmp_path):
    """Evaluations as they are counted; one that reuses features counts as its share. Distance: of pixels."""
    study = Study(*folders, tmp_path, SIDE, 2, "float32")
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
            write_picture(picture_path(study.folder(tasks[label]), scene), pixels)
    there = {keys["50 steps"]: {}}
    assert study_cost.option_costs(study, tasks["15 steps"], there)["distance"] == 3
    assert study_cost.option_costs(study, tasks["50 steps"], there)["distance"] == 0


def test_scenes_are_held_out():
    seeds = [seed for kind in SCENES.values() for seed in (kind.seed, kind.reference_seed)]
    assert len(set(seeds)) == len(seeds) and not {*range(10)} & set(seeds)


# ---------------------------------------------------------------- what is made of the numbers


def numbers_of(tasks, accuracy):
    """Numbers as a study measures them, where `accuracy` says of a task how many of 4 instances are right."""
    made = {}
    for key, task in tasks.items():
        # Of its own: what other tasks there are changes nothing.
        rng = np.random.default_rng(zlib.crc32(repr(key).encode()))
        right = np.clip(np.round(accuracy(task) + rng.normal(0, 0.3, task.count)), 0, 4)
        share = float(right.mean() / 4)
        sums = ("found", "mask_IoU", "PiM_point", "PiM_scribble", "colour_accuracy", "texture_accuracy")
        names = ("box_AP", "box_AP50", "box_AR", "mask_AP", "mask_AP50", "colour_leak", *sums)
        metrics = dict.fromkeys(names, share)
        pictures = [{"instances": 4} | dict.fromkeys(sums, value) for value in right]
        made[key] = {"metrics": metrics | {"FID": 2 - share, "images": task.count}, "of_picture": pictures}
    return made


def results_of(accuracy, sizes=Sizes(40, 2, 40, 2), keep=lambda task: True, own=OWN):
    made = types.SimpleNamespace(
        sampling=own, fingerprint="f", size=64, dtype="float32", segmenter="s", reference_count=3
    )
    tasks = {key: task for key, task in make_tasks(list(NAMES), sizes, own).items() if keep(task)}
    cost = {"pictures": 2, "instances": 4, "parts": [{"part": "decoding", "seconds": 0.1, "gflop": 1.0}], "key": {}}
    return make_results(made, list(NAMES), sizes, numbers_of(tasks, accuracy), cost, "python -m command")


def right_of(task):
    """Real images 3.9 of 4, the model's own way 3.5, without MIS 2.5, with masked attention 3, the rest 3.5."""
    row = task.row
    if row.pictures == "real":
        return 3.9
    if len(row.drop) == 4:
        return 0.5
    if row.sampling.get("masked_attention") == "on":
        return 3
    return 2.5 if row.sampling.get("mis") == 0.0 else 3.5


def test_the_page_says_what_the_numbers_do():
    results = results_of(right_of)
    verdicts = {
        (item["claim"], line["metric"]): line["verdict"] for item in results["comparisons"] for line in item["lines"]
    }
    assert verdicts["MIS helps on other scenes", "found"] == "higher"
    assert verdicts["masked attention helps on other scenes", "colour_accuracy"] == "lower"
    assert verdicts["ScaleU helps", "found"] == "no clear difference"
    text = page(results, [])
    agree, differ, chance = (
        next(line for line in text.splitlines() if start in line).partition(start)[2]
        for start in ("As in the paper:", "Other than in the paper:", "Not to be told from chance here:")
    )
    assert "“MIS helps on other scenes”" in agree.partition("Other than")[0]
    assert "“masked attention helps on other scenes” (with it found, colour accuracy and texture accuracy are" in differ
    assert "“ScaleU helps”" in chance
    assert "python -m command" in text and "| decoding | 0.100 | – | 1.00 | – |" in text


def test_targets_follow_from_the_numbers():
    reached = {item["target"]: item for item in results_of(right_of)["targets"]}
    share = reached["box AP50, share of the upper bound"]
    assert share["share"] == pytest.approx(share["value"] / share["upper_bound"]) and share["reached"] is True
    assert share["GLIGEN_like"] < share["value"] and share["caption_alone"] < share["GLIGEN_like"]
    low = results_of(lambda task: 3.9 if task.row.pictures == "real" else 2)["targets"]
    assert [item["reached"] for item in low] == [False] * len(TARGETS)
    assert page(results_of(lambda task: 2), []).count("| no, nor do real images |") == 3
    nothing = results_of(right_of, keep=lambda task: False)
    assert all(item["reached"] is None for item in nothing["targets"])
    assert page(nothing, []).count("Not measured.") == len(SECTIONS) + 1


@pytest.mark.parametrize("own", ["none", "correct", "strict"])
def test_what_the_checkpoint_does_by_itself_is_one_row(own):
    """Whether it samples with masked attention or without, tables have each kind of picture once, and all claims do."""
    results = results_of(right_of, own=dataclasses.replace(OWN, masked_attention=own))
    for table in results["tables"].values():
        kinds = [json.dumps(row["settings"], sort_keys=True) for row in table["rows"]]
        assert len(set(kinds)) == len(kinds) and all(row["seeds"] for row in table["rows"])
    assert len(results["tables"]["ablations"]["rows"]) == len(SECTIONS["ablations"].rows) - 4
    assert all(item["lines"] for item in results["comparisons"])


def test_means_and_spreads():
    row = results_of(right_of)["tables"]["formats"]["rows"][1]
    colour = row["metrics"]["colour_accuracy"]
    assert row["seeds"] == 2 and colour["mean"] == pytest.approx(np.mean(colour["by_seed"]))
    assert (colour["low"], colour["high"]) == (min(colour["by_seed"]), max(colour["by_seed"]))


def test_paired_differences_by_hand():
    """Two scenes of 2 and 6 instances: 1 and 3 more are right, so half an instance each; the error is 0."""
    without = [{"of_picture": [{"instances": 2, "found": 1}, {"instances": 6, "found": 2}]}]
    with_it = [{"of_picture": [{"instances": 2, "found": 2}, {"instances": 6, "found": 5}]}]
    assert paired_difference(with_it, without, "found") == pytest.approx((7 / 8, 3 / 8, 0.5, 0.0))
    uneven = [{"of_picture": [{"instances": 4, "found": 4}, {"instances": 4, "found": 0}]}]
    nothing = [{"of_picture": [{"instances": 4, "found": 0}, {"instances": 4, "found": 0}]}]
    # Shares of 1 and 0: a mean of 1/2 with a deviation of √½, over √2 scenes.
    assert paired_difference(uneven, nothing, "found") == pytest.approx((0.5, 0, 0.5, 0.5))


def test_results_are_written_whole(tmp_path):
    results = results_of(right_of)
    write_study(results, tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["tables"]["mis"] == json.loads(
        json.dumps(results["tables"]["mis"])
    )
    text = (tmp_path / "results.md").read_text()
    figures = {path.name for path in (tmp_path / "figures").iterdir()}
    assert figures and all(f"(figures/{name})" in text for name in figures)
    before = (tmp_path / "figures" / "results_mis.png").read_bytes()
    write_study(results, tmp_path)
    assert (tmp_path / "figures" / "results_mis.png").read_bytes() == before


def test_a_cost_of_other_settings_or_another_machine_is_measured_again(tmp_path, monkeypatch):
    made = types.SimpleNamespace(
        sampling=OWN, fingerprint="f", size=64, dtype="float32", workdir=tmp_path, max_rows=None
    )
    path, key = study_cost.cost_file(made)
    path.parent.mkdir()
    path.write_text(json.dumps({"key": key, "parts": []}))
    assert study_cost.known_cost(made) == {"key": key, "parts": []}
    for name, other in (("size", 128), ("dtype", "bfloat16"), ("fingerprint", "g"), ("max_rows", 4)):
        changed = types.SimpleNamespace(**vars(made) | {name: other})
        assert study_cost.known_cost(changed) is None
    for kind, count in (("TPU v4", 1), ("TPU v5 lite", 1), ("TPU v5 lite", 4)):
        device = types.SimpleNamespace(platform="tpu", device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda device=device, count=count: [device] * count)
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        assert study_cost.known_cost(made) is None
        path.write_text(json.dumps({"key": study_cost.cost_file(made)[1], "parts": []}))
        assert study_cost.known_cost(made) is not None


@pytest.mark.parametrize("flags", [["--minutes", "5"], ["--minutes=5"]])
def test_the_page_names_a_command_that_makes_all_of_it(monkeypatch, flags):
    """How long one run may draw is no part of it."""
    said = []
    monkeypatch.setattr(study_command, "run", lambda args, command: said.append((args.minutes, command)))
    main(["--docs", "a b", *flags, "--count", "9"])
    assert said == [(5.0, "python -m projects.shapes.study --docs 'a b' --count 9")]
