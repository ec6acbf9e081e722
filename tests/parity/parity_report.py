"""Measures the numbers of tests/parity and writes docs/parity.md.

    python tests/parity/parity_report.py            # what runs in minutes on two cores
    python tests/parity/parity_report.py --full     # the 50-step samplers, training and the full-size UNet (7 GB) too
    python tests/parity/parity_report.py --only unet_full

What is not measured keeps its number in docs/parity.md.
"""

import argparse
import datetime
import gc
import platform
import sys
import time
from pathlib import Path

import jax

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

import conftest  # noqa: E402, F401  (matrix precision as in the tests)

HEADER = """# Parity with the official code

Every number of the official PyTorch code in `tests/parity/` (CPU, float32) and the error of ours. The error is
max|a − b| / max|b|, in float32 with full-precision matrix products. Exceptions: for norms of training it is the
largest relative difference of any parameter; for images, the largest difference of a pixel as a share of the 256
levels. The timestep embedding at large t has a tolerance of one float32 unit of an angle near 1000 instead of 2e-5,
because PyTorch's own float32 `exp` differs by that much between processors. PyTorch sums gradient norms in float32,
which is up to 2e-4 off for millions of numbers; ours are summed the same way. The weights are deterministic
(`tests/parity/weights.py`), so no weight file is needed. `full` is the released architecture.

Made by `python tests/parity/parity_report.py` ({date}, {machine}, jax {jax}). The tests assert the same tolerances.
`tests/parity/test_live_diffusers.py` (also every norm's epsilon, and gradients) and
`tests/parity/test_live_reference.py` compare with PyTorch code directly.

| file | entry | what of ours ran | error | tolerance |
| --- | --- | --- | --- | --- |
"""  # noqa: E501


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="also what takes minutes each, and 7 GB of memory")
    parser.add_argument("--only", nargs="+", help="files to measure, whatever they cost")
    parser.add_argument("--output", type=Path, default=ROOT / "docs" / "parity.md")
    args = parser.parse_args()
    import parity_data_checks  # noqa: F401  (adds its checks)
    from parity_checks import CHECKS

    errors = old_errors(args.output)
    failed = 0
    # The largest last: what is done is on screen if memory runs out.
    for check in sorted(CHECKS, key=lambda check: (check.cost == "full", check.cost == "slow")):
        if check.file not in args.only if args.only else check.cost != "fast" and not args.full:
            continue
        if check.cost == "full":
            free_memory()
        began = time.time()
        error = check.measure()
        ok = error <= check.tolerance  # False for NaN too
        failed += not ok
        mark = "ok" if ok else "TOO FAR"
        print(f"{check.file:28} {check.entry:28} {error:.2e} {mark} {time.time() - began:.1f} s", flush=True)
        errors[check.file, check.entry] = number(error)
    missing = [f"{check.file}: {check.entry}" for check in CHECKS if (check.file, check.entry) not in errors]
    text = HEADER.format(date=datetime.date.today(), machine=platform.machine(), jax=jax.__version__)
    for check in CHECKS:
        error = errors.get((check.file, check.entry), "not measured")
        text += f"| {check.file} | {check.entry} | {check.how} | {error} | {number(check.tolerance)} |\n"
    args.output.parent.mkdir(exist_ok=True)
    args.output.write_text(text, encoding="utf-8")
    print(f"{args.output}: {failed} too far, {len(missing)} not measured")
    return bool(failed)


def old_errors(path: Path) -> dict[tuple[str, str], str]:
    """The errors of a table written before, by file and entry."""
    if not path.exists():
        return {}
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return {(file, entry): error for file, entry, _, error, _ in table if error != "not measured"}


def free_memory() -> None:
    """Drops the parameters and programs of what was measured before."""
    import parity_checks

    import common

    networks = parity_checks._text_states, parity_checks.end_to_end, parity_checks._model_params
    for cached in (common.model_params, *networks):
        cached.cache_clear()
    jax.clear_caches()
    gc.collect()


def number(value: float) -> str:
    return "0" if value == 0 else f"{value:.1e}"


if __name__ == "__main__":
    sys.exit(main())
