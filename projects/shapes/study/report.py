"""The study as a page: docs/results.md, beside results.json and its plots. All of it follows from the results alone."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from instdiff_jax.evaluation.files import write_file
from instdiff_jax.evaluation.report import label, lower_is_better, show, table_line
from projects.shapes.study.plots import draw_plots

# The paper's numbers and others' on COCO val2017, with YOLOv8m-seg as the detector: percentages, but for FID.
_PAPER = (
    ("real images", "48.4", "65.2", "67.8", "", "", "", "", "", "", "", ""),
    ("InstanceDiffusion", "38.8", "55.4", "52.9", "23.9", "27.1", "50.0", "25.5", "81.1", "72.4", "54.4", "26.8"),
    ("GLIGEN, run again by ROICtrl", "24.1", "42.6", "35.9", "", "", "", "", "", "", "26.3", "17.7"),
)
_PAPER_HEAD = ("box AP", "box AP50", "box AR", "FID, box", "mask AP", "mask AP50", "FID, mask")
_PAPER_HEAD += ("PiM point", "PiM scribble", "colour accuracy", "texture accuracy")
_SHORT_NAMES = {"box_AP50": "AP50", "box_AP": "AP", "box_AR": "AR"}


def write_study(results: Mapping[str, Any], docs: Path) -> None:
    """Writes results.json, figures/results_*.png and results.md into a folder.

    Args:
        results: as `results.make_results` gives them.
        docs: the folder.
    """
    write_file(docs / "results.json", (json.dumps(results, indent=1) + "\n").encode())
    figures = draw_plots(results)
    for name, picture in figures.items():
        write_file(docs / "figures" / f"results_{name}.png", picture)
    write_file(docs / "results.md", page(results, list(figures)).encode())


def page(results: Mapping[str, Any], figures: Sequence[str]) -> str:
    """The page as Markdown.

    Args:
        results: see `write_study`.
        figures: names of the plots that there are.
    """
    tables = results["tables"]
    parts = ["# Results", _introduction(results["made"])]
    if results["targets"]:
        parts += ["## Targets", _targets(results["targets"])]
    if results["comparisons"]:
        parts += ["## Where it agrees with the paper, and where it differs", _comparisons(results["comparisons"])]
    for name, table in tables.items():
        shown = _counted(table) if name == "instances" else _table(table)
        parts += [f"## {table['title']}", table["text"], _sizes(table), shown]
        if name in figures:
            parts.append(f"![{table['title']}](figures/results_{name}.png)")
        if name == "formats":
            parts += [
                "### The paper's numbers, on COCO",
                "Of the full model on COCO val2017, from arXiv 2402.03290 (the last row: GLIGEN as the ROICtrl paper "
                "ran it). Another model, other data, another detector: not to be compared number by number with the "
                "table above; what compares is the order of rows and their share of the real images' row (there 85.0% "
                "of AP50).",
                _lines(("on COCO", *_PAPER_HEAD), _PAPER),
            ]
    if "cost" in results:
        parts += ["## Cost of each part", _cost(results["cost"])]
    return "\n\n".join(part for part in parts if part) + "\n"


def _introduction(made: Mapping[str, Any]) -> str:
    machine, sizes, sampling = made["machine"], made["sizes"], made["sampling"]
    alpha = "/".join(f"{part:g}" for part in sampling["alpha"])
    side = made["size"]
    return f"""The small model on held-out scenes of shapes, {side}×{side} pixels. All that this page shows
was made by one command, which draws only what its workdir lacks:

```bash
{made["command"]}
```

Machine: {machine["device"]}, {made["dtype"]}, jax {machine["jax"]}, Python {machine["python"]}. Sampling, where a row
does not say otherwise: {sampling["sampler"]}, {sampling["steps"]} steps, guidance {sampling["guidance_scale"]:g}, \
alpha {alpha}, MIS {sampling["mis"]:g} ({sampling["merge"]}), masked attention {sampling["masked_attention"]}.
Asked for: {sizes["count"]} pictures with {sizes["seeds"]} seeds in the main tables, {sizes["small_count"]} with \
{sizes["small_seeds"]} in the others; above each table stands what was done.

The detector is the project's own segmentation network (`instdiff_jax/evaluation/segmenter.py`), as YOLOv8 is in the
paper; what it makes of real images is the upper bound. AP, AR, IoU, PiM and accuracy in percent; accuracy is over all
instances that were asked for, and one that is not found is wrong. FID is the Fréchet distance of that network's
features to those of other real scenes of the same kind: it compares rows of equal numbers of pictures with each other,
and real images have one above 0, too. A number is the mean over seeds, ± half the distance from the lowest to the
highest; seeds change the noise, not the scenes."""


def _sizes(table: Mapping[str, Any]) -> str:
    done = sorted({(row["images"], row["seeds"]) for row in table["rows"] if row["seeds"]}, reverse=True)
    if not done:
        return "Not measured."
    images = " or ".join(str(number) for number in sorted({images for images, _ in done}))
    drawn = [row for row in table["rows"] if row["settings"]["pictures"] != "real"]
    seeds = " or ".join(str(number) for number in sorted({row["seeds"] for row in drawn}))
    return f"Pictures of a row and seed: {images}. Seeds: {seeds}."


def show_metric(name: str, metric: Mapping[str, Any] | None) -> str:
    """A number with its spread over seeds; – for one that was not measured."""
    if metric is None:
        return "–"
    spread = (metric["high"] - metric["low"]) / 2
    return show(name, metric["mean"]) + (f" ± {show(name, spread)}" if len(metric["by_seed"]) > 1 else "")


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
    """The table of numbers of instances: the real images' numbers stand in brackets beside the drawn ones'."""
    columns, cells = table["columns"], []
    for drawn, real in zip(table["rows"][::2], table["rows"][1::2], strict=True):
        line = [drawn["label"]]
        for name in columns:
            bound = real["metrics"].get(name)
            line.append(
                show_metric(name, drawn["metrics"].get(name))
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
            reached = "no, nor do real images"
        rows.append([item["target"], *map(percent, values), reached])
    text = "In percent, on the main scenes (2 to 6 instances): boxes for the first two, then the format named."
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
            differ.append(f"“{item['claim']}” (with it {_listed(lower)} {_be(lower)} lower{also})")
        elif higher:
            agree.append(f"“{item['claim']}”")
        elif verdicts:
            open_.append(f"“{item['claim']}”")
    sentences = []
    if agree:
        sentences.append(f"As in the paper: {_listed(agree)}.")
    if differ:
        sentences.append(f"Other than in the paper: {_listed(differ)}.")
    if open_:
        sentences.append(f"Not to be told from chance here: {_listed(open_)}.")
    head = ("claim of the paper", "number", "with", "without", "difference", "with it")
    if not rows:
        return "Not measured."
    text = (
        "Each part's effect, on the same scenes with the same noise. The error is the standard error over scenes; "
        "what is less than twice that counts as no difference. Found: the share of instances that the detector finds "
        "where they should be (IoU of at least 0.5)."
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
        f"Of one picture with {cost['instances']} instances (boxes), in a batch of {cost['pictures']}: seconds of one "
        "run after one to warm up, evaluations of the UNet for one latent, guidance included, operations (two a "
        "multiply-add, rows that fill up a batch included). Memory is what the batch's compiled program needs beside "
        "its arguments, from XLA's own analysis. A whole call also prepares layouts on the host."
    )
    head = ("part", "seconds", "UNet evaluations", "GFLOP", "temporary memory, MB")
    return f"{text}\n\n{_lines(head, rows)}"
