"""What the field's benchmarks publish: COCO-MIG's own file, and the rows that others have printed.

INSTDIFF_MIGC=MIGC python -m pytest tests/unit/test_published.py reads the file in a clone of https://github.com/limuloo/MIGC.
"""

import os
from collections import Counter
from pathlib import Path

import pytest

from instdiff_jax.evaluation.benchmarks import coco_mig, layoutsam, overlaybench
from instdiff_jax.evaluation.benchmarks.run import BENCHMARKS, read_cases

MIGC = os.environ.get("INSTDIFF_MIGC")


@pytest.mark.skipif(not MIGC, reason="INSTDIFF_MIGC does not name a clone of limuloo/MIGC")
def test_coco_migs_own_file():
    cases = read_cases(BENCHMARKS["coco-mig"], Path(MIGC) / "bench_file" / "mig_bench_anno.yaml")
    assert Counter(case.level for case in cases) == dict.fromkeys(coco_mig.LEVELS, 160)
    assert sum(len(case.things) for case in cases) == 3200
    assert {thing.detail for case in cases for thing in case.things} == set(coco_mig.COLOURS)
    assert len({case.file for case in cases}) == 800


def test_printed_rows_are_shares_of_columns_that_the_tables_have():
    columns = {
        "coco-mig": {f"{name} {level}" for name in ("mIoU", "ISR", "SR") for level in (*coco_mig.LEVELS, "all")},
        "layoutsam": {"spatial", *layoutsam.ATTRIBUTES},
        "overlaybench": {
            f"{name} {part}" for name in ("mIoU", "O-mIoU", "SR_E", "SR_R") for part in overlaybench.SPLITS
        },
    }
    for name, benchmark in BENCHMARKS.items():
        for row in benchmark.published:
            assert "arXiv" in row.source or "https://" in row.source
            assert set(row.numbers) <= columns.get(name, set(row.numbers)), name
            assert all(0 < value < 1 or column == "FID" for column, value in row.numbers.items()), name
    ours = [row for row in BENCHMARKS["overlaybench"].published if row.method == "InstanceDiffusion"]
    assert (ours[0].numbers["O-mIoU hard"], ours[0].numbers["SR_E simple"]) == pytest.approx((0.2563, 0.7771))
