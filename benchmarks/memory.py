"""Memory that sampling needs, and how many images fit, predicted by the compiler.

    python -m benchmarks.memory --model full --dtype bfloat16               # compiled for this device
    python -m benchmarks.memory --model full --topology v5e:2x2             # compiled for a TPU that is not present

The sampler's loop is compiled, but not run, for two numbers of rows. (A row is one latent being denoised: an image of 6
instances has 7 while the multi-instance sampler runs.) The difference gives the memory per row, and from it the number
of rows that fit. To the loop's arguments and temporary arrays come the other networks' parameters, and the keys and
values of every text and grounding. The decoder, which runs after the loop, is compiled too. More rows than fit are
possible: `max_rows` runs them in parts.
"""

import argparse
import math
from collections.abc import Sequence
from typing import Any

from benchmarks import cli, tables
from benchmarks.models import Model
from benchmarks.tables import Column
from instdiff_jax.errors import exit_on_input_error

CAPACITIES = (16, 24, 80, 141)  # GB


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = cli.parser(__doc__)
    parser.set_defaults(dtype="bfloat16")
    parser.add_argument("--instances", type=int, default=6)
    parser.add_argument("--rows", type=int, nargs=2, default=(7, 14), help="the two programs to compile")
    parser.add_argument("--decoded", type=int, default=1, help="images decoded at a time")
    parser.add_argument("--topology", help="compile for a TPU, for example v5e:2x2; needs libtpu")
    parser.add_argument("--reserve", type=float, default=0.5, help="GB of device memory that the runtime reserves")
    parser.add_argument(
        "--fraction",
        type=float,
        default=0.75,
        help="fraction of device memory that jax uses (XLA_PYTHON_CLIENT_MEM_FRACTION; jax's default is 0.75)",
    )
    return cli.parse_alone(parser, argv)


def analyse(model: Model, dtype: str, rows: int, mesh: Any) -> dict[str, float]:
    """GB of the sampler's loop with this many rows."""
    from instdiff_jax.aot.programs import compile_program, sample_program
    from instdiff_jax.aot.report import memory_table
    from instdiff_jax.training.settings import TrainSettings

    settings = TrainSettings(steps=1, batch_size=1, dtype=dtype)
    program = sample_program(model.config, settings, mesh, rows, model.canvas)
    compiled, taken = compile_program(program, "this device")
    return {key: value / 1e9 for key, value in memory_table(compiled.memory_analysis()).items()} | dict(compile=taken)


def analyse_decoder(model: Model, images: int, mesh: Any) -> float:
    """GB of the decoder's output and temporary arrays, in float32 as in the pipeline."""
    import jax
    import jax.numpy as jnp

    from instdiff_jax.aot.programs import place
    from instdiff_jax.aot.report import memory_table
    from instdiff_jax.models.autoencoder import Autoencoder

    network, side = Autoencoder(model.config.autoencoder), model.canvas // model.config.latent_stride
    latents = jax.ShapeDtypeStruct((images, side, side, model.config.autoencoder.z_channels), jnp.float32)
    image = jax.ShapeDtypeStruct((1, 2 * model.config.latent_stride, 2 * model.config.latent_stride, 3), jnp.float32)
    variables = jax.eval_shape(lambda image: network.init(jax.random.key(0), image, method="reconstruct"), image)
    decode = jax.jit(lambda variables, latents: network.apply(variables, latents, method="decode"))
    table = memory_table(decode.lower(*place((variables, latents), mesh)).compile().memory_analysis())
    return (table["temporary"] + table["outputs"]) / 1e9


def resident(model: Model, dtype: str) -> tuple[float, float]:
    """GB of all parameters except the UNet's, and of the keys and values of one text and grounding."""
    import jax
    import jax.numpy as jnp

    from instdiff_jax.checkpoint.shapes import parameter_shapes
    from instdiff_jax.models.unet import UNet
    from instdiff_jax.models.unifusion import NUM_TOKENS
    from instdiff_jax.tree import flatten

    config, size = model.config, jnp.dtype(dtype).itemsize
    others = 0
    for path, shape in flatten(parameter_shapes(config)).items():
        if path[0] != "unet":
            others += math.prod(shape) * (4 if path[0] == "autoencoder" else size)

    def condition() -> Any:
        context = jnp.zeros((1, config.text_encoder.max_length, config.unet.context_dim))
        tokens = jnp.zeros((1, NUM_TOKENS, config.unet.context_dim))
        network = UNet(config.unet, jnp.dtype(dtype))
        return network.init_with_output(jax.random.key(0), context, tokens, method="condition")[0]

    leaves = jax.tree.leaves(jax.eval_shape(condition))
    return others / 1e9, sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e9


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    model, dtype = cli.choose(args)
    import jax

    from instdiff_jax.aot.programs import topology_devices
    from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh

    devices = topology_devices(args.topology) if args.topology else jax.devices()
    mesh = make_mesh(ParallelSettings(), devices[:1])
    loops = [analyse(model, dtype, rows, mesh) for rows in args.rows]
    others, entry = resident(model, dtype)
    decoder = analyse_decoder(model, args.decoded, mesh)
    per_row = (loops[1]["total"] - loops[0]["total"]) / (args.rows[1] - args.rows[0])
    fixed = loops[0]["total"] - per_row * args.rows[0] + others + entry  # one negative prompt for all rows

    rows: list[dict[str, Any]] = []
    for count, table in zip(args.rows, loops, strict=True):
        rows.append(dict(what=f"loop over {count} rows", peak=table["total"] + others + entry * (count + 1), **table))
    loaded = fixed - entry
    rows.append(dict(what=f"decoding {args.decoded}", temporary=decoder, peak=loaded + decoder))
    for capacity in CAPACITIES:
        left = min(capacity - args.reserve, args.fraction * capacity) - fixed
        images, plain = (max(0, int(left / (count * (per_row + entry)))) for count in (args.instances + 1, 1))
        rows.append(dict(what=f"{capacity} GB", images=images, plain=plain))
    columns = [
        Column("what", "program or memory"),
        Column("arguments", "arguments GB", ".2f"),
        Column("temporary", "temporary GB", ".2f"),
        Column("peak", "peak with everything else, GB", ".2f"),
        Column("images", f"images of {args.instances} instances at once"),
        Column("plain", "images without MIS at once"),
        Column("compile", "compile s", ".0f"),
    ]
    where = args.topology or jax.default_backend()
    notes = [
        f"Model {model.name}, {model.canvas}x{model.canvas} pixels, {dtype}, compiled for {where}, not run. "
        f"A row takes {per_row:.3f} GB, everything else {fixed:.2f} GB; "
        f"jax uses {args.fraction:.0%} of a device's memory (XLA_PYTHON_CLIENT_MEM_FRACTION) and leaves at least "
        f"{args.reserve} GB."
    ]
    if where == "cpu":
        notes.append(
            "This is an upper bound: on a CPU, XLA also keeps operands of 16-bit convolutions and products in float32."
        )
    name = f"memory_{model.name}_{dtype}" + (f"_{args.topology.split(':')[0]}" if args.topology else "")
    tables.write_table(args.output, name, "Memory", columns, rows, notes)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
