"""The UNet alone, beside the official one, and where a picture's time goes.

    python -m benchmarks.unet --reference InstanceDiffusion --rows 2 16

First table: one evaluation of some latents, conditions ready, with the fusers and without; the official evaluation
has UniFusion and the text's keys and values in it, as every one of its evaluations does. Both get the same weights
and inputs, and the largest difference of their outputs is in the table.

Second table: the share of each kind of work. Of our UNet every layer is recorded with the shape it meets, each
distinct one is compiled and timed alone, and its time is multiplied by how often it occurs; "fused" is what is saved,
or lost, by compiling the whole together. Text, UniFusion, autoencoder and host are timed as the pipeline runs them,
for a picture of `--instances` and 50 steps. The official layers are timed by clocks around each of them.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import numpy as np

from benchmarks import common
from benchmarks.common import Column, Model, Worker
from instdiff_jax.errors import InputError, exit_on_input_error


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = common.parser(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", help="latents of an evaluation; default 2 16 64, on a CPU 2")
    parser.add_argument("--instances", type=int, default=6, help="of the picture whose time is split up")
    return parser.parse_args(argv)


def make_inputs(model: Model, rows: int, instances: int = 6) -> tuple[dict, dict, dict]:
    """Latents, timesteps and text for both sides; the grounding for ours, and for the official code."""
    from common import DROPPED, grounding_arrays

    rng, side = np.random.default_rng(rows), model.canvas // model.config.latent_stride
    width, length = model.config.unet.context_dim, model.config.text_encoder.max_length
    inputs = dict(
        latents=rng.standard_normal((rows, side, side, model.config.unet.in_channels), np.float32),
        timesteps=np.full(rows, 601, np.int32),
        context=rng.standard_normal((rows, length, width), np.float32),
    )
    official = common.random_grounding(instances, rng, width, model.config.unifusion.map_size)
    official = {key: value.repeat(rows, 0) for key, value in official.items()}
    return inputs, grounding_arrays(official, DROPPED["box"]), official


def evaluation(args: argparse.Namespace, model: Model, workers: dict[str, Worker], rows: int, rate: float) -> dict:
    """A row of the first table."""
    inputs, grounding, official = make_inputs(model, rows)
    row: dict[str, Any] = dict(rows=rows)
    asked = {}
    for name, worker in workers.items():
        try:
            worker.reset_peak()
            worker.prepare_forward(inputs, grounding if name == "ours" else official)
            if name == "ours":
                row["compile"] = worker.compile_seconds("time_forward")
                worker.time_forward(False)
            output = worker.output()
        except RuntimeError as error:
            row[f"{name}_failed"] = common.failure(error)
            if name == "ours":
                return row
            continue
        asked[name] = worker
        if name == "ours":
            expected = output
        else:
            row[f"{name}_difference"] = float(np.abs(output - expected).max() / np.abs(expected).max())
    taken = common.alternate({name: w.time_forward for name, w in asked.items()}, args.repeats, failed=row)
    if "ours" not in taken:
        return row
    plain = common.alternate({"ours": lambda: workers["ours"].time_forward(False)}, args.repeats)["ours"]
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
            f"{name}_peak": asked[name].peak() / 1e9,
        }
    return row


def evaluation_columns(names: Sequence[str]) -> list[Column]:
    """Of the first table."""
    found = [
        Column("rows", "latents"),
        Column("seconds", "s", ".4f"),
        Column("plain", "without fusers, s", ".4f"),
        Column("tflops", "TFLOP", ".3f"),
        Column("utilisation", "FLOP utilisation", ".0%"),
        Column("peak", "peak GB", ".2f"),
        Column("compile", "compile s", ".1f"),
    ]
    for name in names[1:]:
        found += [
            Column(f"{name}_seconds", f"{name}: s", ".4f"),
            Column(f"{name}_peak", "peak GB", ".2f"),
            Column(f"{name}_ratio", "its time / ours", ".2f"),
            Column(f"{name}_difference", "difference", ".1e"),
        ]
    return found


def shares(args: argparse.Namespace, workers: dict[str, Worker]) -> list[dict]:
    """The rows of the second table: an evaluation by kind of layer, then a picture by network."""
    parts = workers["ours"].parts()
    official = workers["official"].parts() if "official" in workers else {}
    rows = []
    for kind in dict.fromkeys([*parts, *official]):
        row = dict(part=f"UNet: {kind}", seconds=parts.get(kind), official=official.get(kind))
        for side, whole in (("seconds", parts), ("official", official)):
            if kind in whole:
                row[f"{side}_share"] = whole[kind] / sum(whole.values())
        rows.append(row)
    picture = workers["ours"].picture_parts(args.instances)
    for part, taken in picture.items():
        rows.append(dict(part=f"picture: {part}", seconds=taken, seconds_share=taken / sum(picture.values())))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = common.choose(args)
    workers = common.sides(args, model, dtype)
    rate = workers["ours"].matmul_rate()
    counts = args.rows or ([2] if common.on_cpu() else [2, 16, 64])
    rows = [evaluation(args, model, workers, count, rate) for count in counts]
    about = f"Model {model.name}, {model.canvas}x{model.canvas} pixels, {dtype}"
    notes = [f"{about}. Utilisation: of a matrix product's measured {rate / 1e12:.3g} TFLOP/s."]
    name = f"unet_{model.name}_{dtype}"
    common.write_table(args.output, name, "One UNet evaluation", evaluation_columns(list(workers)), rows, notes)

    notes = [
        f"{about}, {counts[-1]} latents an evaluation; a picture of {args.instances} instances and 50 steps, MIS 0.36."
    ]
    found = [Column("part", "part"), Column("seconds", "s", ".4f"), Column("seconds_share", "share", ".1%")]
    if "official" in workers:
        found += [Column("official", "official: s", ".4f"), Column("official_share", "share", ".1%")]
    if "ours_failed" in rows[-1]:
        raise InputError(f"--rows {counts[-1]}: {rows[-1]['ours_failed']}; where time goes was not measured")
    rows = shares(args, workers)
    common.write_table(args.output, name.replace("unet", "parts"), "Where time goes", found, rows, notes)
    for worker in workers.values():
        worker.close()


if __name__ == "__main__":
    with exit_on_input_error():
        main()
