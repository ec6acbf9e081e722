"""Copies the benchmarks' tables to docs/performance.md.

    python docs/make_performance.py

A table between `<!-- table NAME -->` and `<!-- end -->` comes from benchmarks/results/NAME.json; without that file the
page says "Not measured." `<!-- table others -->` stands for the tables of GPUs and TPUs.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.tables import RESULTS, render  # noqa: E402

PAGE = ROOT / "docs" / "performance.md"
_TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def fill(text: str, results: Path = RESULTS) -> str:
    """The page with every table replaced by that of its file."""
    others = sorted(path for path in results.glob("*.json") if not path.stem.endswith("_cpu"))

    def table(match: re.Match) -> str:
        paths = others if match[2] == "others" else [results / f"{match[2]}.json"]
        bodies = [render(json.loads(path.read_text(encoding="utf-8"))) for path in paths if path.exists()]
        body = "\n".join(bodies) or "Not measured.\n"
        return f"{match[1]}{body}{match[3]}"

    return _TABLE.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
