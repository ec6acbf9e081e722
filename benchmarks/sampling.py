"""Time of sampling, from a layout to pixels, compared to the official code.

    python -m benchmarks.sampling --reference InstanceDiffusion --compile

One image (latency) and many images of one layout (throughput), by number of instances, with and without the
multi-instance sampler. On a GPU or TPU: the released size, 50 steps, 1 to 128 images of 0 to 30 instances. On a CPU:
the small size and few steps. The cost is linear in UNet evaluations of single latents. With fewer than 50 steps, the
time of 50 steps is computed from the measured one by the ratio of evaluations; the table says so. The sides take turns,
each in its own process.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import cli, processes, tables
from benchmarks.processes import Worker
from benchmarks.tables import Column
from benchmarks.unet import make_inputs
from instdiff_jax.errors import InputError, exit_on_input_error

STEPS = 50


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", help="images of one layout; default 1 8 32 128, on a CPU 1")
    parser.add_argument("--instances", type=int, nargs="+", help="default 0 4 6 13 30, on a CPU 0 6")
    parser.add_argument("--mis", type=float, nargs="+", default=[0.0, 0.36], help="fractions of multi-instance steps")
    parser.add_argument("--alpha", type=float, default=0.8, help="fraction of the steps with fusers")
    parser.add_argument("--steps", type=int, help="steps; the solver may take one more; default 50, on a CPU 5")
    parser.add_argument("--budget", type=float, default=300, help="no more repeats of a case after this many seconds")
    parser.add_argument("--reference_images", type=int, default=8, help="largest number of images for the baseline")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace) -> list[tuple[int, int, float]]:
    """Cases (images, instances, mis), smallest first, as the peak of an accelerator's memory only grows."""
    images = args.images or ([1] if cli.on_cpu() else [1, 8, 32, 128])
    instances = args.instances or ([0, 6] if cli.on_cpu() else [0, 4, 6, 13, 30])
    # Without instances the multi-instance sampler does nothing.
    found = [(n, k, mis) for n in images for mis in args.mis for k in instances if k or not mis]
    return sorted(found, key=lambda case: case[0] * (1 + case[1] * (case[2] > 0)))


def measure(args: argparse.Namespace, workers: dict[str, Worker], case: tuple, steps: int, rate: float) -> dict:
    """One row of the table."""
    images, instances, mis = case
    ours = workers["ours"]
    ready = {name: w for name, w in workers.items() if name == "ours" or images <= args.reference_images}
    row: dict[str, Any] = dict(images=images, instances=instances, mis=mis)
    warm_up = ours.warm_up(*case[1:], steps, args.alpha)
    for name, worker in list(ready.items()):
        try:
            if name == "ours":
                first = ours.sample(*case, warm_up, args.alpha)
                second = ours.sample(*case, warm_up, args.alpha) if warm_up < steps else None
            worker.reset_peak()
            # torch.compile compiles separately with and without fusers and instances, so it runs the whole job once.
            if name != "ours":
                worker.sample(*case, steps if name == "compiled" else 1, args.alpha)
        except RuntimeError as error:  # out of memory, or torch's compiler
            row[f"{name}_failed"] = processes.failure(error)
            if name == "ours":
                return row
            del ready[name]
    runs = {name: lambda w=worker: w.sample(*case, steps, args.alpha) for name, worker in ready.items()}
    taken = processes.alternate(runs, args.repeats, args.budget, row)
    if "ours" not in taken:
        return row
    row["compile"] = max(first - (second or taken["ours"]), 0.0)
    fused, plain = ours.evaluations(instances, mis, steps, args.alpha)
    whole = ours.evaluations(instances, mis, STEPS, args.alpha)
    flops = images * (fused * ours.flops(True) + plain * ours.flops(False))
    row |= dict(
        evaluations=fused + plain,
        seconds=taken["ours"],
        per_evaluation=taken["ours"] / images / (fused + plain),
        full_job=taken["ours"] * sum(whole) / (fused + plain),
        per_minute=60 * images / taken["ours"] * (fused + plain) / sum(whole),
        utilisation=flops / taken["ours"] / rate,
        peak=ours.peak() / 1e9,
    )
    for name in set(taken) - {"ours"}:
        row |= {
            f"{name}_seconds": taken[name],
            f"{name}_per_evaluation": taken[name] / images / (fused + plain),
            f"{name}_full_job": taken[name] * sum(whole) / (fused + plain),
            f"{name}_ratio": taken[name] / taken["ours"],
            f"{name}_peak": ready[name].peak() / 1e9,
        }
    return row


def columns(workers: dict[str, Worker], steps: int) -> list[Column]:
    """Columns of the table."""
    job = f"{STEPS} steps, s" + ("" if steps == STEPS else " (computed)")
    return [
        Column("images", "images"),
        Column("instances", "instances"),
        Column("mis", "MIS"),
        Column("seconds", f"--steps {steps}, s", ".2f"),
        Column("per_evaluation", "s an evaluation", ".4f"),
        *([] if steps == STEPS else [Column("full_job", job, ".1f")]),
        Column("per_minute", "images a minute", ".2f"),
        Column("utilisation", "FLOP utilisation", ".0%"),
        Column("peak", "peak GB", ".2f"),
        Column("compile", "compile s", ".1f"),
        *tables.baseline_columns(list(workers)),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = cli.choose(args)
    steps = args.steps or (5 if cli.on_cpu() else STEPS)
    timesteps = model.config.schedule.timesteps
    if not 1 <= steps <= timesteps:
        raise InputError(f"--steps: expected a whole number from 1 to {timesteps}, got {steps}")
    if args.reference is not None and range(0, timesteps, timesteps // steps)[-1] + 1 >= timesteps:
        raise InputError(f"--steps {steps}: the official grid would begin at timestep {timesteps}, past its schedule")
    workers = cli.sides(args, model, dtype)
    rate = workers["ours"].matmul_rate()
    rows: list[dict] = []
    notes = [
        f"{cli.about(args, model, dtype)}, PLMS, guidance 7.5, alpha {args.alpha}, "
        f"--steps {steps}. Evaluations are of single latents, guidance included. Utilisation: the UNet's FLOPs per "
        f"second, relative to a matrix product: measured {rate / 1e12:.3g} TFLOP/s."
    ]
    if steps != STEPS:
        notes.append(f"The time of {STEPS} steps is computed from the number of evaluations.")
    name = f"sampling_{model.name}_{dtype}"
    for case in cases(args):
        rows.append(measure(args, workers, case, steps, rate))
        print({key: value for key, value in rows[-1].items() if not isinstance(value, str)}, flush=True)
        # After every row, so that an interrupted run leaves the rows so far.
        tables.write_table(args.output, name, "Sampling", columns(workers, steps), rows, notes, show=False)
    # Last, as its program stays in memory.
    inputs, grounding, _ = make_inputs(model, 2)
    workers["ours"].prepare_forward(inputs, grounding)
    taken = workers["ours"].compile_seconds("time_forward")
    notes.append(f"Compile: how much longer the first job takes than the next; {taken:.1f} s for one UNet evaluation.")
    tables.write_table(args.output, name, "Sampling", columns(workers, steps), rows, notes)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
