"""Every benchmark, one after another, each in a process of its own; then their tables go into docs/performance.md.

    python -m benchmarks --reference InstanceDiffusion --compile

Flags go to every benchmark that has them. A benchmark that could not be done is named at the end, with exit code 1; the
others have run.
"""

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import common

# With a baseline, and without.
BESIDE, ALONE = ("sampling", "unet", "train_step"), ("startup", "memory")


def main(argv: Sequence[str] | None = None) -> int:
    parser = common.parser(__doc__)
    args = parser.parse_args(argv)
    given = {action.dest: getattr(args, action.dest) for action in parser._actions if action.dest != "help"}
    given = {name: value for name, value in given.items() if value != parser.get_default(name)}
    failed = []
    for name in BESIDE + ALONE:
        kept = {
            flag: value
            for flag, value in given.items()
            if name in BESIDE or flag in ("canvas", "output") or (flag == "model" and name == "memory")
        }
        flags = [f"--{flag}" if value is True else f"--{flag}={value}" for flag, value in kept.items()]
        print(f"python -m benchmarks.{name} {' '.join(flags)}", flush=True)
        if subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *flags], cwd=common.ROOT, check=False
        ).returncode:
            failed.append(name)
    if args.output == common.RESULTS:
        subprocess.run([sys.executable, "docs/make_performance.py"], cwd=common.ROOT, check=True)
    if failed:
        print(f"not done: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
