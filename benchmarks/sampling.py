"""How long pictures take, from a layout to pixels, beside the official code.

    python -m benchmarks.sampling --reference InstanceDiffusion --compile

One picture (latency) and many of one layout (throughput), by number of instances and with and without the
multi-instance sampler. On a GPU or TPU the released size, 50 steps, 1 to 128 pictures of 0 to 30 instances; on a CPU
the small size and few steps. The cost is linear in UNet evaluations of single latents, so where fewer than 50 steps
run, the 50-step time is the measured one times the evaluations of 50 steps over those that ran; the table says so.
Both sides run in turn, each in a process of its own.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Column, Worker
from benchmarks.unet import make_inputs
from instdiff_jax.errors import InputError, exit_on_input_error

STEPS = 50


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--images", type=int, nargs="+", help="pictures of one layout; default 1 8 32 128, on a CPU 1")
    parser.add_argument("--instances", type=int, nargs="+", help="default 0 4 6 13 30, on a CPU 0 6")
    parser.add_argument("--mis", type=float, nargs="+", default=[0.0, 0.36], help="shares of multi-instance steps")
    parser.add_argument("--alpha", type=float, default=0.8, help="share of the steps that the fusers are on")
    parser.add_argument("--steps", type=int, help="steps asked for; the grid may hold one more; default 50, on a CPU 5")
    parser.add_argument("--budget", type=float, default=300, help="no repeats of a case after that many seconds")
    parser.add_argument("--reference_images", type=int, default=8, help="the baseline draws at most that many at once")
    return parser.parse_args(argv)


def cases(args: argparse.Namespace) -> list[tuple[int, int, float]]:
    """(images, instances, mis), the smallest first: an accelerator's peak of memory only grows."""
    images = args.images or ([1] if common.on_cpu() else [1, 8, 32, 128])
    instances = args.instances or ([0, 6] if common.on_cpu() else [0, 4, 6, 13, 30])
    # Without instances there is nothing for the multi-instance sampler to do.
    found = [(n, k, mis) for n in images for mis in args.mis for k in instances if k or not mis]
    return sorted(found, key=lambda case: case[0] * (1 + case[1] * (case[2] > 0)))


def measure(args: argparse.Namespace, workers: dict[str, Worker], case: tuple, steps: int, rate: float) -> dict:
    """One row of the table."""
    images, instances, mis = case
    ours = workers["ours"]
    asked = {name: w for name, w in workers.items() if name == "ours" or images <= args.reference_images}
    row: dict[str, Any] = dict(images=images, instances=instances, mis=mis)
    warm_up = ours.warm_up(*case[1:], steps, args.alpha)
    for name, worker in list(asked.items()):
        try:
            if name == "ours":
                first = ours.sample(*case, warm_up, args.alpha)
                second = ours.sample(*case, warm_up, args.alpha) if warm_up < steps else None
            worker.reset_peak()
            # torch compiles anew for fusers on and off and with and without instances: all of that job, once.
            if name != "ours":
                worker.sample(*case, steps if name == "compiled" else 1, args.alpha)
        except RuntimeError as error:  # those of memory, and of torch's compiler
            row[f"{name}_failed"] = common.failure(error)
            if name == "ours":
                return row
            del asked[name]
    runs = {name: lambda w=worker: w.sample(*case, steps, args.alpha) for name, worker in asked.items()}
    taken = common.alternate(runs, args.repeats, args.budget, row)
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
            f"{name}_peak": asked[name].peak() / 1e9,
        }
    return row


def columns(workers: dict[str, Worker], steps: int) -> list[Column]:
    """Of the table; the 50-step job is measured or computed."""
    job = f"{STEPS} steps, s" + ("" if steps == STEPS else " (computed)")
    found = [
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
    ]
    for name in list(workers)[1:]:
        found += [
            Column(f"{name}_seconds", f"{name}: s", ".2f"),
            Column(f"{name}_peak", "peak GB", ".2f"),
            Column(f"{name}_ratio", "its time / ours", ".2f"),
        ]
    return found


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = common.choose(args)
    steps = args.steps or (5 if common.on_cpu() else STEPS)
    timesteps = model.config.schedule.timesteps
    if not 1 <= steps <= timesteps:
        raise InputError(f"--steps: expected a whole number from 1 to {timesteps}, got {steps}")
    if args.reference is not None and range(0, timesteps, timesteps // steps)[-1] + 1 >= timesteps:
        raise InputError(f"--steps {steps}: the official grid begins at timestep {timesteps}, one past its schedule")
    workers = common.sides(args, model, dtype)
    rate = workers["ours"].matmul_rate()
    rows: list[dict] = []
    notes = [
        f"Model {model.name}, {model.canvas}x{model.canvas} pixels, {dtype}, PLMS, guidance 7.5, alpha {args.alpha}, "
        f"--steps {steps}. Evaluations are of single latents, guidance counted. Utilisation: the UNet's FLOPs over "
        f"the whole time and a matrix product's measured {rate / 1e12:.3g} TFLOP/s."
    ]
    if steps != STEPS:
        notes.append(f"{STEPS} steps are computed: linear in evaluations.")
    name = f"sampling_{model.name}_{dtype}"
    for case in cases(args):
        rows.append(measure(args, workers, case, steps, rate))
        print({key: value for key, value in rows[-1].items() if not isinstance(value, str)}, flush=True)
        # After every row: a long run that is cut off leaves what it has.
        common.write_table(args.output, name, "Sampling", columns(workers, steps), rows, notes, show=False)
    # Last, because its program stays in memory.
    inputs, grounding, _ = make_inputs(model, 2)
    workers["ours"].prepare_forward(inputs, grounding)
    taken = workers["ours"].compile_seconds("time_forward")
    notes.append(f"Compile: what a first job takes longer than the next; one UNet evaluation's is {taken:.1f} s.")
    common.write_table(args.output, name, "Sampling", columns(workers, steps), rows, notes)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
