"""What bfloat16 and 8-bit products change: the small model's latents, and how well its pictures follow their layouts.

    python -m benchmarks.precision --count 100

The same scenes, seeds and settings in each type. Distances are from float32's latents: the largest, relative to the
largest of float32's, and the root mean square, relative to float32's. AP50 and attributes are the study's, by its
detector (`projects/shapes`).
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import models, tables
from benchmarks.tables import Column
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error

TYPES = ("float32", "bfloat16", "int8", "fp8")


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, default=models.BOX)
    parser.add_argument("--segmenter", type=Path, default=models.BOX.with_name("shapes_segmenter"))
    parser.add_argument("--types", nargs="+", default=TYPES, choices=TYPES, help="float32 comes first in any case")
    parser.add_argument("--count", type=int, default=100, help="pictures of each type")
    parser.add_argument("--output", type=Path, default=tables.RESULTS, help="folder for the table")
    args = parser.parse_args(argv)
    if args.count < 2:
        raise InputError(f"--count: expected at least 2, got {args.count}")
    return args


def measure(args: argparse.Namespace, dtype: str, workdir: Path, latents: int = 8) -> tuple[dict[str, Any], np.ndarray]:
    """A row of the table, and the latents of the first scenes."""
    from instdiff_jax.evaluation.layouts import make_layout
    from projects.common.study.rows import Task
    from projects.common.study.runs import Study, StudySettings
    from projects.common.study.sections import BOX
    from projects.shapes.study import SUBJECT

    study = Study(StudySettings(args.checkpoint, args.segmenter, workdir, 64, args.count, dtype), SUBJECT)
    task = Task(BOX, 0, args.count)
    numbers = study.run(task, lambda: None)["metrics"]
    scenes = study.split(BOX.scenes, args.count).scenes[:latents]
    found = np.stack(
        [result.latents for result in study.pipeline()([make_layout(scene, BOX.format) for scene in scenes])]
    )
    wanted = {"ap50": "box_AP50", "colour": "colour_accuracy", "texture": "texture_accuracy", "fid": "FID"}
    return {"type": dtype} | {key: numbers.get(name) for key, name in wanted.items()}, found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    rows: list[dict[str, Any]] = []
    exact: np.ndarray | None = None
    for dtype in ("float32", *(name for name in args.types if name != "float32")):
        with tempfile.TemporaryDirectory() as folder:
            row, latents = measure(args, dtype, Path(folder))
        exact = latents.astype(np.float64) if exact is None else exact
        apart = latents - exact
        row["largest"] = float(np.abs(apart).max() / np.abs(exact).max())
        row["mean"] = float(np.sqrt(np.square(apart).mean() / np.square(exact).mean()))
        rows.append(row)
        print(row, flush=True)
    columns = [
        Column("type", "--dtype"),
        Column("largest", "latents: largest distance", ".1e"),
        Column("mean", "root mean square", ".1e"),
        Column("ap50", "AP50", ".3f"),
        Column("colour", "colour accuracy", ".3f"),
        Column("texture", "texture accuracy", ".3f"),
        Column("fid", "FID", ".2f"),
    ]
    notes = [f"The model in the repository, {args.count} pictures of 64x64, boxes, its own settings (DDIM, 10 steps)."]
    tables.write_table(args.output, "precision_box", "Types", columns, rows, notes)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
