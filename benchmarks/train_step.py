"""How long a training step takes, beside the official trainer's.

    python -m benchmarks.train_step --reference InstanceDiffusion --batch 8

Latents and text are ready on both sides: the step is the loss, the gradient of what the paper trains, AdamW and the
average of the parameters. Ours makes gradients of the trained parameters only; the official one of all of them, in
float16 autocast on a GPU and with its activation checkpointing, as released.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Column
from instdiff_jax.errors import exit_on_input_error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--batch", type=int, nargs="+", help="images of a step; default 1 8 32, on a CPU 1")
    parser.add_argument("--remat", default="none", choices=("none", "blocks", "dots"), help="as config.train.remat")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = common.choose(args)
    rows = []
    for batch in args.batch or ([1] if common.on_cpu() else [1, 8, 32]):
        workers = common.sides(args, model, dtype)  # fresh ones: an accelerator's peak of memory only grows
        rate = workers["ours"].matmul_rate()
        row: dict[str, Any] = dict(batch=batch)
        asked = {}
        for name, worker in workers.items():
            options = (batch, args.remat) if name == "ours" else (batch,)
            try:
                worker.prepare_training(*options)
                worker.reset_peak()
                if name == "ours":
                    row["compile"] = worker.compile_seconds("train")
                worker.train()
            except RuntimeError as error:
                row[f"{name}_failed"] = common.failure(error)
                continue
            asked[name] = worker
        taken = common.alternate({name: worker.train for name, worker in asked.items()}, args.repeats, failed=row)
        for name, worker in ((name, asked[name]) for name in taken):
            prefix = "" if name == "ours" else f"{name}_"
            row[f"{prefix}seconds"], row[f"{prefix}rate"] = taken[name], batch / taken[name]
            row[f"{prefix}peak"] = worker.peak() / 1e9
            if prefix and "ours" in taken:
                row[f"{name}_ratio"] = taken[name] / taken["ours"]
        if "ours" in taken:
            row["utilisation"] = workers["ours"].train_flops() / taken["ours"] / rate
        rows.append(row)
        names = list(workers)
        for worker in workers.values():
            worker.close()

    columns = [
        Column("batch", "images a step"),
        Column("seconds", "s", ".3f"),
        Column("rate", "images/s", ".2f"),
        Column("utilisation", "FLOP utilisation", ".0%"),
        Column("peak", "peak GB", ".2f"),
        Column("compile", "compile s", ".1f"),
    ]
    for name in names[1:]:
        columns += [
            Column(f"{name}_seconds", f"{name}: s", ".3f"),
            Column(f"{name}_peak", "peak GB", ".2f"),
            Column(f"{name}_ratio", "its time / ours", ".2f"),
        ]
    notes = [f"Model {model.name}, {model.canvas}x{model.canvas} pixels, {dtype}, remat {args.remat}."]
    common.write_table(args.output, f"train_step_{model.name}_{dtype}", "Training step", columns, rows, notes)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
