"""Long runs: many cases of a family in processes of their own.

    python -m tests.fuzz --family layouts --count 4000 --jobs 2
    python -m tests.fuzz --family layouts --seed 1234 --count 1      # one case again

Prints how many gave a result and how many were refused, the slowest case, the largest memory, and every failure with
the number that `--seed` takes.
"""

import argparse
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "parity")]

from tests.fuzz.cases import FAMILIES, Outcome, root_of_cases  # noqa: E402
from tests.fuzz.workers import Worker  # noqa: E402


def run(family: str, first: int, count: int, jobs: int) -> list[Outcome]:
    """The outcomes of `count` cases."""
    numbers, outcomes, lock = iter(range(first, first + count)), [], threading.Lock()

    def loop(folder: Path) -> None:
        worker = Worker(family, folder)
        while True:
            with lock:
                number = next(numbers, None)
            if number is None:
                return worker.stop(wait=20)
            outcome = worker.run(number)
            outcomes.append(outcome)
            if outcome.failure:
                print(f"--- {family} --seed {number} ({outcome.kind})\n{outcome.failure}\n", flush=True)

    root = Path(tempfile.mkdtemp(dir=root_of_cases(), prefix="instdiff_fuzz_"))
    try:
        threads = [threading.Thread(target=loop, args=(root / str(job),)) for job in range(jobs)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return outcomes


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__.splitlines()[0])
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--count", type=int, help="cases; default: those of a long run")
    parser.add_argument("--seed", type=int, default=0, help="number of the first case")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--show", action="store_true", help="print how every case ended")
    args = parser.parse_args()
    failed = 0
    for family in args.family:
        began = time.monotonic()
        outcomes = run(family, args.seed, FAMILIES[family][0] if args.count is None else args.count, args.jobs)
        ends = Counter(outcome.result.partition(":")[0] for outcome in outcomes)
        failures = [outcome for outcome in outcomes if outcome.failure]
        slowest, largest = max(outcomes, key=lambda o: o.seconds), max(outcomes, key=lambda o: o.bytes)
        if args.show:
            for outcome in sorted(outcomes, key=lambda o: o.number):
                print(outcome.number, outcome.kind, outcome.result[:300])
        print(
            f"{family}: {len(outcomes)} cases, {ends['result']} results, {ends['refused']} refused, "
            f"{len(failures)} failures; slowest {slowest.seconds:.2f} s (--seed {slowest.number}), largest memory "
            f"{largest.bytes / 1e6:.0f} MB (--seed {largest.number}); {time.monotonic() - began:.0f} s in all",
            flush=True,
        )
        failed += len(failures)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
