"""MaxDiffusion's SD 1.5 UNet beside ours, without fusers, on one TPU chip, from the compiler alone.

    git clone https://github.com/AI-Hypercomputer/maxdiffusion
    pip install libtpu einops
    python -m benchmarks.maxdiffusion --clone maxdiffusion

One evaluation of the UNet, text keys and values inside, bfloat16. The estimate is the compiler's for its own kernels;
the Pallas kernels' time is read from its schedule. Waiting for memory is not in either. Of the clone only the UNet's
own modules are imported: what loads, saves and quantizes models is replaced by empty stand-ins.
"""

import argparse
import dataclasses
import importlib
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from instdiff_jax.analysis.chips import CHIPS
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.analysis.hlo import analyze
from instdiff_jax.analysis.kernel_schedule import DUMP_FLAGS, read_dump
from instdiff_jax.aot.programs import place, topology_devices
from instdiff_jax.config import UNetConfig
from instdiff_jax.errors import InputError, exit_on_input_error

# The axes that its attention looks for, and how it names what they split.
AXES = ("data", "fsdp", "context", "tensor")
RULES = (("activation_batch", ("data", "fsdp")), ("activation_heads", "tensor"), ("activation_kv", "tensor"))


def module(name: str, **values: Any) -> ModuleType:
    """A stand-in for a module, under its name."""
    made = ModuleType(name)
    vars(made).update(values)
    sys.modules[name] = made
    return made


def import_unet(clone: Path) -> Any:
    """The class FlaxUNet2DConditionModel of a clone.

    Raises:
        InputError: if the folder is no clone, or its files are not those that this benchmark knows.
    """
    root = clone / "src" / "maxdiffusion"
    if not (root / "models" / "unet_2d_condition_flax.py").is_file():
        raise InputError(f"--clone: {clone}: expected a clone of MaxDiffusion, with src/maxdiffusion")

    class WithConfig:
        config = property(lambda self: self)

    class Model:
        pass

    class Quantization:
        pass

    module("maxdiffusion", __path__=[str(root)], __version__="")
    module("maxdiffusion.models", __path__=[str(root / "models")])
    module("maxdiffusion.configuration_utils", ConfigMixin=WithConfig, flax_register_to_config=lambda kind: kind)
    module("maxdiffusion.utils", BaseOutput=dict)
    module(
        "maxdiffusion.max_utils",
        safe_getattr=lambda o, name, default: default if o is None else getattr(o, name, default),
    )
    activations = {"gelu": jax.nn.gelu, "silu": jax.nn.silu, "swish": jax.nn.silu, "relu": jax.nn.relu}
    module("maxdiffusion.models.modeling_flax_utils", FlaxModelMixin=Model, get_activation=activations.__getitem__)
    module("maxdiffusion.models.quantizations", AqtQuantization=Quantization)
    try:
        return importlib.import_module("maxdiffusion.models.unet_2d_condition_flax").FlaxUNet2DConditionModel
    except (ImportError, AttributeError) as error:
        raise InputError(f"--clone: {clone}: its UNet cannot be imported: {error}") from error


def block_sizes(size: int) -> Any:
    """Square blocks for its flash attention."""
    names = ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    kind = importlib.import_module("maxdiffusion.common_types").BlockSizes
    return kind(**dict.fromkeys((*names, "block_q_dq", "block_kv_dq"), size))


def theirs(args: argparse.Namespace, device: jax.Device, kernel: str) -> tuple[Callable, tuple, Any]:
    """Their UNet's function, its arguments and the mesh."""
    kind, sizes = import_unet(args.clone), UNetConfig()
    mesh = jax.sharding.Mesh([[[[device]]]], AXES, axis_types=(jax.sharding.AxisType.Auto,) * 4)
    channels = tuple(args.channels * mult for mult in sizes.channel_mult)
    network = kind(
        sample_size=args.side,
        block_out_channels=channels,
        cross_attention_dim=sizes.context_dim,
        attention_head_dim=sizes.num_heads,
        dtype=jnp.bfloat16,
        weights_dtype=jnp.bfloat16,
        split_head_dim=True,
        attention_kernel=kernel,
        flash_min_seq_length=args.side**2,
        flash_block_sizes=block_sizes(args.block),
        mesh=mesh,
    )
    latents, times, context = inputs(args, sizes)
    channels_first = jax.ShapeDtypeStruct((args.rows, sizes.in_channels, args.side, args.side), latents.dtype)
    import flax.linen as nn

    with mesh, nn.logical_axis_rules(RULES):
        key = jax.ShapeDtypeStruct((2,), jnp.uint32)
        params = jax.eval_shape(lambda *values: network.init(*values)["params"], key, channels_first, times, context)
    params = nn.meta.unbox(params)

    def evaluate(params: Any, *values: Any) -> Any:
        with nn.logical_axis_rules(RULES):
            return network.apply({"params": params}, *values, return_dict=False)

    return evaluate, (params, channels_first, times, context), mesh


def ours(args: argparse.Namespace, device: jax.Device) -> tuple[Callable, tuple, Any]:
    """Our UNet's function, its arguments and the mesh."""
    from instdiff_jax.models.unet import UNet

    sizes = dataclasses.replace(UNetConfig(), model_channels=args.channels)
    network = UNet(sizes, jnp.bfloat16)
    latents, times, context = inputs(args, sizes)

    def evaluate(params: Any, latents: Any, times: Any, context: Any) -> Any:
        conditions = network.apply({"params": params}, context, method="condition")
        return network.apply({"params": params}, latents, times, conditions, None)

    def init(key: jax.Array, latents: Any, times: Any, context: Any) -> Any:
        def both(unet: UNet, *values: Any) -> Any:
            return unet(values[0], values[1], unet.condition(values[2]), None)

        return network.init(key, latents, times, context, method=both)["params"]

    params = jax.eval_shape(init, jax.ShapeDtypeStruct((2,), jnp.uint32), latents, times, context)
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, jnp.bfloat16), params)
    mesh = jax.sharding.Mesh([device], "x", axis_types=(jax.sharding.AxisType.Auto,))
    return evaluate, (params, latents, times, context), mesh


def inputs(args: argparse.Namespace, sizes: UNetConfig) -> tuple[jax.ShapeDtypeStruct, ...]:
    """Shapes of latents, timesteps and text."""
    latents = jax.ShapeDtypeStruct((args.rows, args.side, args.side, sizes.in_channels), jnp.bfloat16)
    return (
        latents,
        jax.ShapeDtypeStruct((args.rows,), jnp.int32),
        jax.ShapeDtypeStruct((args.rows, 77, sizes.context_dim), jnp.bfloat16),
    )


def measure(program: tuple[Callable, tuple, Any], chip: str, folder: Path) -> tuple[float, float, int]:
    """Milliseconds of the compiler's kernels and of Pallas kernels, and runs of kernels without a schedule."""
    function, values, mesh = program
    for path in folder.iterdir():
        path.unlink()
    jax.clear_caches()  # what is compiled already would not be written again
    values = tuple(place(value, mesh) for value in values)
    everywhere = NamedSharding(mesh, PartitionSpec())
    with mesh, jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        compiled = jax.jit(function, out_shardings=everywhere).lower(*values).compile()
    cycles = {name: schedule.cycles() for name, schedule in read_dump(folder)}
    costs = analyze(compiled.as_text(), cycles)
    clock = CHIPS[chip].clock
    return 1e3 * costs.cycles / clock, 1e3 * costs.pallas_cycles / clock, costs.unscheduled_kernels


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clone", type=Path, required=True, help="a clone of MaxDiffusion")
    parser.add_argument("--topology", default="v5e:2x2", help="the TPU; one of its chips is used")
    parser.add_argument("--rows", type=int, default=8, help="latents")
    parser.add_argument("--side", type=int, default=64, help="of the latents")
    parser.add_argument("--channels", type=int, default=320, help="of the UNet; fewer for a quick look")
    parser.add_argument("--block", type=int, default=1024, help="queries and keys of a block of its flash attention")
    parser.add_argument("--kernels", nargs="+", default=["flash"], help="its attention kernels: flash, dot_product")
    parser.add_argument("--without_ours", action="store_true")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    os.environ["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder=folder)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    try:
        chip, device = args.topology.partition(":")[0], topology_devices(args.topology)[0]
        programs = {
            f"MaxDiffusion, {kernel}": lambda kernel=kernel: theirs(args, device, kernel) for kernel in args.kernels
        }
        if not args.without_ours:
            programs["ours"] = lambda: ours(args, device)
        function, values, _ = ours(args, device)
        arithmetic = 1e3 * count_flops(function, *values) / CHIPS[chip].flops
        columns = (
            "UNet",
            "estimate, ms",
            "kernels, ms",
            "total, ms",
            f"x arithmetic ({arithmetic:.1f} ms)",
            "not counted",
        )
        print(f"{args.topology}, {args.rows} latents of {args.side}², {args.channels} channels, jax {jax.__version__}")
        print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|", flush=True)
        for name, make in programs.items():
            estimate, kernels, missing = measure(make(), chip, folder)
            total = estimate + kernels
            numbers = f"{estimate:.1f} | {kernels:.1f} | {total:.1f} | {total / arithmetic:.1f}"
            print(f"| {name} | {numbers} | {missing} |", flush=True)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    with exit_on_input_error():
        main()
