"""parity_report.py, and how errors are joined: a NaN never passes."""

import math
import sys

import numpy as np
import parity_checks
import parity_report
import pytest

from common import relative_error, worst


@pytest.mark.parametrize("errors", [[math.nan, 1e-9], [1e-9, math.nan], [0.0, math.nan, 0.0]])
def test_the_worst_of_errors_with_a_nan_is_nan(errors):
    assert math.isnan(worst(errors))


@pytest.mark.parametrize("place", [0, 1])
def test_the_error_of_arrays_with_a_nan_passes_no_tolerance(place):
    pair = [np.ones(3), np.ones(3)]
    pair[place] = np.array([1.0, np.nan, 1.0])
    assert not relative_error(*pair) <= 1e9


@pytest.mark.parametrize(("error", "failed"), [(1e-9, False), (1e-6, True), (math.nan, True), (math.inf, True)])
def test_a_check_that_gives_nan_fails_the_report(error, failed, tmp_path, monkeypatch, capsys):
    check = parity_checks.Check("schedule", "betas", "made up", 1e-7, lambda: error)
    monkeypatch.setattr(parity_checks, "CHECKS", [check])
    monkeypatch.setattr(sys, "argv", ["parity_report.py", "--output", str(tmp_path / "parity.md")])
    assert parity_report.main() == failed
    assert ("TOO FAR" in capsys.readouterr().out) == failed
