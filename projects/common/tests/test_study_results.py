"""The study's results: tables, comparisons, targets, and the page and files that are made of them."""

import dataclasses
import json
import types
import zlib
from pathlib import Path

import jax
import numpy as np
import pytest

from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from projects.common.study import cost as study_cost
from projects.common.study.report import half_interval, merge_tables, page, show_metric, write_study
from projects.common.study.results import make_results, make_targets, paired_difference
from projects.common.study.runs import StudySettings
from projects.common.study.sections import NAMES, SECTIONS, Sizes, make_sections, make_tasks
from projects.shapes.study import SUBJECT

DOCS = Path(__file__).parents[3] / "docs"
OWN = SamplingConfig(steps=20, sampler="dpm++", guidance_scale=4.0, alpha=(0.75, 0.0, 0.25), mis=0.36)


def numbers_of(tasks, accuracy):
    """Made-up numbers of tasks; `accuracy` gives how many of 4 instances of a task are right."""
    made = {}
    for key, task in tasks.items():
        # Of its own: what other tasks there are changes nothing.
        rng = np.random.default_rng(zlib.crc32(repr(key).encode()))
        right = np.clip(np.round(accuracy(task) + rng.normal(0, 0.3, task.count)), 0, 4)
        share = float(right.mean() / 4)
        sums = ("found", "mask_IoU", "PiM_point", "PiM_scribble", "colour_accuracy", "texture_accuracy")
        names = ("box_AP", "box_AP50", "box_AR", "mask_AP", "mask_AP50", "colour_leak", *sums)
        metrics = dict.fromkeys(names, share)
        images = [{"instances": 4} | dict.fromkeys(sums, value) for value in right]
        made[key] = {"metrics": metrics | {"FID": 2 - share, "images": task.count}, "of_picture": images}
    return made


def results_of(accuracy, sizes=Sizes(40, 2, 40, 2), keep=lambda task: True, own=OWN):
    settings = StudySettings(Path("c"), Path("d"), Path("w"), size=64, reference_count=3, dtype="float32")
    made = types.SimpleNamespace(settings=settings, sampling=own, fingerprint="f", segmenter="s")
    made.subject, made.scenes = SUBJECT, SUBJECT.scenes
    tasks = {key: task for key, task in make_tasks(make_sections(SUBJECT), sizes, own).items() if keep(task)}
    cost = {"pictures": 2, "instances": 4, "parts": [{"part": "decoding", "seconds": 0.1, "gflop": 1.0}], "key": {}}
    return make_results(made, list(NAMES), sizes, numbers_of(tasks, accuracy), cost, "python -m command")


def right_of(task):
    """3.9 of 4 for real images, 2.5 without MIS, 3 with masked attention, otherwise 3.5."""
    row = task.row
    if row.source == "real":
        return 3.9
    if len(row.drop) == 4:
        return 0.5
    if row.sampling.get("masked_attention") == "on":
        return 3
    return 2.5 if row.sampling.get("mis") == 0.0 else 3.5


def test_the_page_follows_the_numbers():
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
        for start in ("In agreement with the paper:", "In contrast to the paper:", "Not statistically significant:")
    )
    assert "“MIS helps on other scenes”" in agree.partition("In contrast")[0]
    assert "“masked attention helps on other scenes” (found, colour accuracy and texture accuracy are" in differ
    assert "“ScaleU helps”" in chance
    assert "python -m command" in text and "| decoding | 0.100 | – | 1.00 | – |" in text


def test_targets_follow_from_the_numbers():
    reached = {item["target"]: item for item in results_of(right_of)["targets"]}
    share = reached["box AP50, share of the upper bound"]
    assert share["share"] == pytest.approx(share["value"] / share["upper_bound"]) and share["reached"] is True
    assert share["GLIGEN_like"] < share["value"] and share["caption_alone"] < share["GLIGEN_like"]
    low = results_of(lambda task: 3.9 if task.row.source == "real" else 2)["targets"]
    assert [item["reached"] for item in low] == [False] * len(make_targets(SUBJECT.goals))
    assert page(results_of(lambda task: 2), []).count("| no; nor by real images |") == 3
    nothing = results_of(right_of, keep=lambda task: False)
    assert all(item["reached"] is None for item in nothing["targets"])
    assert page(nothing, []).count("Not measured.") == len(SECTIONS) + 1


@pytest.mark.parametrize("own", ["none", "correct", "strict"])
def test_no_table_has_equal_rows(own):
    """With masked attention on or off in the checkpoint, no table has equal rows, and all claims have numbers."""
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


def test_confidence_intervals_by_hand():
    """Student's t for 95%: 12.7062 with two seeds, 4.3027 with three (any table of it)."""
    assert half_interval([0.4, 0.5]) == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert half_interval([0.4, 0.5, 0.6]) == pytest.approx(4.30265 * 0.1 / np.sqrt(3), rel=1e-5)
    one = {"mean": 0.4, "by_seed": [0.4]}
    assert show_metric("box_AP", one) == "40.0", "one seed has no interval"
    assert show_metric("box_AP", {"mean": 0.45, "by_seed": [0.5, 0.4]}) == "45.0 ± 5.0", "half the range of two"
    assert show_metric("box_AP", {"mean": 0.5, "by_seed": [0.4, 0.5, 0.6]}) == "50.0 ± 24.8"


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


def test_tables_of_another_run_say_where_they_come_from():
    results, other = results_of(right_of), results_of(right_of, sizes=Sizes(40, 2, 24, 1))
    other["made"] |= {"command": "python -m other", "machine": other["made"]["machine"] | {"device": "another one"}}
    other["tables"] = {"solvers": other["tables"]["solvers"]}
    missing = other["tables"]["solvers"]["rows"][1]
    missing |= {"seeds": 0, "images": 0, "metrics": {}}
    merged = merge_tables(results, other)
    assert merged["tables"].keys() == results["tables"].keys() and merged["made"] == results["made"]
    rows = merged["tables"]["solvers"]["rows"]
    assert [row["images"] for row in rows] == [24, 40, *[24] * (len(rows) - 2)]
    assert rows[1] == results["tables"]["solvers"]["rows"][1] | {"label": f"{missing['label']} (40 images)"}
    again = merge_tables(merged, other)
    assert again == merged
    merged["tables"]["solvers"]["rows"][1] |= {"seeds": 0}
    assert len(merge_tables(merged, other)["tables"]["solvers"]["rows"]) == len(rows) - 1
    merged = again
    text = page(merged, [])
    assert text.count("Measured apart: `python -m other`, on another one.") == 1
    assert "Images per row and seed: 24 or 40. Seeds: 1 or 2. Measured apart" in text
    assert "Measured apart" not in page(results, [])
    other["made"]["checkpoint"] = "g"
    with pytest.raises(InputError, match="expected results of the same checkpoint"):
        merge_tables(results, other)


def test_a_cost_of_other_settings_or_another_machine_is_measured_again(tmp_path, monkeypatch):
    settings = StudySettings(Path("c"), Path("d"), tmp_path, size=64, reference_count=3, dtype="float32")
    made = types.SimpleNamespace(settings=settings, sampling=OWN, fingerprint="f")
    path, key = study_cost.cost_file(made)
    path.parent.mkdir()
    path.write_text(json.dumps({"key": key, "parts": []}))
    assert study_cost.known_cost(made) == {"key": key, "parts": []}
    for name, other in (("size", 128), ("dtype", "bfloat16"), ("max_rows", 4)):
        changed = dataclasses.replace(settings, **{name: other})
        assert study_cost.known_cost(types.SimpleNamespace(**vars(made) | {"settings": changed})) is None
    assert study_cost.known_cost(types.SimpleNamespace(**vars(made) | {"fingerprint": "g"})) is None
    for kind, count in (("TPU v4", 1), ("TPU v5 lite", 1), ("TPU v5 lite", 4)):
        device = types.SimpleNamespace(platform="tpu", device_kind=kind)
        monkeypatch.setattr(jax, "devices", lambda device=device, count=count: [device] * count)
        monkeypatch.setattr(jax, "device_count", lambda count=count: count)
        assert study_cost.known_cost(made) is None
        path.write_text(json.dumps({"key": study_cost.cost_file(made)[1], "parts": []}))
        assert study_cost.known_cost(made) is not None


def test_the_page_in_docs_is_that_of_its_results():
    """The code that writes the page was last run on docs/results.json."""
    results = json.loads((DOCS / "results.json").read_text())
    figures = [name for name in results["tables"] if (DOCS / "figures" / f"results_{name}.png").exists()]
    assert (DOCS / "results.md").read_text() == page(results, figures)
