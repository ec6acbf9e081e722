"""Facts about the machine, and tables as JSON and Markdown."""

import datetime
import json
import math
import os
import platform
import re
import subprocess
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models import ROOT
from benchmarks.processes import cores
from instdiff_jax.analysis.chips import processor_name

RESULTS = ROOT / "benchmarks" / "results"


def machine_facts() -> dict[str, Any]:
    """What the numbers depend on: device, versions, commit, and the load of the machine."""
    import jax

    device = jax.devices()[0]
    versions = {name: _version(name) for name in ("jax", "jaxlib", "flax", "torch", "numpy")}
    return dict(
        date=datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        platform=device.platform,
        device=processor_name() if device.platform == "cpu" else device.device_kind,
        cores=cores(),
        load=round(os.getloadavg()[0], 2),
        python=platform.python_version(),
        commit=_commit(),
        **versions,
    )


def machine_line() -> str:
    """What the numbers of a benchmark that only prints depend on."""
    facts = machine_facts()
    names = f"jax {facts['jax']}, torch {facts['torch']}, load {facts['load']}"
    return f"{facts['device']}, {facts['cores']} cores, {names}"


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"


def _commit() -> str:
    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


class Column(NamedTuple):
    """A column of a table: the key of its value in a row, its heading, and its number format."""

    key: str
    heading: str
    format: str = ""


def baseline_columns(names: Sequence[str], seconds: str = ".2f", difference: bool = False) -> list[Column]:
    """Columns of the baselines (all sides but ours).

    Args:
        names: of the sides; the first is ours.
        seconds: number format of seconds.
        difference: whether rows have the difference of outputs.
    """
    found = []
    for name in names[1:]:
        found += [
            Column(f"{name}_seconds", f"{name}: s", seconds),
            Column(f"{name}_peak", "peak GB", ".2f"),
            Column(f"{name}_ratio", "its time / ours", ".2f"),
            *([Column(f"{name}_difference", "difference", ".1e")] if difference else []),
        ]
    return found


def write_table(
    folder: Path,
    name: str,
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Mapping[str, Any]],
    notes: Sequence[str] = (),
    show: bool = True,
) -> None:
    """Prints a table and writes it to NAME_DEVICE.json and .md.

    Args:
        folder: where to write.
        name: of the files.
        title: of the table.
        columns: of the table.
        rows: values by the columns' keys; errors in them (keys that end in _failed) are added to the notes.
        notes: sentences above the table.
        show: False for a table that is not complete yet: it is not printed.
    """
    notes = [*notes, *sorted({f"{k}: {v}" for row in rows for k, v in row.items() if k.endswith("_failed")})]
    machine = machine_facts()
    report = dict(title=title, machine=machine, notes=list(notes), columns=[list(c) for c in columns], rows=list(rows))
    device = "cpu" if machine["platform"] == "cpu" else re.sub(r"\W+", "_", machine["device"]).lower()
    text = render(report)
    if show:
        print(text, flush=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}_{device}.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / f"{name}_{device}.md").write_text(text)


def render(report: Mapping[str, Any]) -> str:
    """A saved table as Markdown: title, machine, notes, rows."""
    machine = report["machine"]
    lines = [
        f"**{report['title']}**: {machine['device']}, {machine['cores']} cores, load {machine['load']} at the end; "
        f"jax {machine['jax']}, torch {machine['torch']}; commit {machine['commit']}, {machine['date']}.",
        *report["notes"],
    ]
    columns = [Column(*column) for column in report["columns"]]
    table = [[c.heading for c in columns], ["---" for _ in columns]]
    table += [[_cell(row.get(c.key), c.format) for c in columns] for row in report["rows"]]
    return "\n\n".join([" ".join(lines), "\n".join("| " + " | ".join(row) + " |" for row in table)]) + "\n"


def _cell(value: Any, form: str) -> str:
    if value is None or isinstance(value, float) and math.isnan(value):
        return "–"
    return value if isinstance(value, str) else format(value, form)
