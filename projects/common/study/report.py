"""Writes the study's results: a page, its numbers as JSON, and plots. All of them follow from the results alone."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.report import label, lower_is_better, show, table_line
from instdiff_jax.files import write_file, write_json, write_text
from projects.common.study.plots import draw_plots

# Published numbers on COCO val2017, with YOLOv8m-seg as the detector: FID, and percentages.
_PAPER = (
    ("real images", "48.4", "65.2", "67.8", "", "", "", "", "", "", "", ""),
    ("InstanceDiffusion", "38.8", "55.4", "52.9", "23.9", "27.1", "50.0", "25.5", "81.1", "72.4", "54.4", "26.8"),
    ("GLIGEN, as measured by ROICtrl", "24.1", "42.6", "35.9", "", "", "", "", "", "", "26.3", "17.7"),
)
_PAPER_HEAD = ("box AP", "box AP50", "box AR", "FID, box", "mask AP", "mask AP50", "FID, mask")
_PAPER_HEAD += ("PiM point", "PiM scribble", "colour accuracy", "texture accuracy")


def write_study(results: Mapping[str, Any], docs: Path) -> None:
    """Writes PAGE.json, figures/PAGE_*.png and PAGE.md into a folder; PAGE is "results" for the shapes.

    Args:
        results: as `results.make_results` returns them.
        docs: the folder.
    """
    name = results["made"]["page"]
    write_json(docs / f"{name}.json", results)
    figures = draw_plots(results)
    for section, png in figures.items():
        write_file(docs / "figures" / f"{name}_{section}.png", lambda file, png=png: file.write(png))
    write_text(docs / f"{name}.md", page(results, list(figures)))


def merge_tables(results: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, Any]:
    """The results with the tables of another run of the same checkpoint, which then say where they come from.

    A row that the other run has not measured stays as it was, with its number of images in its label; one that
    neither has measured is left out.
    """
    made = other["made"]
    if made["checkpoint"] != results["made"]["checkpoint"]:
        raise InputError(f"{results['made']['page']}.json: expected results of the same checkpoint")
    apart = {"command": made["command"], "device": made["machine"]["device"]}
    tables = dict(results["tables"])
    for name, table in other["tables"].items():
        old = {}
        for row in tables[name]["rows"] if name in tables else ():
            images = f" ({row['images']} images)"
            old[row["label"].removesuffix(images)] = row | {"label": row["label"].removesuffix(images) + images}
        rows = [row if row["seeds"] else old.get(row["label"], row) for row in table["rows"]]
        tables[name] = table | apart | {"rows": [row for row in rows if row["seeds"]]}
    return {**results, "tables": tables}


def page(results: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The page as Markdown.

    Args:
        results: see `write_study`.
        figures: names of the plots that exist.
    """
    tables = results["tables"]
    parts = ["# Results", _introduction(results["made"])]
    if results["targets"]:
        parts += ["## Targets", _targets(results["targets"])]
    if results["comparisons"]:
        parts += ["## Agreement with the paper", _comparisons(results["comparisons"])]
    for name, table in tables.items():
        shown = _counted(table) if name == "instances" else _table(table)
        parts += [f"## {table['title']}", table["text"], _sizes(table), shown]
        if name in figures:
            parts.append(f"![{table['title']}](figures/{results['made']['page']}_{name}.png)")
        if name == "formats":
            parts += [
                "### The paper's numbers, on COCO",
                "Results of the full model on COCO val2017, from arXiv 2402.03290 (last row: GLIGEN as measured in the "
                "ROICtrl paper). Model, data and detector differ, so do not compare the numbers with the table above. "
                "The order of the rows is comparable, and their ratio to the real images (85.0% of AP50 on COCO).",
                _lines(("on COCO", *_PAPER_HEAD), _PAPER),
            ]
    if "cost" in results:
        parts += ["## Cost of each part", _cost(results["cost"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(made: Mapping[str, Any]) -> str:
    machine, sizes, sampling = made["machine"], made["sizes"], made["sampling"]
    alpha = "/".join(f"{part:g}" for part in sampling["alpha"])
    side = made["size"]
    scenes = f"{made['scenes_of']}, {side}×{side} pixels"
    return f"""The small model on held-out scenes of {scenes}. One command made this page; it
generates only images that its workdir lacks:

```bash
{made["command"]}
```

Machine: {machine["device"]}, {made["dtype"]}, jax {machine["jax"]}, Python {machine["python"]}. Sampling, unless a row
says otherwise: {sampling["sampler"]}, {sampling["steps"]} steps, guidance {sampling["guidance_scale"]:g}, \
alpha {alpha}, MIS {sampling["mis"]:g} ({sampling["merge"]}), masked attention {sampling["masked_attention"]}.
Requested: {sizes["count"]} images with {sizes["seeds"]} seeds in the main tables, {sizes["small_count"]} with \
{sizes["small_seeds"]} in the others. The line above each table says how many were measured.

The detector is this project's segmentation network (`projects/common/segmenter.py`), in place of the paper's YOLOv8.
Its results on real images are the upper bound. AP, AR, IoU, PiM and accuracy are in percent. Accuracy is over all
instances of the layouts; an instance that is not found counts as wrong. FID is the Fréchet distance between the
network's features and those of other real scenes with the same settings. It depends on the number of images, so
compare only rows with equal numbers; it is above 0 for real images too. Numbers are means over seeds. With three seeds
or more ± is half of the mean's 95% confidence interval (Student's t); with two it is half their range, which is no
interval; a number without ± has one seed (`--seeds` and `--small_seeds` give more).
Seeds change the noise, not the scenes."""


def _sizes(table: Mapping[str, Any]) -> str:
    done = sorted({(row["images"], row["seeds"]) for row in table["rows"] if row["seeds"]}, reverse=True)
    if not done:
        return "Not measured."
    images = " or ".join(str(number) for number in sorted({images for images, _ in done}))
    generated = [row for row in table["rows"] if row["settings"]["pictures"] != "real" and row["seeds"]]
    seeds = " or ".join(str(number) for number in sorted({row["seeds"] for row in generated}))
    own = f" Measured apart: `{table['command']}`, on {table['device']}." if "command" in table else ""
    return f"Images per row and seed: {images}. Seeds: {seeds}.{own}"


def show_metric(name: str, metric: Mapping[str, Any] | None) -> str:
    """A number with its confidence interval over seeds, or half the range of two; – if it was not measured."""
    if metric is None:
        return "–"
    values = metric["by_seed"]
    spread = half_interval(values) if len(values) > 2 else (max(values) - min(values)) / 2
    return show(name, metric["mean"]) + (f" ± {show(name, spread)}" if len(values) > 1 else "")


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95% confidence interval of the mean of two values or more, by Student's t."""
    return float(student.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / math.sqrt(len(values)))


def _lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join([table_line(head), table_line(["---"] + ["---:"] * (len(head) - 1)), *map(table_line, rows)])


def _name(metric: str) -> str:
    return label(metric) + (" ↓" if lower_is_better(metric) else "")


def _table(table: Mapping[str, Any]) -> str:
    columns = table["columns"]
    cells = [
        [row["label"], *(show_metric(name, row["metrics"].get(name)) for name in columns)]
        if row["seeds"]
        else [row["label"], "not measured", *[""] * (len(columns) - 1)]
        for row in table["rows"]
    ]
    return _lines(["", *map(_name, columns)], cells)


def _counted(table: Mapping[str, Any]) -> str:
    """The table by number of instances, with the real images' numbers in brackets."""
    columns, cells = table["columns"], []
    for generated, real in zip(table["rows"][::2], table["rows"][1::2], strict=True):
        line = [generated["label"]]
        for name in columns:
            bound = real["metrics"].get(name)
            line.append(
                show_metric(name, generated["metrics"].get(name))
                + (f" ({show(name, bound['mean'])})" if bound is not None else "")
            )
        cells.append(line)
    return _lines(["instances", *map(_name, columns)], cells)


def _targets(targets: Sequence[Mapping[str, Any]]) -> str:
    def percent(value: float | None) -> str:
        return "–" if value is None else f"{100 * value:.1f}"

    head = ("target", "at least", "real images", "value", "share of real", "GLIGEN-like", "caption alone", "reached")
    rows = []
    for item in targets:
        values = [item[name] for name in ("least", "upper_bound", "value", "share", "GLIGEN_like", "caption_alone")]
        reached = {None: "not measured", True: "yes", False: "no"}[item["reached"]]
        real = item["upper_bound"]
        if item["reached"] is False and not item["share_counts"] and real is not None and real < item["least"]:
            reached = "no; nor by real images"
        rows.append([item["target"], *map(percent, values), reached])
    text = "In percent, on the main scenes (2 to 6 instances). The last three get that format, the others boxes."
    return f"{text}\n\n{_lines(head, rows)}"


def _comparisons(comparisons: Sequence[Mapping[str, Any]]) -> str:
    rows, agree, differ, open_ = [], [], [], []
    for item in comparisons:
        for line in item["lines"]:
            values = [f"{100 * line[name]:.1f}" for name in ("with", "without")]
            difference = f"{100 * line['difference']:+.1f} ± {100 * line['standard_error']:.1f}"
            rows.append([item["claim"], label(line["metric"]), *values, difference, line["verdict"]])
        verdicts = [line["verdict"] for line in item["lines"]]
        lower = [label(line["metric"]) for line in item["lines"] if line["verdict"] == "lower"]
        higher = [label(line["metric"]) for line in item["lines"] if line["verdict"] == "higher"]
        if lower:
            also = f", while {_listed(higher)} {_be(higher)} higher" if higher else ""
            differ.append(f"“{item['claim']}” ({_listed(lower)} {_be(lower)} lower with it{also})")
        elif higher:
            agree.append(f"“{item['claim']}”")
        elif verdicts:
            open_.append(f"“{item['claim']}”")
    sentences = []
    if agree:
        sentences.append(f"In agreement with the paper: {_listed(agree)}.")
    if differ:
        sentences.append(f"In contrast to the paper: {_listed(differ)}.")
    if open_:
        sentences.append(f"Not statistically significant: {_listed(open_)}.")
    head = ("claim of the paper", "metric", "with", "without", "difference", "with it")
    if not rows:
        return "Not measured."
    text = (
        "The effect of each part, on the same scenes with the same noise. ± is the standard error over scenes; a "
        "difference under twice the standard error is not significant. Found: the share of instances that the "
        "detector finds in the right place (IoU of at least 0.5)."
    )
    return "\n\n".join([" ".join(sentences), text, _lines(head, rows)])


def _listed(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _be(parts: Sequence[str]) -> str:
    return "is" if len(parts) == 1 else "are"


def _cost(cost: Mapping[str, Any] | None) -> str:
    if cost is None:
        return "Not measured."

    def cell(value: float | None, decimals: int) -> str:
        return "–" if value is None else f"{value:.{decimals}f}"

    rows = [
        [part["part"]]
        + [cell(part.get(name), digits) for name, digits in (("seconds", 3), ("evaluations", 1), ("gflop", 2))]
        + [cell(part.get("temporary_mb"), 0)]
        for part in cost["parts"]
    ]
    text = (
        f"Per image with {cost['instances']} instances (boxes), in a batch of {cost['pictures']}. Seconds are of one "
        "run after a warm-up. UNet evaluations are of one latent, guidance included. A multiply-add is two FLOPs, "
        "and padding rows are included. Memory is the temporary memory of the batch's compiled program, according to "
        "XLA. A whole call also prepares layouts on the host."
    )
    head = ("part", "seconds", "UNet evaluations", "GFLOP", "temporary memory, MB")
    return f"{text}\n\n{_lines(head, rows)}"
