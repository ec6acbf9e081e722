"""An evaluation's numbers as JSON and Markdown, also relative to an upper bound."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.image import EvaluatedImage
from instdiff_jax.evaluation.measure import Numbers, Outcome
from instdiff_jax.files import read_json

# Metrics that are not fractions, so not shown as percentages.
_COUNTS = ("images", "instances")
_DECIMALS = {"UNets": 1, "speedup": 1, "distance": 1, "FID": 2, "CLIP_global": 3, "CLIP_local": 3}


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of a metric is better."""
    return name in ("FID", "UNets", "distance") or name.endswith("_leak")


def make_report(outcome: Outcome, settings: Mapping[str, Any], upper: Mapping[str, Any] | None = None) -> dict:
    """The content of report.json: settings, metrics, breakdowns, notes and the numbers of each image.

    Args:
        outcome: what was measured.
        settings: of the measurement; `annotations` (a fingerprint) identifies the split.
        upper: the report of an upper bound, from `read_report`; adds `ratio`, the metrics divided by its.
    """
    report = {
        "settings": dict(settings),
        "metrics": outcome.metrics,
        "by_count": [{"instances_asked": label} | numbers for label, numbers in outcome.by_count],
        "by_category": outcome.by_category,
        "notes": outcome.notes,
        "pictures": [_image_row(image) for image in outcome.images],
    }
    if upper is not None:
        bound = upper["metrics"]
        report["upper_bound"] = bound
        report["ratio"] = {
            name: value / bound[name]
            for name, value in outcome.metrics.items()
            if name not in _COUNTS and not lower_is_better(name) and bound.get(name)
        }
    return report


def _image_row(image: EvaluatedImage) -> dict[str, Any]:
    row: dict[str, Any] = {
        "image_id": image.scene.image_id,
        "caption": image.scene.caption,
        "score": image.score,
        "CLIP_global": image.clip_global,
        "instances": [],
    }
    for k, target in enumerate(image.scene.asked):
        instance: dict[str, Any] = {
            "caption": target.caption,
            "category": target.category,
            "box": target.xywh,
            "attributes": dict(target.attributes),
        }
        if image.measures:
            item = image.measures[k]
            instance |= {name: getattr(item, name) for name in ("box_iou", "mask_iou", "point_in", "scribble_in")}
            instance["found"] = None if item.match is None else dict(item.match.attributes)
        if image.clip_local:
            instance["CLIP_local"] = image.clip_local[k]
        row["instances"].append(instance)
    return row


def read_report(path: str | Path, annotations: str) -> dict[str, Any]:
    """Reads a report.json to compare with.

    Raises:
        InputError: if it is not a report, or not of the annotations with this fingerprint.
    """
    report = read_json(path)
    metrics = report.get("metrics") if isinstance(report, dict) else None
    if not isinstance(metrics, dict) or not all(
        type(value) in (int, float) and abs(value) <= 1e9 for value in metrics.values()
    ):
        raise InputError(f"{path}: expected a report.json of an evaluation")
    if not isinstance(report.get("settings"), dict) or report["settings"].get("annotations") != annotations:
        raise InputError(f"{path}: settings.annotations: expected a report of the same annotations")
    return report


def check_same_images(path: str | Path, upper: Mapping[str, Any], image_ids: Sequence[int]) -> None:
    """Raises InputError if an upper bound was measured on other images."""
    rows = upper.get("pictures")
    rows = rows if isinstance(rows, list) else []
    theirs = {row["image_id"] for row in rows if isinstance(row, dict) and type(row.get("image_id")) is int}
    if theirs != set(image_ids):
        raise InputError(f"{path}: expected a report of the same {len(image_ids)} images, got one of {len(theirs)}")


def check_same_measures(path: str | Path, upper: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """Raises InputError if an upper bound was measured differently from `settings`, those of this run."""
    theirs = upper["settings"]
    if theirs.get("pictures") != "real":
        raise InputError(f"{path}: settings.pictures: expected real (--real), got {theirs.get('pictures')}")
    names = ["size", "min_area", "min_score", "detector_fingerprint"]
    # CLIP matters only if both have its score.
    names += ["clip"] if settings["clip"] and theirs.get("clip") else []
    for name in names:
        if theirs.get(name) != settings[name]:
            ours, got = settings[name], theirs.get(name)
            if name == "detector_fingerprint":
                ours, got = (f"{held.get('detector')} ({held.get(name)})" for held in (settings, theirs))
            raise InputError(
                f"{path}: settings.{name}: expected {ours} as in this run, got {got}; measure the bound with its flags"
            )


def label(name: str) -> str:
    """A metric's name for tables."""
    return name.replace("_", " ")


def show(name: str, value: float | None) -> str:
    """A metric's value for tables: fractions as percentages, as in papers."""
    if value is None:
        return "–"
    if name in _COUNTS:
        return str(value)
    decimals = _DECIMALS.get(name)
    return f"{100 * value:.1f}" if decimals is None else f"{value:.{decimals}f}"


def tables(report: Mapping[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """The report's tables: title, head and rows of cells."""
    bound, ratio = report.get("upper_bound"), report.get("ratio", {})
    head = ["", "value"] + ([] if bound is None else ["upper bound", "relative"])
    rows = []
    for name, value in report["metrics"].items():
        row = [label(name), show(name, value)]
        if bound is not None:
            row += [show(name, bound.get(name)), f"{100 * ratio[name]:.1f} %" if name in ratio else "–"]
        rows.append(row)
    found = [("Numbers", head, rows)]
    for title, key, entries in (
        ("By number of instances", "instances asked for", [dict(row) for row in report["by_count"]]),
        (
            "By category",
            "category",
            [{"instances_asked": name} | numbers for name, numbers in report["by_category"].items()],
        ),
    ):
        if not entries:
            continue
        names: list[str] = []
        for entry in entries:
            names += [name for name in entry if name not in names and name != "instances_asked"]
        cells = [[entry["instances_asked"], *(show(name, entry.get(name)) for name in names)] for entry in entries]
        found.append((title, [key, *map(label, names)], cells))
    return found


def markdown(report: Mapping[str, Any]) -> str:
    """The report as Markdown."""
    lines = ["# Evaluation", "", "AP, AR, IoU, PiM and accuracy in percent.", ""]
    for title, head, rows in tables(report):
        lines += [f"## {title}", "", table_line(head), table_line(["---"] + ["---:"] * (len(head) - 1))]
        lines += [*map(table_line, rows), ""]
    if report["notes"]:
        lines += ["## Notes", "", *(f"- {note}" for note in report["notes"]), ""]
    lines += ["## Settings", "", table_line(["setting", "value"]), table_line(["---", "---"])]
    for name, value in flat(report["settings"]):
        lines.append(table_line([name, value]))
    return "\n".join(lines) + "\n"


def flat(settings: Mapping[str, Any], start: str = "") -> list[tuple[str, str]]:
    """Settings as pairs of dotted name and text."""
    pairs = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{start}{name}.")
        else:
            pairs.append((f"{start}{name}", value if isinstance(value, str) else json.dumps(value)))
    return pairs


def table_line(cells: Sequence[str]) -> str:
    """One row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def metrics_line(metrics: Numbers) -> str:
    """The numbers on one line."""
    return ", ".join(f"{label(name)} {show(name, value)}" for name, value in metrics.items())
