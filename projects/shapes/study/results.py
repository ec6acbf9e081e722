"""The study's numbers put together: means and spreads over seeds, paired comparisons, and the targets."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from projects.shapes.study import rows
from projects.shapes.study.rows import SECTIONS, Key, Row, Section, Sizes, row_keys
from projects.shapes.study.runs import Study, machine

Numbers = Mapping[Key, Mapping[str, Any]]


class Claim(NamedTuple):
    """What the paper says that a part does, as rows with and without it.

    Attributes:
        text: what should be so, as the head of a table's line.
        section: the rows' section.
        with_it, without: rows that make the same pictures as two of the section's; their labels do not count.
        metrics: that should be higher with it; names of the sums that `runs.Study.run` returns.
    """

    text: str
    section: str
    with_it: Row
    without: Row
    metrics: tuple[str, ...]


_ABLATION = {row.label: row for row in SECTIONS["ablations"].rows}
_ALL = _ABLATION["all formats"]
_ON_ALONE, _NEITHER, _MASKED_ALONE, _MASKED_TOO = (
    Row("", scenes="confusable", sampling=mis | masked)
    for mis, masked in (
        (rows.MIS, rows.UNMASKED),
        (rows.NO_MIS, rows.UNMASKED),
        (rows.NO_MIS, rows.MASKED),
        (rows.MIS, rows.MASKED),
    )
)
_CROPPED = Row("", scenes="confusable", sampling=rows.MIS | rows.MASKED | {"merge": "crop"})
_MASKED, _UNMASKED = _ABLATION["box, masked attention"], _ABLATION["box, no masked attention"]
_BOTH = ("found", "colour_accuracy", "texture_accuracy")
CLAIMS = (
    Claim("MIS keeps attributes of confusable neighbours apart", "leakage", _MASKED_TOO, _MASKED_ALONE, _BOTH),
    Claim("so it does merged by crop and paste", "leakage", _CROPPED, _MASKED_ALONE, _BOTH),
    Claim("so it does without masked attention", "leakage", _ON_ALONE, _NEITHER, _BOTH),
    Claim("masked attention keeps them apart", "leakage", _MASKED_TOO, _ON_ALONE, _BOTH),
    Claim("so it does without MIS", "leakage", _MASKED_ALONE, _NEITHER, _BOTH),
    Claim("MIS helps on other scenes", "ablations", _ABLATION["box, MIS"], _ABLATION["box, no MIS"], _BOTH),
    Claim("masked attention helps on other scenes", "ablations", _MASKED, _UNMASKED, _BOTH),
    Claim("ScaleU helps", "ablations", rows.BOX, _ABLATION["box, no ScaleU"], _BOTH),
    Claim("boxes' tokens help", "ablations", _ALL, _ABLATION["all but box"], ("found", "mask_IoU")),
    Claim("points' tokens help", "ablations", _ALL, _ABLATION["all but point"], ("found", "mask_IoU")),
    Claim("scribbles' tokens help", "ablations", _ALL, _ABLATION["all but scribble"], ("found", "mask_IoU")),
    Claim("masks' tokens help", "ablations", _ALL, _ABLATION["all but mask"], ("found", "mask_IoU")),
    Claim("the whole beats the GLIGEN-like ablation", "baselines", rows.BOX, rows.GLIGEN, _BOTH),
    Claim("instances beat the caption alone", "baselines", rows.BOX, rows.CAPTION, _BOTH),
)


class Target(NamedTuple):
    """What the project set out to reach on the main scenes: `least` of a row, or of its share of the real images'."""

    text: str
    row: Row
    metric: str
    least: float
    of_real: bool


_FORMATS = {row.label: row for row in SECTIONS["formats"].rows}
TARGETS = (
    Target("box AP50, share of the upper bound", rows.BOX, "box_AP50", 0.8, True),
    Target("colour accuracy, share of the upper bound", rows.BOX, "colour_accuracy", 0.9, True),
    Target("points in masks (PiM)", _FORMATS["point"], "PiM_point", 0.85, False),
    Target("scribbles' points in masks (PiM)", _FORMATS["scribble"], "PiM_scribble", 0.85, False),
    Target("mask IoU", _FORMATS["mask"], "mask_IoU", 0.6, False),
)


def make_results(
    study: Study,
    names: Sequence[str],
    sizes: Sizes,
    numbers: Numbers,
    cost: Mapping[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """All that results.json holds, and that the page is made from.

    Args:
        study: that measured.
        names: of the sections that were asked for.
        sizes: as asked for; a row that was not done has no numbers.
        numbers: of tasks that are done.
        cost: as `cost.measure_cost` returns it; None where it was not.
        command: that does all of it.
    """
    sections = {name: SECTIONS[name] for name in SECTIONS if name in names}
    made = {
        "command": command,
        "checkpoint": study.fingerprint,
        "sampling": study.sampling.to_dict(),
        "size": study.size,
        "dtype": study.dtype,
        "machine": machine(),
        "sizes": sizes._asdict(),
        "scenes": {name: {"seed": kind.seed} | kind.settings.to_dict() for name, kind in rows.SCENES.items()},
        "segmenter": study.segmenter,
        "reference_count": study.reference_count,
    }
    tables = {
        name: {"title": section.title, "text": section.text, "columns": section.columns}
        | {"rows": [_row(row, section, sizes, study, numbers) for row in _different(section, study)]}
        for name, section in sections.items()
    }
    comparisons = [_compare(claim, sizes, study, numbers) for claim in CLAIMS if claim.section in sections]
    targets = [_target(target, sizes, study, numbers) for target in TARGETS] if "formats" in sections else []
    if cost is not None:
        cost = {name: cost[name] for name in ("pictures", "instances", "parts")}
    results = {"made": made, "tables": tables, "comparisons": comparisons, "targets": targets}
    return results | ({"cost": cost} if rows.COST in names else {})


def _different(section: Section, study: Study) -> list[Row]:
    """A section's rows without those that make the same pictures as an earlier one."""
    first: dict[str, Row] = {}
    for row in section.rows:
        first.setdefault(row.slug(study.sampling), row)
    return list(first.values())


def _found(row: Row, section: Section, sizes: Sizes, study: Study, numbers: Numbers) -> list[Mapping[str, Any]]:
    """A row's numbers, seed by seed."""
    return [numbers[key] for key in row_keys(row, section, sizes, study.sampling) if key in numbers]


def _row(row: Row, section: Section, sizes: Sizes, study: Study, numbers: Numbers) -> dict[str, Any]:
    found = _found(row, section, sizes, study, numbers)
    metrics: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for one in found for name in one["metrics"]):
        values = [one["metrics"][name] for one in found if one["metrics"].get(name) is not None]
        if name not in ("images", "instances") and values:
            low, high = min(values), max(values)
            metrics[name] = {"mean": float(np.mean(values)), "low": low, "high": high, "by_seed": values}
    images = sizes.of(section)[0] if found else 0
    settings = {"scenes": row.scenes, "pictures": row.pictures, "sampling": row.settings(study.sampling).to_dict()}
    settings |= {"format": row.format, "drop": row.drop, "scaleu": row.scaleu}
    return {"label": row.label, "images": images, "seeds": len(found), "settings": settings, "metrics": metrics}


def paired_difference(
    with_it: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float, float, float, float]:
    """How much higher a number is in one row than in another, on the same scenes with the same seeds.

    Args:
        with_it, without: numbers of each seed, as many of both.
        metric: a name of the sums.

    Returns:
        The number of each row, their difference, and its standard error over the scenes (their seeds averaged).
    """
    sums = [
        np.mean([[picture[metric] for picture in one["of_picture"]] for one in found], axis=0)
        for found in (with_it, without)
    ]
    counts = np.array([picture["instances"] for picture in with_it[0]["of_picture"]])
    total, gain = counts.sum(), sums[0] - sums[1]
    difference = gain.sum() / total
    # Of a ratio of sums: what each scene adds beyond its share of instances.
    error = math.sqrt(len(gain)) * np.std(gain - difference * counts, ddof=1) / total
    return float(sums[0].sum() / total), float(sums[1].sum() / total), float(difference), float(error)


def _compare(claim: Claim, sizes: Sizes, study: Study, numbers: Numbers) -> dict[str, Any]:
    section = SECTIONS[claim.section]
    keys = [row_keys(row, section, sizes, study.sampling) for row in (claim.with_it, claim.without)]
    # Seeds that both rows have.
    pairs = [(numbers[a], numbers[b]) for a, b in zip(*keys, strict=True) if a in numbers and b in numbers]
    lines = []
    if pairs:
        with_it, without = zip(*pairs, strict=True)
        for metric in claim.metrics:
            higher, lower, difference, error = paired_difference(with_it, without, metric)
            clear = abs(difference) > 2 * error
            verdict = ("higher" if difference > 0 else "lower") if clear else "no clear difference"
            line = {"metric": metric, "with": higher, "without": lower, "difference": difference}
            lines.append(line | {"standard_error": error, "verdict": verdict})
    return {"claim": claim.text, "section": claim.section, "lines": lines}


def _target(target: Target, sizes: Sizes, study: Study, numbers: Numbers) -> dict[str, Any]:
    def value(row: Row) -> float | None:
        # Baselines are as large as formats: their numbers have the same keys.
        found = _found(row, SECTIONS["formats"], sizes, study, numbers)
        values = [one["metrics"].get(target.metric) for one in found]
        return float(np.mean(values)) if values and None not in values else None

    real, reached = value(rows.REAL), value(target.row)
    share = None if reached is None or real is None else reached / real if real else 0.0
    measure = share if target.of_real else reached
    return {
        "target": target.text,
        "least": target.least,
        "share_counts": target.of_real,
        "upper_bound": real,
        "value": reached,
        "share": share,
        "GLIGEN_like": value(rows.GLIGEN),
        "caption_alone": value(rows.CAPTION),
        "reached": None if measure is None else measure >= target.least,
    }
