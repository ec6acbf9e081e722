"""Measures every number of tests/parity and writes docs/parity.md.

    python tests/parity_report.py            # what runs in minutes on two cores
    python tests/parity_report.py --full     # the 50-step samplers, training and the full-size UNet (10 GB) too

"""

import argparse
import datetime
import platform
import sys
import time
from pathlib import Path

import conftest  # noqa: F401  (imports and matrix precision as in the tests)
import jax

ROOT = Path(__file__).resolve().parent.parent
HEADER = """# Parity with the official code

Every number of the official PyTorch code in `tests/parity/` (CPU, float32), and how close ours is: error is
max|a − b| / max|b| in float32 with full-precision matrix products; for norms of training, the worst parameter's
relative difference; for pictures, the largest difference of a pixel out of 255 levels. Weights are deterministic
(`tests/parity/weights.py`), so no weight file is needed. What the files hold is in the first column's name; `full` is
the released architecture.

Made by `python tests/parity_report.py --full` on {date} ({machine}, jax {jax}); the tests assert the same tolerances.

| file | entry | measured on | error | tolerance |
| --- | --- | --- | --- | --- |
"""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also what takes minutes each, and 10 GB of memory")
    parser.add_argument("--only", nargs="+", help="files to measure; prints, and writes nothing")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "parity.md")
    args = parser.parse_args()
    import parity_data_checks  # noqa: F401  (adds its checks)
    from parity_checks import CHECKS

    checks = [check for check in CHECKS if args.full or args.only or check.cost == "fast"]
    checks = [check for check in checks if not args.only or check.file in args.only]
    # The largest last: what is done is on screen if memory runs out.
    checks.sort(key=lambda check: (check.cost == "full", check.cost == "slow"))
    errors = {}
    for check in checks:
        began = time.time()
        errors[check] = check.measure()
        mark = "ok" if errors[check] <= check.tolerance else "TOO FAR"
        print(f"{check.file:28} {check.entry:28} {errors[check]:.2e} {mark} {time.time() - began:.1f} s", flush=True)
    failed = [check for check, error in errors.items() if error > check.tolerance]
    if args.only:
        return bool(failed)
    rows = [
        f"| {check.file} | {check.entry} | {check.how} | {number(errors[check])} | {number(check.tolerance)} |"
        for check in sorted(errors, key=CHECKS.index)
    ]
    left = [f"{check.file}: {check.entry}" for check in CHECKS if check not in errors]
    text = HEADER.format(date=datetime.date.today(), machine=platform.machine(), jax=jax.__version__) + "\n".join(rows)
    if left:
        text += "\n\nNot measured without `--full`: " + "; ".join(left) + "."
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(text + "\n", encoding="utf-8")
    print(f"{len(errors)} numbers, {len(failed)} too far; {args.output}")
    return bool(failed)


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
