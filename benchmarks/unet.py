"""Time of the UNet alone, compared to the official one, and the time of an image by part.

    python -m benchmarks.unet --reference InstanceDiffusion --rows 2 16

First table: one evaluation with and without the fusers, given the conditions. The official evaluation includes
UniFusion and the text's keys and values, which it computes every time. Both sides have the same weights and inputs;
the table shows the largest difference of their outputs.

Second table: time by kind of work. Every distinct layer of our UNet is compiled and timed alone, and multiplied by how
often it occurs; "rest" is the remaining time, less what compiling all layers together saves. Text encoder, UniFusion,
autoencoder and host are timed as in the pipeline, for an image of `--instances` instances and 50 steps. The official
layers are timed with hooks.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import cli, models, processes, tables
from benchmarks.models import Model
from benchmarks.processes import Worker
from benchmarks.tables import Column
from instdiff_jax.errors import InputError, exit_on_input_error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", help="latents per evaluation; default 2 16 64, on a CPU 2")
    parser.add_argument("--instances", type=int, default=6, help="instances of the image in the second table")
    return parser.parse_args(argv)


def make_inputs(model: Model, rows: int, instances: int = 6) -> tuple[dict, dict, dict]:
    """Latents, timesteps and text for both sides; our grounding; the official grounding."""
    from common import DROPPED, grounding_arrays

    rng, side = np.random.default_rng(rows), model.canvas // model.config.latent_stride
    width, length = model.config.unet.context_dim, model.config.text_encoder.max_length
    inputs = dict(
        latents=rng.standard_normal((rows, side, side, model.config.unet.in_channels), np.float32),
        timesteps=np.full(rows, 601, np.int32),
        context=rng.standard_normal((rows, length, width), np.float32),
    )
    official = models.random_grounding(instances, rng, width, model.config.unifusion.map_size)
    official = {key: value.repeat(rows, 0) for key, value in official.items()}
    return inputs, grounding_arrays(official, DROPPED["box"]), official


def evaluation(args: argparse.Namespace, model: Model, workers: dict[str, Worker], rows: int, rate: float) -> dict:
    """One row of the first table."""
    inputs, grounding, official = make_inputs(model, rows)
    row: dict[str, Any] = dict(rows=rows)
    ready = {}
    for name, worker in workers.items():
        try:
            worker.reset_peak()
            worker.prepare_forward(inputs, grounding if name == "ours" else official)
            if name == "ours":
                row["compile"] = worker.compile_seconds("time_forward")
                worker.time_forward(False)
            output = worker.output()
        except RuntimeError as error:
            row[f"{name}_failed"] = processes.failure(error)
            if name == "ours":
                return row
            continue
        ready[name] = worker
        if name == "ours":
            expected = output
        else:
            row[f"{name}_difference"] = float(np.abs(output - expected).max() / np.abs(expected).max())
    taken = processes.alternate({name: w.time_forward for name, w in ready.items()}, args.repeats, failed=row)
    if "ours" not in taken:
        return row
    plain = processes.alternate({"ours": lambda: workers["ours"].time_forward(False)}, args.repeats)["ours"]
    flops = rows * workers["ours"].flops(True)
    row |= dict(
        seconds=taken["ours"],
        plain=plain,
        tflops=flops / 1e12,
        utilisation=flops / taken["ours"] / rate,
        peak=workers["ours"].peak() / 1e9,
    )
    for name in set(taken) - {"ours"}:
        row |= {
            f"{name}_seconds": taken[name],
            f"{name}_ratio": taken[name] / taken["ours"],
            f"{name}_peak": ready[name].peak() / 1e9,
        }
    return row


def evaluation_columns(names: Sequence[str]) -> list[Column]:
    """Columns of the first table."""
    return [
        Column("rows", "latents"),
        Column("seconds", "s", ".4f"),
        Column("plain", "without fusers, s", ".4f"),
        Column("tflops", "TFLOP", ".3f"),
        Column("utilisation", "FLOP utilisation", ".0%"),
        Column("peak", "peak GB", ".2f"),
        Column("compile", "compile s", ".1f"),
        *tables.baseline_columns(names, seconds=".4f", difference=True),
    ]


def shares(args: argparse.Namespace, workers: dict[str, Worker]) -> list[dict]:
    """Rows of the second table: a UNet evaluation by kind of layer, then an image by network."""
    parts = workers["ours"].parts()
    official = workers["official"].parts() if "official" in workers else {}
    rows = []
    for kind in dict.fromkeys([*parts, *official]):
        row = dict(part=f"UNet: {kind}", seconds=parts.get(kind), official=official.get(kind))
        for side, whole in (("seconds", parts), ("official", official)):
            if kind in whole:
                row[f"{side}_share"] = whole[kind] / sum(whole.values())
        rows.append(row)
    image = workers["ours"].image_parts(args.instances)
    for part, taken in image.items():
        rows.append(dict(part=f"image: {part}", seconds=taken, seconds_share=taken / sum(image.values())))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = cli.choose(args)
    workers = cli.sides(args, model, dtype)
    rate = workers["ours"].matmul_rate()
    counts = args.rows or ([2] if cli.on_cpu() else [2, 16, 64])
    rows = [evaluation(args, model, workers, count, rate) for count in counts]
    about = cli.about(args, model, dtype)
    notes = [f"{about}. Utilisation is relative to a matrix product: measured {rate / 1e12:.3g} TFLOP/s."]
    name = f"unet_{model.name}_{dtype}"
    tables.write_table(args.output, name, "One UNet evaluation", evaluation_columns(list(workers)), rows, notes)

    notes = [
        f"{about}, {counts[-1]} latents per evaluation; an image of {args.instances} instances and 50 steps, MIS 0.36."
    ]
    found = [Column("part", "part"), Column("seconds", "s", ".4f"), Column("seconds_share", "share", ".1%")]
    if "official" in workers:
        found += [Column("official", "official: s", ".4f"), Column("official_share", "share", ".1%")]
    if "ours_failed" in rows[-1]:
        raise InputError(f"--rows {counts[-1]}: {rows[-1]['ours_failed']}; cannot measure its parts")
    rows = shares(args, workers)
    tables.write_table(args.output, name.replace("unet", "parts"), "Where time goes", found, rows, notes)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
