"""Each kind of block that the UNet is made of as a program of its own: minutes to compile instead of an hour.

The kinds are found by tracing the UNet: blocks that are equal but for their name and parameters are one kind. So the
sum over kinds, times their number, is about the whole program. What the compiler does across blocks is not in it, nor
are concatenations and what is outside the UNet.
"""

import functools
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from instdiff_jax.analysis.flops import count_flops_by_module
from instdiff_jax.aot.programs import Program, place
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.models.blocks import ResBlock, Transformer
from instdiff_jax.models.layers import Conv
from instdiff_jax.models.scaleu import ScaleU
from instdiff_jax.models.unet import KEEP, UNet
from instdiff_jax.models.unifusion import NUM_TOKENS
from instdiff_jax.parallel.mesh import REPLICATED, match_rule
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.tree import flatten, unflatten

# The arguments of a block that the training loss depends on through what trains: its gradients go on from there.
_DIFFERENTIATED = {ResBlock: (0,), Transformer: (0, 2), ScaleU: (0, 1), Conv: (0,)}


class Kind(NamedTuple):
    """Blocks that are equal but for their names and parameters.

    Attributes:
        names: in the order of the forward pass.
        params: shapes of the parameters of the first of them.
        args: of its call; arrays are shapes.
    """

    names: tuple[str, ...]
    module: nn.Module
    params: dict[str, Any]
    args: tuple

    @property
    def label(self) -> str:
        """The first name, and the input's shape without the batch."""
        return f"{self.names[0]}, {'×'.join(map(str, self.args[0].shape[1:]))}"


def block_kinds(model: ModelConfig, dtype: jnp.dtype, rows: int, image_size: int, fusers: bool = True) -> list[Kind]:
    """The kinds of blocks of an evaluation of `rows` latents, in the order of the forward pass."""
    side, width = image_size // model.latent_stride, model.unet.context_dim
    network = UNet(model.unet, dtype)
    calls: list[tuple[str, nn.Module, tuple]] = []

    def record(call, args, kwargs, context):
        module = context.module
        if type(module) in _DIFFERENTIATED and len(module.path) == 1 and context.method_name == "__call__":
            shapes = jax.tree.map(_shape, args)
            calls.append((module.name, module.clone(parent=None, name=None), shapes))
        return call(*args, **kwargs)

    def run(key: jax.Array) -> Any:
        latents = jnp.zeros((rows, side, side, model.unet.in_channels))
        context = jnp.zeros((rows, model.text_encoder.max_length, width))
        tokens, alpha = (jnp.zeros((rows, NUM_TOKENS, width)), jnp.ones(())) if fusers else (None, None)

        def denoise(unet: UNet) -> jax.Array:
            return unet(latents, jnp.zeros((rows,), jnp.int32), unet.condition(context, tokens), alpha)

        with nn.intercept_methods(record):
            return nn.init(denoise, network)(key)

    params = jax.eval_shape(run, jax.eval_shape(lambda: jax.random.key(0)))["params"]
    kinds: dict[Any, Kind] = {}
    for name, module, args in calls:
        key = (repr(module), str(args))
        known = kinds.get(key)
        kinds[key] = (
            Kind((name,), module, params[name], args) if known is None else known._replace(names=(*known.names, name))
        )
    return list(kinds.values())


def _shape(leaf: Any) -> Any:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) if hasattr(leaf, "shape") else leaf


def block_programs(
    model: ModelConfig, settings: TrainSettings, mesh: Mesh, rows: int, image_size: int, pattern: str
) -> Iterator[tuple[Kind, Program]]:
    """Forward and, after it, output with gradient of every kind of block with a name that matches `pattern`.

    The forward pass has parameters in the compute dtype, as the sampler; the gradient has trainable ones in float32 and
    recomputes what `remat` says, as the training step. Both are for one chip.

    Raises:
        InputError: if no block matches.
    """
    dtype = jnp.dtype(settings.dtype)
    kinds = [
        kind
        for kind in block_kinds(model, dtype, rows, image_size)
        if any(re.fullmatch(pattern, name) for name in kind.names)
    ]
    if not kinds:
        raise InputError(f"--blocks {pattern}: expected a regular expression that matches a block, such as down_0_.*")
    for kind in kinds:
        for name, function, args in (("forward", *_forward(kind, dtype)), ("gradient", *_gradient(kind, settings))):
            args = place(args, mesh)
            # As in the real programs: attention's kernel is chosen for the mesh's chips.
            step = jax.shard_map(function, mesh=mesh, in_specs=REPLICATED, out_specs=REPLICATED, check_vma=False)
            yield kind, Program(name, jax.jit(step), args, {}, mesh, rows, count_flops_by_module(step, *args))


def _apply(module: nn.Module, params: Any, *args: Any) -> Any:
    return module.apply({"params": params}, *args)


def _forward(kind: Kind, dtype: jnp.dtype) -> tuple[Any, tuple]:
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), kind.params)
    return functools.partial(_apply, kind.module), (params, *kind.args)


def _gradient(kind: Kind, settings: TrainSettings) -> tuple[Any, tuple]:
    """Output and gradients of what trains and of the inputs; the output's own values stand for its gradient."""
    dtype = jnp.dtype(settings.dtype)
    trainable, frozen = {}, {}
    for path, leaf in flatten(kind.params).items():
        name = "/".join(("unet", kind.names[0], *path))
        if match_rule(settings.trainable, name, "config.train.trainable") == "train":
            trainable[path] = leaf
        else:
            frozen[path] = jax.ShapeDtypeStruct(leaf.shape, dtype if len(leaf.shape) > 1 else jnp.float32)
    chosen = [index for index in _DIFFERENTIATED[type(kind.module)] if kind.args[index] is not None]

    def run(trainable: Any, frozen: Any, *args: Any) -> Any:
        def block(trainable: Any, inputs: list) -> Any:
            every = list(args)
            for index, value in zip(chosen, inputs, strict=True):
                every[index] = value
            return _apply(kind.module, unflatten({**flatten(trainable), **flatten(frozen)}), *every)

        if settings.remat != "none" and isinstance(kind.module, (ResBlock, Transformer)):
            block = jax.checkpoint(block, policy=_policy(settings.remat))
        out, pull = jax.vjp(block, trainable, [args[index] for index in chosen])
        return out, pull(out)

    return run, (unflatten(trainable), unflatten(frozen), *kind.args)


def _policy(remat: str) -> Any:
    return jax.checkpoint_policies.dots_with_no_batch_dims_saveable if remat == "dots" else KEEP


def format_blocks(rows: list[dict[str, Any]]) -> str:
    """Reports of blocks as a table in Markdown."""
    lines = [
        "| block | number | pass | estimate, ms | of this Pallas | arithmetic, ms | × arithmetic | temporary, MB |",
        f"|{' --- |' * 8}",
    ]
    for row in rows:
        ratio = "–" if row["ratio"] is None else f"{row['ratio']:.1f}"
        numbers = f"{row['seconds'] * 1e3:.2f} | {row['pallas_seconds'] * 1e3:.2f} | {row['compute'] * 1e3:.2f}"
        memory = f"{row['temporary'] / 1e6:.0f}"
        lines.append(f"| {row['block']} | {row['number']} | {row['pass']} | {numbers} | {ratio} | {memory} |")
    for one in ("forward", "gradient"):
        of_pass = [row for row in rows if row["pass"] == one]
        totals = [sum(row["number"] * row[key] for row in of_pass) for key in ("seconds", "pallas_seconds", "compute")]
        ratio = f"{totals[0] / totals[2]:.1f}" if totals[2] else "–"
        numbers = " | ".join(f"{total * 1e3:.2f}" for total in totals)
        lines.append(
            f"| all, times their number | {sum(r['number'] for r in of_pass)} | {one} | {numbers} | {ratio} | |"
        )
    if missing := sum(row["unscheduled_kernels"] for row in rows):
        lines.append(f"\nNOT counted: {missing} runs of Pallas kernels without a schedule")
    return "\n".join(lines)
