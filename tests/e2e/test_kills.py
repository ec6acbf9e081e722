"""Commands that are killed at random moments: nothing is lost or hidden, and the next start leaves nothing behind.

They are slow. The short ones kill each command twice. INSTDIFF_KILLS sets the number for the long ones (default 50 for
a training run, 100 for all other commands together).
"""

import os

import kill_cases
import pytest

WRITERS = "to_pytorch,convert,build-coco,evaluate,sample"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return kill_cases.make_inputs(tmp_path_factory.mktemp("inputs"))


def check_writers(reports):
    assert reports
    for report in reports:
        assert not report["after"] and not report["orphans"], report


def check_training(reports):
    *kills, end = reports
    for report in kills:
        assert report["workers"] and report["memory"] and not report["back"], report
    assert end["equal"] and end["resumed"] and end["memory"] and not end["after"] and not end["orphans"], end


@pytest.mark.slow
def test_killed_commands(inputs, tmp_path):
    check_writers(kill_cases.start(inputs, tmp_path, 2, WRITERS))


@pytest.mark.slow
def test_killed_training(inputs, tmp_path):
    check_training(kill_cases.start(inputs, tmp_path, 2, "train"))


@pytest.mark.slow
def test_training_killed_many_times(inputs, tmp_path):
    check_training(kill_cases.start(inputs, tmp_path, int(os.environ.get("INSTDIFF_KILLS", 50)), "train", 1))


@pytest.mark.slow
def test_commands_killed_many_times(inputs, tmp_path):
    kill_cases.start(inputs, tmp_path, 0, "train")  # a run to export
    (tmp_path / "straight").rename(inputs / "run")
    each = -(-int(os.environ.get("INSTDIFF_KILLS", 100)) // 6)
    check_writers(kill_cases.start(inputs, tmp_path, each, f"{WRITERS},export", 1))
