"""The command of a study: generates images, measures them, and writes a page, its plots and its numbers as JSON.

The scenes have seeds that no training data has. Images and numbers are kept in the workdir: an interrupted study, or
one with more images, seeds or sections, does only what is missing. The most important tables come first, and the first
seed of every table before the second of any. `--minutes` stops early and writes the page from what is done.
`sections.py` lists the tables.

A run of some sections writes its own page; `--into docs` puts its tables into the complete one.
"""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.files import read_json
from projects.common.study.rows import Subject, Task
from projects.common.study.sections import COST, FEWER, NAMES, Sizes, make_sections, make_tasks, row_keys

# Metrics printed after each row.
_PRINTED = ("box_AP50", "mask_IoU", "colour_accuracy", "FID")


class Defaults(NamedTuple):
    """Defaults of a world's flags; `size` is the side of the images in pixels."""

    checkpoint: str
    segmenter: str
    workdir: str
    size: int


def study_parser(module: str, defaults: Defaults) -> ArgumentParser:
    """The flags that all worlds have."""
    parser = ArgumentParser(
        prog=f"python -m {module}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    checkpoint, segmenter, workdir = map(Path, defaults[:3])
    add("--checkpoint", type=Path, default=checkpoint, help="a checkpoint folder or a training workdir")
    add("--segmenter", type=Path, default=segmenter, help="folder of the detector")
    add("--workdir", type=Path, default=workdir, help="folder for scenes, images and numbers")
    add("--docs", type=Path, help="folder for the page and its figures (default: docs; WORKDIR/page with --sections)")
    add("--into", type=Path, help="with --sections: the folder of a complete page that takes these tables")
    add("--sections", default=",".join(NAMES), help="tables, separated by commas (default: all)")
    add("--count", type=int, default=500, help="images per row and seed in the main tables (default 500)")
    add("--seeds", type=int, default=3, help="seeds in the main tables (default 3)")
    add("--small_count", type=int, default=100, help="images per row and seed in the other tables (default 100)")
    add("--small_seeds", type=int, default=2, help="seeds in the other tables (default 2)")
    add("--reference_count", type=int, default=500, help="real images that FID compares with (default 500)")
    add("--size", type=int, default=defaults.size, help=f"side of the images in pixels (default {defaults.size})")
    add("--steps", type=int, help="solver steps, unless a row sets them (default: the checkpoint's)")
    add("--minutes", type=float, help="stop after this many minutes")
    add("--dtype", choices=("float32", "bfloat16", "float16", "int8", "fp8"), help="default: float32 on a CPU")
    add("--max_rows", type=int, help="latents denoised at a time; fewer need less memory")
    return parser


def check_args(args: argparse.Namespace) -> list[str]:
    """Returns the requested sections, most important first; InputError for bad flags."""
    wanted = [name for name in args.sections.split(",") if name]
    for name in wanted:
        if name not in NAMES:
            raise InputError(f"--sections: expected some of {', '.join(NAMES)}, got {name!r}")
    if not wanted:
        raise InputError(f"--sections: expected some of {', '.join(NAMES)}, got none")
    least = {"count": 2, "small_count": 2, "seeds": 1, "small_seeds": 1, "reference_count": 2, "size": 32, "minutes": 0}
    for name, low in (least | {"max_rows": 1, "steps": 1}).items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise InputError(f"--{name}: expected a number of at least {low}, got {value}")
    return [name for name in NAMES if name in wanted]


def run(args: argparse.Namespace, command: str, find_subject: Callable[[argparse.Namespace], Subject]) -> None:
    """Measures what is missing and writes the page."""
    names, sizes = check_args(args), Sizes(args.count, args.seeds, args.small_count, args.small_seeds)
    subject = find_subject(args)
    sections = make_sections(subject, names)

    # Imported here, so that a bad flag is reported without waiting for jax.
    from instdiff_jax.evaluation.report import metrics_line
    from instdiff_jax.parallel.runtime import set_up_compilation
    from instdiff_jax.sampling.loading import choose_dtype
    from projects.common.study.cost import known_cost, measure_cost, option_costs
    from projects.common.study.report import merge_tables, write_study
    from projects.common.study.results import make_results
    from projects.common.study.runs import Study, StudySettings, TimeUp

    set_up_compilation()
    dtype = choose_dtype(args.dtype)
    flags = ("checkpoint", "segmenter", "workdir", "size", "reference_count", "steps", "max_rows")
    study = Study(StudySettings(**{name: getattr(args, name) for name in flags}, dtype=dtype), subject)
    tasks = make_tasks(sections, sizes, study.sampling)
    numbers = {key: found for key, task in tasks.items() if (found := study.done(task)) is not None}
    cost = known_cost(study) if COST in names else None
    start = time.monotonic()

    def check_time() -> None:
        if args.minutes is not None and time.monotonic() - start > 60 * args.minutes:
            raise TimeUp

    waiting = [key for key in tasks if key not in numbers]
    try:
        for number, (name, seed, count) in enumerate(waiting, 1):
            check_time()
            if COST in names and cost is None and seed > 0:
                cost = measure_cost(study)
            begin = time.monotonic()
            found = study.run(tasks[name, seed, count], check_time)
            numbers[name, seed, count] = found
            shown = metrics_line({metric: found["metrics"].get(metric) for metric in _PRINTED})
            seconds = time.monotonic() - begin
            what = f"{number}/{len(waiting)} {name}, seed {seed}, {count} images"
            print(f"{what}: {shown} ({seconds:.0f} s)", flush=True)
        if COST in names and cost is None:
            check_time()
            cost = measure_cost(study)
    except TimeUp:
        print(f"--minutes {args.minutes:g} are over; the page says what was not measured", file=sys.stderr)
    for row in sections[FEWER].rows if FEWER in sections else ():
        for key in row_keys(row, sections[FEWER], sizes, study.sampling):
            if key in numbers:
                numbers[key]["metrics"] |= option_costs(study, Task(row, *key[1:]), numbers)
    results, docs = make_results(study, names, sizes, numbers, cost, command), args.docs
    if args.into is not None:
        docs, results = args.into, merge_tables(read_json(args.into / f"{subject.page}.json"), results)
    elif docs is None:
        # A page of some sections must not replace the complete one.
        docs = Path("docs") if names == list(NAMES) else args.workdir / "page"
    write_study(results, docs)
    print(f"written: {docs / subject.page}.md")


def main(
    parser: ArgumentParser, argv: Sequence[str] | None, find_subject: Callable[[argparse.Namespace], Subject]
) -> None:
    """The command line of a world.

    Args:
        parser: of `study_parser`, perhaps with more flags.
        argv: the flags; those of the process by default.
        find_subject: parsed flags → what the study is about.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    args = parser.parse_args(argv)
    with exit_on_input_error():
        # Without --minutes, so that the command on the page measures everything in one run.
        flags = re.sub(r"--minutes[= ]\S+ ?", "", shlex.join(argv))
        run(args, f"{parser.prog} {flags}".rstrip(), find_subject)
