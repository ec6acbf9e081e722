"""Runs every benchmark in its own process, and copies the tables to docs/performance.md.

    python -m benchmarks --reference InstanceDiffusion --compile

Flags are passed to every benchmark that has them. If a benchmark fails, the others still run; it is named at the end,
with exit code 1.
"""

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import cli, models, tables

WITH_BASELINE, WITHOUT_BASELINE = ("sampling", "unet", "train_step"), ("startup", "memory")


def main(argv: Sequence[str] | None = None) -> int:
    parser = cli.parser(__doc__)
    args = parser.parse_args(argv)
    given = {name: value for name, value in vars(args).items() if value != parser.get_default(name)}
    failed = []
    for name in WITH_BASELINE + WITHOUT_BASELINE:
        kept = {
            flag: value
            for flag, value in given.items()
            if name in WITH_BASELINE or flag in ("canvas", "output") or (flag == "model" and name == "memory")
        }
        flags = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in kept.items()]
        print(f"python -m benchmarks.{name} {' '.join(flags)}", flush=True)
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=models.ROOT, check=False
        ).returncode:
            failed.append(name)
    if args.output == tables.RESULTS:
        subprocess.run([sys.executable, "docs/make_performance.py"], cwd=models.ROOT, check=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
