"""A short run of every family; `python -m tests.fuzz` runs long ones."""

import pytest

from tests.fuzz.cases import FAMILIES, open_family, run_case, run_valid

pytest.importorskip("torch")


@pytest.mark.parametrize("family", FAMILIES)
def test_changed_inputs_give_a_result_or_one_line(family, tmp_path):
    kinds = open_family(family, tmp_path / "shared")
    run_valid(kinds, tmp_path)
    outcomes = [run_case(family, kinds, number, tmp_path) for number in range(FAMILIES[family][1])]
    failed = [f"--family {family} --seed {one.number} ({one.kind}): {one.failure}" for one in outcomes if one.failure]
    assert not failed, "\n\n".join(failed)
    assert any(one.result == "result" for one in outcomes)
