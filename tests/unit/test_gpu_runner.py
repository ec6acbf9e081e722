"""The GPU runner's budget and its rows' processes; benchmarks/gpu.py."""

import json
import os
import sys
import time
from pathlib import Path

import pytest

from benchmarks import gpu
from benchmarks.gpu import Outcome, Report, Row
from instdiff_jax.errors import InputError

ROWS = tuple(Row(f"row{i}", f"number {i}", seconds, 1) for i, seconds in enumerate((60, 100, 200, 150, 50, 20, 20)))


@pytest.mark.parametrize("pace", [0.5, 1.0, 1.7, 3.0])
def test_the_budget_is_kept_on_a_slow_machine(pace):
    """Each row takes `pace` times its estimate; none is begun that will not fit, once one has shown the pace."""
    now, outcomes = [0.0], {}

    def launch(row, left):
        taken = pace * row.seconds
        now[0] += min(taken, left)
        return Outcome("done" if taken <= left else "stopped", why="" if taken <= left else "over")

    gpu.run_rows(ROWS, 540, launch, lambda row, outcome: outcomes.update({row.name: outcome}), lambda: now[0])
    whole = pace * sum(row.seconds for row in ROWS)
    assert min(whole, 0.9 * 540) <= now[0] <= 540
    assert list(outcomes) == [row.name for row in ROWS]
    states = [outcome.state for outcome in outcomes.values()]
    assert "stopped" not in states and "done" in states
    assert ("left out" in states) == (pace >= 1)
    for outcome in outcomes.values():
        assert outcome.state != "left out" or "needs about" in outcome.why


def test_the_first_row_is_stopped_at_the_end_of_the_time():
    now, outcomes = [0.0], {}

    def launch(row, left):
        now[0] += left
        return Outcome("stopped")

    gpu.run_rows(ROWS, 70, launch, lambda row, outcome: outcomes.update({row.name: outcome}), lambda: now[0])
    assert now[0] == 70
    assert [outcome.state for outcome in outcomes.values()] == ["stopped"] + ["left out"] * 6


_SCRIPTS = {
    # A worker outlives its parent's end unless the whole group is ended.
    "slow": "import subprocess, time; child = subprocess.Popen(['sleep', '99'])\n"
    "write(dict(lines=[dict(what='half', ours='1 s', child=child.pid)])); time.sleep(99)",
    "raises": "write(dict(lines=[], raw=[])); raise RuntimeError('out of memory')",
    "crashes": "import os; os.kill(os.getpid(), 11)",
    "side": "write(dict(lines=[dict(what='a|b', ours='2 s')], raw=[dict(official_failed='RuntimeError: it')]))",
    "good": "write(dict(lines=[dict(what='all', ours='3 s', aim='4')], raw=[dict(x=1)], machine=dict(device='card')))",
}


def test_rows_that_fail_are_results_and_the_others_run(tmp_path):
    """Partial results of a stopped row and tracebacks of failed ones are in both files after every row."""
    rows = [Row(name, f"title of {name}", 1, 1) for name in _SCRIPTS]
    report, seen = Report(tmp_path, ["Note."]), []

    def launch(row, left):
        path = tmp_path / f"{row.name}.json"
        start = f"import json, time; write = lambda found: open({str(path)!r}, 'w').write(json.dumps(found))\n"
        return gpu.launch_process([sys.executable, "-c", start + _SCRIPTS[row.name]], path, 2, dict(os.environ))

    def done(row, outcome):
        report.add(row, outcome)
        seen.append(list(json.loads((tmp_path / "gpu.json").read_text())["rows"]))

    gpu.run_rows(rows, 60, launch, done)
    assert seen == [list(_SCRIPTS)[: i + 1] for i in range(len(rows))]
    found = report.outcomes
    assert [found[name].state for name in _SCRIPTS] == ["stopped", "failed", "failed", "failed", "done"]
    assert found["slow"].lines[0]["ours"] == "1 s"
    with pytest.raises(ProcessLookupError):  # the row's own child is gone
        for _ in range(100):
            os.kill(found["slow"].lines[0]["child"], 0)
            time.sleep(0.02)
    assert "RuntimeError: out of memory" in found["raises"].log and "Traceback" in found["raises"].log
    assert found["crashes"].why == "signal 11" and found["side"].why == "a side failed"
    assert Report.opened(tmp_path, ["Note."]).outcomes == found
    with pytest.raises(InputError, match="results of other flags: Note."):
        Report.opened(tmp_path, ["Another."])


def test_the_page_has_every_row(tmp_path):
    report = Report(tmp_path, ["Note."])
    report.add(gpu.ROWS[0], Outcome("done", 3.0, lines=[dict(what="a|b", ours="1 s")], machine=dict(device="card")))
    report.add(gpu.ROWS[1], Outcome("failed", 2.0, why="exit code 1", log="Traceback\nError: x"))
    report.add(gpu.ROWS[2], Outcome("left out", why="needs about 9 s; 1 s were left"))
    text = (tmp_path / "gpu.md").read_text()
    assert text.startswith("**On a GPU**: card; . Note.")
    assert "| checks | a/b | 1 s | – | – | – | – |" in text
    assert "| one | one picture of 6 instances, MIS 0.36, 50 steps | – | – | – | – | failed: exit code 1 |" in text
    assert "left out: needs about 9 s" in text and "```\nTraceback\nError: x\n```" in text
    assert "checks 3, one 2." in text


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--minutes", "0"], "--minutes: expected a number above 0"),
        (["--minutes", "1", "--model", "huge"], "--model huge: expected one of full, small, tiny"),
        (["--minutes", "1", "--reference", "/nowhere"], "--reference /nowhere: expected a clone"),
        (["--minutes", "1"], "no GPU on this machine"),
    ],
)
def test_flags_are_checked_before_anything_runs(flags, words, monkeypatch):
    monkeypatch.setattr(Path, "glob", lambda *_: iter(()))
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(InputError, match=words):
        gpu.parse_args(flags)
