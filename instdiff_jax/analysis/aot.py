"""Compiles the training step and the sampler for a TPU that is not there, and reports what they need of it.

    pip install libtpu
    python -m instdiff_jax aot --topology v5e:16x16 --config configs/coco.py --what both --output aot.json

The programs are the real ones: `training.step` over the topology's chips with `--images_per_chip` images each, and
the loop of `multi_instance.denoise` over `--rows` rows with fusers and guidance. They are compiled whole, which takes
many minutes, and the compiler refuses what does not fit. Exit code 2 and one line for that, and for a topology that
cannot be had.
"""

import argparse
import dataclasses
import functools
import importlib.util
import json
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instdiff_jax.analysis.chips import CHIPS, predict, scaling
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.analysis.hlo import analyze
from instdiff_jax.config import ModelConfig, read_config
from instdiff_jax.diffusion.multi_instance import denoise, start_state
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.errors import ArgumentParser, InputError
from instdiff_jax.grounding import null_grounding
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import NUM_TOKENS
from instdiff_jax.parallel.mesh import BATCH, REPLICATED, ParallelSettings, check_batch, make_mesh
from instdiff_jax.sampling.pipeline import NoisePredictor
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import make_layout
from instdiff_jax.training.step import batch_keys, compile_step, make_train_step


class Program(NamedTuple):
    """A jitted function and the shapes it is compiled for.

    `batch` counts images or rows over all chips, `flops` the operations of one call on one chip.
    """

    name: str
    function: Any
    args: tuple
    options: dict[str, Any]
    mesh: Mesh
    batch: int
    flops: float


def topology_devices(name: str) -> list[jax.Device]:
    """The chips of a TPU topology such as v5e:4x4; this machine needs none.

    Raises:
        InputError: without libtpu, or for a topology that it does not know.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology: compiling for a TPU needs its compiler; pip install libtpu")
    if name.partition(":")[0] not in CHIPS:
        raise InputError(f"--topology {name}: expected one of {', '.join(CHIPS)} and a shape, for example v5e:4x4")
    # No machine to ask about, and no chip that another process could be using.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    from jax.experimental import topologies

    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; expected for example v5e:4x4") from error


def place(tree: Any, mesh: Mesh, spec: PartitionSpec = REPLICATED) -> Any:
    """A tree of shapes, all with one sharding."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def train_program(
    model: ModelConfig, settings: TrainSettings, parallel: ParallelSettings, mesh: Mesh, image_size: int
) -> Program:
    """The training step on whole images and captions: frozen autoencoder and text encoder inside.

    Raises:
        InputError: for a batch that the mesh does not divide, or parameters that no rule covers.
    """
    check_batch(settings.batch_size, settings.accumulate, mesh)
    layout = make_layout(model, settings, parallel, mesh)
    rows = settings.batch_size

    def batch() -> dict[str, Any]:
        side = image_size // model.latent_stride
        return dict(
            image=jnp.zeros((rows, image_size, image_size, 3), jnp.uint8),
            caption_ids=jnp.zeros((rows, model.text_encoder.max_length), jnp.int32),
            grounding=null_grounding(model.unifusion.map_size, model.unet.context_dim, (rows,)),
            # Only read where attention is masked.
            regions=dict(
                visual=jnp.zeros((rows, side * side), jnp.uint32), tokens=jnp.zeros((rows, NUM_TOKENS), jnp.uint32)
            ),
        )

    arrays = {name: shape for name, shape in jax.eval_shape(batch).items() if name in batch_keys(settings)}
    args = (layout.state_shapes(), layout.frozen_shapes(), place(arrays, mesh, BATCH))
    step = make_train_step(model, settings, layout)
    # The step is one shard_map, and so is the sampler: what is counted inside is one chip's share.
    return Program("train", compile_step(step, layout), args, {}, mesh, rows, count_flops(step, *args))


def sample_program(model: ModelConfig, settings: TrainSettings, mesh: Mesh, rows: int, image_size: int) -> Program:
    """The sampler's loop over rows of the multi-instance sampler, fusers on, with guidance.

    Parameters are copied to every chip in the compute dtype, as the pipeline does.
    """
    if rows % mesh.size:
        raise InputError(f"--rows: expected a multiple of the topology's {mesh.size} chips, got {rows}")
    dtype, width, side = jnp.dtype(settings.dtype), model.unet.context_dim, image_size // model.latent_stride
    network = UNet(model.unet, dtype)
    params = make_layout(model, settings, ParallelSettings(), mesh).params["unet"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)

    def condition(params: Any) -> Any:
        context = jnp.zeros((rows, model.text_encoder.max_length, width))
        tokens = jnp.zeros((rows, NUM_TOKENS, width))
        conditions = network.apply({"params": params}, context, tokens, method="condition")
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf], axis=1), conditions)

    def begin() -> Any:
        return start_state(jnp.zeros((rows, side, side, model.unet.in_channels)))

    table = solver_table("plms", 50, model.schedule).coefficients
    bound, scale = jax.ShapeDtypeStruct((), jnp.int32), jax.ShapeDtypeStruct((), jnp.float32)
    args = (
        place(params, mesh),
        place(jax.eval_shape(begin), mesh, BATCH),
        place(jax.eval_shape(condition, params), mesh, BATCH),
        place(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, table)), mesh),
        *place((bound, bound, scale), mesh),
    )
    predict_noise = NoisePredictor(network)
    options = dict(use_fusers=True, sharding=NamedSharding(mesh, BATCH))
    flops = count_flops(functools.partial(denoise, predict_noise, **options), *args)
    return Program("sample", denoise, (predict_noise, *args), options, mesh, rows, flops)


def compile_program(program: Program, name: str) -> tuple[Any, float]:
    """The compiled program, and the seconds of processor time that took.

    Raises:
        InputError: where the compiler says that it does not fit the chips' memory.
    """
    start = time.process_time()
    try:
        compiled = program.function.lower(*program.args, **program.options).compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"{program.name} on {name}: {does_not_fit(str(error))}") from error
    return compiled, time.process_time() - start


def does_not_fit(message: str) -> str:
    """The compiler's refusal in one line: what is needed, and what there is."""
    sizes = re.search(r"\((\d[\d.]*[KMGT]?)\) exceeds available HBM \((\d[\d.]*[KMGT]?)\)", message)
    sizes = sizes or re.search(r"Used (\d[\d.]*[KMGT]?) of (\d[\d.]*[KMGT]?) hbm", message)
    if sizes is None:
        return f"does not fit a chip: {message.splitlines()[0]}"
    return f"does not fit a chip: needs {sizes[1]} of the {sizes[2]} there are; see train.remat, parallel and the batch"


def memory_table(stats: Any) -> dict[str, int]:
    """Bytes a chip, from `compiled.memory_analysis()`; the total counts donated arguments once."""
    table = dict(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    total = sum(table.values()) - 2 * table["aliased"]
    return table | dict(total=total)


# Evaluations of a row, with guidance, that a picture of 50 PLMS steps takes (docs/sampling.md, "What they cost").
_EVALUATIONS = {"images_per_second": 51, "images_per_second_mis": 165}


def report(program: Program, topology: str, compiled: Any, seconds: float) -> dict[str, Any]:
    """All that is known of a compiled program, as plain values: bytes, FLOPs and seconds of one chip."""
    chip, xla = CHIPS[topology.partition(":")[0]], compiled.cost_analysis()
    costs = analyze(compiled.as_text())
    prediction = predict(chip, program.flops, costs)
    mesh = dict(program.mesh.shape)
    rows = scaling(chip, prediction, costs.collectives, mesh, program.batch)
    if program.name == "sample":
        for row in rows:
            row["rows_per_second"] = row["images_per_second"]
            row |= {name: row["rows_per_second"] / count for name, count in _EVALUATIONS.items()}
    return dict(
        program=program.name,
        topology=topology,
        mesh=mesh,
        batch=program.batch,
        compile_seconds=seconds,
        optimization_level=jax.config.jax_optimization_level,
        memory=memory_table(compiled.memory_analysis()),
        flops=program.flops,
        xla_flops=xla["flops"],
        memory_bytes=costs.memory_bytes,
        xla_memory_bytes=xla["bytes accessed"],
        collectives=[dataclasses.asdict(collective) for collective in costs.collectives],
        open_loops=costs.open_loops,
        prediction=prediction.to_dict(),
        scaling=rows,
    )


def format_report(values: dict[str, Any]) -> str:
    """A report for reading."""
    noun = "images" if values["program"] == "train" else "rows, one evaluation"
    mesh = ", ".join(f"{axis} {size}" for axis, size in values["mesh"].items())
    lines = [
        f"{values['program']} on {values['topology']} (mesh {mesh}), {values['batch']} {noun}; "
        f"compiled in {values['compile_seconds']:.0f} s of processor time",
        "  memory a chip, GB: "
        + ", ".join(f"{key} {size / 1e9:.2f}" for key, size in values["memory"].items())
        + f" ({values['memory']['total'] / 2**30:.2f} GiB)",
        f"  TFLOP a chip: {values['flops'] / 1e12:.2f} (XLA's count: {values['xla_flops'] / 1e12:.2f})",
        f"  memory traffic a chip: {values['memory_bytes'] / 1e9:.1f} GB "
        f"(XLA's count: {values['xla_memory_bytes'] / 1e9:.1f}); loops of unknown length: {values['open_loops']}",
    ]
    for one in values["collectives"]:
        lines.append(
            f"  {one['kind']} over {one['group']} (stride {one['stride']}): {one['count']}, {one['looped']} in loops; "
            f"{one['payload'] / 1e6:.1f} MB, sent {one['sent'] / 1e6:.1f} MB"
        )
    times = ", ".join(f"{key} {seconds * 1e3:.1f}" for key, seconds in values["prediction"].items())
    lines.append(f"  predicted ms: {times}")
    for row in values["scaling"]:
        pictures = f"{row['images_per_second']:.1f} images a second, "
        if "rows_per_second" in row:
            pictures += f"with MIS for 6 instances {row['images_per_second_mis']:.1f} (50 steps), "
        lines.append(
            f"  {row['chips']:4d} chips: {row['step'] * 1e3:.1f} ms, {pictures}"
            f"efficiency {row['efficiency']:.3f}, with collectives hidden {row['efficiency_hidden']:.3f}"
        )
    return "\n".join(lines)


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topology", required=True, help="a TPU generation and shape: v5e:16x16, v5p:2x2x4, v6e:4x4")
    parser.add_argument("--config", help="a config file; --config.KEY=VALUE changes a setting of it")
    parser.add_argument("--what", default="both", choices=("train", "sample", "both"))
    parser.add_argument("--images_per_chip", type=int, default=8, help="of the training step")
    parser.add_argument("--rows", type=int, default=64, help="of the sampler, over all chips")
    parser.add_argument("--image_size", type=int, default=512, help="side of the pictures in pixels")
    parser.add_argument("--output", type=Path, help="a JSON file for the reports")
    parser.add_argument("--hlo", type=Path, help="a folder for the compiled programs' text")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    config, rest = read_config(sys.argv[1:] if argv is None else argv, "configs/coco.py")
    args = parse_args(rest)
    for path in (args.output and args.output.parent, args.hlo):
        if path is not None and not path.is_dir():
            raise InputError(f"{path}: expected a folder that exists")
    for name in ("model", "train"):
        if name not in config:
            raise InputError(f"config.{name}: missing")
    devices = topology_devices(args.topology)
    model = ModelConfig.from_dict(config.model.to_dict(), "config.model")
    if args.image_size <= 0 or args.image_size % model.canvas_stride:
        raise InputError(f"--image_size: expected a multiple of {model.canvas_stride}, got {args.image_size}")
    parallel = ParallelSettings.from_dict(config.get("parallel", {}))
    values = config.train.to_dict() | dict(batch_size=args.images_per_chip * len(devices))
    settings = TrainSettings.from_dict(values)
    mesh = make_mesh(parallel, devices)
    makers: dict[str, Callable[[], Program]] = dict(
        train=lambda: train_program(model, settings, parallel, mesh, args.image_size),
        sample=lambda: sample_program(model, settings, mesh, args.rows, args.image_size),
    )
    reports = []
    for name in makers if args.what == "both" else [args.what]:
        print(f"compiling {name} for {args.topology}", flush=True)
        program = makers[name]()
        compiled, seconds = compile_program(program, args.topology)
        if args.hlo:
            (args.hlo / f"{args.topology.replace(':', '_')}_{name}.hlo").write_text(compiled.as_text())
        reports.append(report(program, args.topology, compiled, seconds))
        print(format_report(reports[-1]), flush=True)
        # After each program: the next may take as long again, or not fit.
        if args.output:
            args.output.write_text(json.dumps(reports, indent=1) + "\n")
