"""Time of a training step, compared to the official trainer.

    python -m benchmarks.train_step --reference InstanceDiffusion --batch 8

Both sides get precomputed latents and text embeddings. A step is the loss, the gradient, AdamW, and the moving average
of the parameters. Ours computes gradients of the trained parameters only. The official trainer computes all gradients,
with activation checkpointing and, on a GPU, float16 autocast, as released.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import cli, processes, tables
from benchmarks.processes import Worker
from benchmarks.tables import Column
from instdiff_jax.errors import exit_on_input_error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", help="images per step; default 1 8 32, on a CPU 1")
    parser.add_argument("--remat", default="none", choices=("none", "blocks", "dots"), help="as config.train.remat")
    return parser.parse_args(argv)


COLUMNS = [
    Column("batch", "images a step"),
    Column("seconds", "s", ".3f"),
    Column("rate", "images/s", ".2f"),
    Column("utilisation", "FLOP utilisation", ".0%"),
    Column("peak", "peak GB", ".2f"),
    Column("compile", "compile s", ".1f"),
]


def measure(workers: dict[str, Worker], batch: int, remat: str, repeats: int) -> dict[str, Any]:
    """One row of the table."""
    rate = workers["ours"].matmul_rate()
    row: dict[str, Any] = dict(batch=batch)
    ready = {}
    for name, worker in workers.items():
        options = (batch, remat) if name == "ours" else (batch,)
        try:
            worker.prepare_training(*options)
            worker.reset_peak()
            if name == "ours":
                row["compile"] = worker.compile_seconds("train")
            worker.train()
        except RuntimeError as error:
            row[f"{name}_failed"] = processes.failure(error)
            continue
        ready[name] = worker
    taken = processes.alternate({name: worker.train for name, worker in ready.items()}, repeats, failed=row)
    for name, worker in ((name, ready[name]) for name in taken):
        prefix = "" if name == "ours" else f"{name}_"
        row[f"{prefix}seconds"], row[f"{prefix}rate"] = taken[name], batch / taken[name]
        row[f"{prefix}peak"] = worker.peak() / 1e9
        if prefix and "ours" in taken:
            row[f"{name}_ratio"] = taken[name] / taken["ours"]
    if "ours" in taken:
        row["utilisation"] = workers["ours"].train_flops() / taken["ours"] / rate
    return row


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = cli.choose(args)
    rows, names = [], ["ours"]
    for batch in args.batch or ([1] if cli.on_cpu() else [1, 8, 32]):
        workers = cli.sides(args, model, dtype)  # new processes, as the peak of an accelerator's memory only grows
        rows.append(measure(workers, batch, args.remat, args.repeats))
        names = list(workers)
        for worker in workers.values():
            worker.close()
    columns = COLUMNS + tables.baseline_columns(names, seconds=".3f")
    notes = [f"{cli.about(args, model, dtype)}, remat {args.remat}."]
    tables.write_table(args.output, f"train_step_{model.name}_{dtype}", "Training step", columns, rows, notes)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
