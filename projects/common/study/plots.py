"""The study's plots, as PNG files."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from instdiff_jax.evaluation.report import label, lower_is_better

_COLOURS = ("#3366cc", "#cc5533", "#339966", "#8855aa")
_MORE = ("#8a6d3b", "#444444", "#d6a400", "#3aa6b9")


def draw_plots(results: Mapping[str, Any]) -> dict[str, bytes]:
    """The plots of the measured sections: name of the section to the bytes of its PNG."""
    makers = {
        "leakage": lambda table: _bars(table, ("colour_accuracy", "texture_accuracy", "colour_leak")),
        "instances": lambda table: _by_number(table, ("box_AP50", "colour_accuracy", "FID")),
        "alpha": lambda table: _sweep(table, "alpha", ("box_AP50", "colour_accuracy", "FID")),
        "mis": lambda table: _sweep(table, "mis", ("box_AP50", "colour_accuracy", "FID")),
        "guidance": lambda table: _sweep(table, "guidance_scale", ("box_AP50", "colour_accuracy", "FID")),
        "solvers": lambda table: _solvers(table, ("box_AP50", "colour_accuracy", "FID")),
    }
    made = {}
    for name, make in makers.items():
        table = results["tables"].get(name)
        if table is not None and any(row["metrics"] for row in table["rows"]):
            made[name] = make(table)
    return made


def _axes(metrics: Sequence[str]) -> tuple[Any, Sequence[Any]]:
    # Without pyplot, which needs a window system and keeps global figures.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4 * len(metrics), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        lower = lower_is_better(metric)
        axis.set_title(label(metric) + (" (lower is better)" if lower else ", %"), fontsize=10)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    # Without the library's version, so that equal numbers give equal bytes.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _line(
    axis: Any,
    metric: str,
    points: Sequence[tuple[float, Mapping[str, Any]]],
    name: str,
    colour: str,
    style: str = "-",
) -> None:
    """Draws means over seeds, with a band from lowest to highest."""
    points = sorted(((x, row["metrics"][metric]) for x, row in points if metric in row["metrics"]), key=lambda p: p[0])
    if not points:
        return
    times = 1 if metric == "FID" else 100
    xs = [x for x, _ in points]
    axis.plot(xs, [times * m["mean"] for _, m in points], style, marker="o", ms=4, color=colour, label=name)
    low, high = ([times * m[end] for _, m in points] for end in ("low", "high"))
    axis.fill_between(xs, low, high, color=colour, alpha=0.2, lw=0)


def _by_number(table: Mapping[str, Any], metrics: Sequence[str]) -> bytes:
    figure, axes = _axes(metrics)
    for axis, metric in zip(axes, metrics, strict=True):
        generated, real = (list(enumerate(table["rows"][first::2], 1)) for first in (0, 1))
        _line(axis, metric, generated, "generated", _COLOURS[0])
        _line(axis, metric, real, "real images", "#888888", "--")
        axis.set_xlabel("instances")
    axes[0].legend(fontsize=8)
    return _png(figure)


def _sweep(table: Mapping[str, Any], setting: str, metrics: Sequence[str]) -> bytes:
    figure, axes = _axes(metrics)
    points: dict[str, list] = {}
    for row in table["rows"]:
        value = row["settings"]["sampling"][setting]
        points.setdefault(row["settings"]["sampling"]["merge"], []).append(
            (value[0] if isinstance(value, (list, tuple)) else value, row)
        )
    for axis, metric in zip(axes, metrics, strict=True):
        for (merge, values), colour in zip(points.items(), _COLOURS, strict=False):
            _line(axis, metric, values, merge, colour)
        axis.set_xlabel(label(setting))
    if len(points) > 1:
        axes[0].legend(fontsize=8)
    return _png(figure)


def _solvers(table: Mapping[str, Any], metrics: Sequence[str]) -> bytes:
    if len({row["images"] for row in table["rows"] if row["seeds"]}) > 1:
        metrics = [metric for metric in metrics if metric != "FID"]  # it depends on the number of images
    figure, axes = _axes(metrics)
    points: dict[str, list] = {}
    for row in table["rows"]:
        sampling = row["settings"]["sampling"]
        points.setdefault(sampling["sampler"], []).append((sampling["steps"], row))
    for axis, metric in zip(axes, metrics, strict=True):
        for (sampler, values), colour in zip(points.items(), (*_COLOURS, *_MORE), strict=False):
            _line(axis, metric, values, sampler, colour)
        axis.set_xlabel("steps")
        axis.set_xscale("log")
        steps = sorted({step for values in points.values() for step, _ in values})
        axis.set_xticks(steps, [str(step) for step in steps])
        axis.minorticks_off()
    axes[0].legend(fontsize=8)
    return _png(figure)


def _bars(table: Mapping[str, Any], metrics: Sequence[str]) -> bytes:
    metrics = [metric for metric in metrics if metric in table["columns"]]
    figure, axes = _axes(metrics)
    rows = [row for row in table["rows"] if row["metrics"]]
    for axis, metric in zip(axes, metrics, strict=True):
        shown = [(k, row["metrics"][metric]) for k, row in enumerate(rows) if metric in row["metrics"]]
        means = [100 * m["mean"] for _, m in shown]
        # The mean of equal numbers may differ from them by rounding.
        errors = [
            [100 * max(m["mean"] - m["low"], 0) for _, m in shown],
            [100 * max(m["high"] - m["mean"], 0) for _, m in shown],
        ]
        colours = [_COLOURS[0] if rows[k]["settings"]["pictures"] != "real" else "#888888" for k, _ in shown]
        axis.barh([k for k, _ in shown], means, xerr=errors, color=colours, height=0.6)
        axis.set_yticks(range(len(rows)), [row["label"] * (axis is axes[0]) for row in rows], fontsize=8)
        axis.invert_yaxis()
    return _png(figure)
