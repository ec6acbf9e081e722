"""Results of the study: means and spreads over seeds, paired comparisons, and targets."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from instdiff_jax.config import SamplingConfig
from projects.common.study.rows import Goals, Row, Section
from projects.common.study.runs import Study, machine
from projects.common.study.sections import (
    BOX,
    CAPTION,
    COST,
    GLIGEN,
    MASKED,
    MIS,
    NO_MIS,
    REAL,
    SECTIONS,
    UNMASKED,
    Key,
    Sizes,
    make_sections,
    row_keys,
)

Numbers = Mapping[Key, Mapping[str, Any]]


class Claim(NamedTuple):
    """A claim of the paper about a part, as two rows with and without the part.

    Attributes:
        text: the claim, as the table shows it.
        section: of the rows.
        with_it, without: rows with the same images as two rows of the section; labels are ignored.
        metrics: expected to be higher with the part; names of the sums that `runs.Study.run` returns, or ACCURACY.
    """

    text: str
    section: str
    with_it: Row
    without: Row
    metrics: tuple[str, ...]


_ABLATION = {row.label: row for row in SECTIONS["ablations"].rows}
_ALL = _ABLATION["all formats"]
_MIS_ONLY, _NEITHER, _MASKED_ONLY, _BOTH, _BOTH_CROPPED = (
    Row("", scenes="confusable", sampling=sampling)
    for sampling in (
        MIS | UNMASKED,
        NO_MIS | UNMASKED,
        NO_MIS | MASKED,
        MIS | MASKED,
        MIS | MASKED | {"merge": "crop"},
    )
)
_MASKED, _UNMASKED = _ABLATION["box, masked attention"], _ABLATION["box, no masked attention"]
# ACCURACY stands for that of each kind of attribute.
ACCURACY = "accuracy"
_ALL_THREE = ("found", ACCURACY)
CLAIMS = (
    Claim("MIS separates confusable neighbours", "leakage", _BOTH, _MASKED_ONLY, _ALL_THREE),
    Claim("MIS with crop and paste separates them", "leakage", _BOTH_CROPPED, _MASKED_ONLY, _ALL_THREE),
    Claim("MIS without masked attention separates them", "leakage", _MIS_ONLY, _NEITHER, _ALL_THREE),
    Claim("masked attention separates them", "leakage", _BOTH, _MIS_ONLY, _ALL_THREE),
    Claim("masked attention without MIS separates them", "leakage", _MASKED_ONLY, _NEITHER, _ALL_THREE),
    Claim("MIS helps on other scenes", "ablations", _ABLATION["box, MIS"], _ABLATION["box, no MIS"], _ALL_THREE),
    Claim("masked attention helps on other scenes", "ablations", _MASKED, _UNMASKED, _ALL_THREE),
    Claim("ScaleU helps", "ablations", BOX, _ABLATION["box, no ScaleU"], _ALL_THREE),
    Claim("box tokens help", "ablations", _ALL, _ABLATION["all but box"], ("found", "mask_IoU")),
    Claim("point tokens help", "ablations", _ALL, _ABLATION["all but point"], ("found", "mask_IoU")),
    Claim("scribble tokens help", "ablations", _ALL, _ABLATION["all but scribble"], ("found", "mask_IoU")),
    Claim("mask tokens help", "ablations", _ALL, _ABLATION["all but mask"], ("found", "mask_IoU")),
    Claim("the full method beats the GLIGEN-like ablation", "baselines", BOX, GLIGEN, _ALL_THREE),
    Claim("instances beat the caption alone", "baselines", BOX, CAPTION, _ALL_THREE),
)


class Target(NamedTuple):
    """A goal on the main scenes: `least` for a row's metric, or (`of_real`) for its ratio to the real images'."""

    text: str
    row: Row
    metric: str
    least: float
    of_real: bool


_FORMATS = {row.label: row for row in SECTIONS["formats"].rows}


def make_targets(goals: Goals) -> list[Target]:
    """The targets of a subject."""
    found = [] if goals.found is None else [Target("the right thing in its box", BOX, "found", goals.found, False)]
    return [
        Target("box AP50, share of the upper bound", BOX, "box_AP50", goals.box_AP50, True),
        Target("colour accuracy, share of the upper bound", BOX, "colour_accuracy", goals.colour, True),
        *found,
        Target("points in masks (PiM)", _FORMATS["point"], "PiM_point", goals.point, False),
        Target("scribble points in masks (PiM)", _FORMATS["scribble"], "PiM_scribble", goals.scribble, False),
        Target("mask IoU", _FORMATS["mask"], "mask_IoU", goals.mask_IoU, False),
    ]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The numbers of a study's finished tasks.

    Attributes:
        sampling: the checkpoint's sampling settings.
        sizes: numbers of images and seeds.
        numbers: by the task's key.
    """

    sampling: SamplingConfig
    sizes: Sizes
    numbers: Numbers

    def keys(self, row: Row, section: Section) -> list[Key]:
        """Keys of a row's tasks, seed by seed."""
        return row_keys(row, section, self.sizes, self.sampling)

    def of_row(self, row: Row, section: Section) -> list[Mapping[str, Any]]:
        """A row's numbers, seed by seed, without the missing ones."""
        return [self.numbers[key] for key in self.keys(row, section) if key in self.numbers]

    def different_rows(self, section: Section) -> list[Row]:
        """A section's rows, without those that have the same images as an earlier one."""
        first: dict[str, Row] = {}
        for row in section.rows:
            first.setdefault(row.slug(self.sampling), row)
        return list(first.values())


def make_results(
    study: Study,
    names: Sequence[str],
    sizes: Sizes,
    numbers: Numbers,
    cost: Mapping[str, Any] | None,
    command: str,
) -> dict[str, Any]:
    """The contents of results.json, from which the page is made.

    Args:
        study: the study that measured the numbers.
        names: of the requested sections.
        sizes: as requested; a row that was not measured has no numbers.
        numbers: of the finished tasks.
        cost: as `cost.measure_cost` returns it; None if not measured.
        command: the command that makes these results.
    """
    subject, sections = study.subject, make_sections(study.subject, names)
    measured = Measured(study.sampling, sizes, numbers)
    made = {
        "command": command,
        "scenes_of": f"{subject.world.supercategory}s",
        "page": subject.page,
        "checkpoint": study.fingerprint,
        "sampling": study.sampling.to_dict(),
        "size": study.settings.size,
        "dtype": study.settings.dtype,
        "machine": machine(),
        "sizes": sizes._asdict(),
        "scenes": {name: {"seed": kind.seed} | kind.settings.to_dict() for name, kind in study.scenes.items()},
        "segmenter": study.segmenter,
        "reference_count": study.settings.reference_count,
    }
    tables = {
        name: {"title": section.title, "text": section.text, "columns": section.columns}
        | {"rows": [_row(row, section, measured) for row in measured.different_rows(section)]}
        for name, section in sections.items()
    }
    comparisons = [_compare(claim, subject.attributes, measured) for claim in CLAIMS if claim.section in sections]
    targets = [_target(target, measured) for target in make_targets(subject.goals)] if "formats" in sections else []
    if cost is not None:
        cost = {name: cost[name] for name in ("pictures", "instances", "parts")}
    results = {"made": made, "tables": tables, "comparisons": comparisons, "targets": targets}
    return results | ({"cost": cost} if COST in names else {})


def _row(row: Row, section: Section, measured: Measured) -> dict[str, Any]:
    found = measured.of_row(row, section)
    metrics: dict[str, dict[str, Any]] = {}
    for name in dict.fromkeys(name for one in found for name in one["metrics"]):
        values = [one["metrics"][name] for one in found if one["metrics"].get(name) is not None]
        if name not in ("images", "instances") and values:
            low, high = min(values), max(values)
            metrics[name] = {"mean": float(np.mean(values)), "low": low, "high": high, "by_seed": values}
    images = measured.sizes.of(section)[0] if found else 0
    settings = {"scenes": row.scenes, "pictures": row.source, "sampling": row.settings(measured.sampling).to_dict()}
    settings |= {"format": row.format, "drop": row.drop, "scaleu": row.scaleu}
    return {"label": row.label, "images": images, "seeds": len(found), "settings": settings, "metrics": metrics}


def paired_difference(
    with_it: Sequence[Mapping[str, Any]], without: Sequence[Mapping[str, Any]], metric: str
) -> tuple[float, float, float, float]:
    """The difference of a metric between two rows, on the same scenes with the same seeds.

    Args:
        with_it, without: numbers of each seed; equally many.
        metric: a name of the sums. Its share is of METRIC_of where the sums have that, else of all instances.

    Returns:
        The metric of each row, their difference, and its standard error over scenes (after averaging over seeds).
    """
    sums = [
        np.mean([[picture[metric] for picture in one["of_picture"]] for one in found], axis=0)
        for found in (with_it, without)
    ]
    counts = np.array([one.get(f"{metric}_of", one["instances"]) for one in with_it[0]["of_picture"]])
    total, gain = counts.sum(), sums[0] - sums[1]
    difference = gain.sum() / total
    # Standard error of a ratio of sums: from what each scene adds beyond its share of instances.
    error = math.sqrt(len(gain)) * np.std(gain - difference * counts, ddof=1) / total
    return float(sums[0].sum() / total), float(sums[1].sum() / total), float(difference), float(error)


def _compare(claim: Claim, attributes: Sequence[str], measured: Measured) -> dict[str, Any]:
    section = SECTIONS[claim.section]
    accuracies = [f"{kind}_{ACCURACY}" for kind in attributes]
    metrics = [name for metric in claim.metrics for name in (accuracies if metric == ACCURACY else [metric])]
    keys, numbers = [measured.keys(row, section) for row in (claim.with_it, claim.without)], measured.numbers
    # Only seeds that both rows have.
    pairs = [(numbers[a], numbers[b]) for a, b in zip(*keys, strict=True) if a in numbers and b in numbers]
    lines = []
    if pairs:
        with_it, without = zip(*pairs, strict=True)
        for metric in metrics:
            higher, lower, difference, error = paired_difference(with_it, without, metric)
            clear = abs(difference) > 2 * error
            verdict = ("higher" if difference > 0 else "lower") if clear else "no clear difference"
            line = {"metric": metric, "with": higher, "without": lower, "difference": difference}
            lines.append(line | {"standard_error": error, "verdict": verdict})
    return {"claim": claim.text, "section": claim.section, "lines": lines}


def _target(target: Target, measured: Measured) -> dict[str, Any]:
    def value(row: Row) -> float | None:
        # "baselines" is a large section, as "formats" is: its rows have the same keys.
        found = measured.of_row(row, SECTIONS["formats"])
        values = [one["metrics"].get(target.metric) for one in found]
        return float(np.mean(values)) if values and None not in values else None

    real, reached = value(REAL), value(target.row)
    share = None if reached is None or real is None else reached / real if real else 0.0
    measure = share if target.of_real else reached
    return {
        "target": target.text,
        "least": target.least,
        "share_counts": target.of_real,
        "upper_bound": real,
        "value": reached,
        "share": share,
        "GLIGEN_like": value(GLIGEN),
        "caption_alone": value(CAPTION),
        "reached": None if measure is None else measure >= target.least,
    }
