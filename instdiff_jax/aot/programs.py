"""The training step and the sampler's loop, compiled for a TPU topology without having the TPU.

The programs are the real ones: `training.step` and `multi_instance.denoise`, with the shapes and shardings of a mesh
over the topology's chips. Compiling takes minutes and fails if a program does not fit the chips' memory.
"""

import functools
import importlib.util
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from instdiff_jax.analysis.chips import CHIPS
from instdiff_jax.analysis.flops import count_flops_by_module
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.loop import Evaluations, denoise, start_state
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.errors import InputError
from instdiff_jax.grounding import null_grounding
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import NUM_TOKENS
from instdiff_jax.parallel.mesh import BATCH, REPLICATED, ParallelSettings, check_batch
from instdiff_jax.sampling.programs import NoisePredictor
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import make_sharding_plan
from instdiff_jax.training.step import batch_keys, compile_step, make_train_step


class Program(NamedTuple):
    """A jitted function and the shapes it is compiled for.

    Attributes:
        batch: images or rows over all chips.
        module_flops: operations of one call on one chip, by the module that they belong to.
    """

    name: str
    function: Any
    args: tuple
    options: dict[str, Any]
    mesh: Mesh
    batch: int
    module_flops: dict[str, int]

    @property
    def flops(self) -> int:
        """Operations of one call on one chip."""
        return sum(self.module_flops.values())


def topology_devices(name: str, slices: int = 1) -> list[jax.Device]:
    """The chips of `slices` slices of a TPU topology such as v5e:4x4; this machine needs no TPU.

    Raises:
        InputError: if libtpu is not installed, or does not know the topology.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise InputError("--topology: compiling for a TPU needs its compiler; pip install libtpu")
    if name.partition(":")[0] not in CHIPS:
        raise InputError(f"--topology {name}: expected one of {', '.join(CHIPS)} and a shape, for example v5e:4x4")
    # There is no machine to ask about its topology, and no chip that another process could hold.
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
    os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-16")
    from jax.experimental import topologies

    options = {"num_slices": slices} if slices > 1 else {}
    try:
        return list(topologies.get_topology_desc(platform="tpu", topology_name=name, **options).devices)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise InputError(f"--topology {name}: {str(error).splitlines()[0]}; expected for example v5e:4x4") from error


def place(tree: Any, mesh: Mesh, spec: PartitionSpec = REPLICATED) -> Any:
    """A tree of shapes, all with the same sharding."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def train_program(
    model: ModelConfig, settings: TrainSettings, parallel: ParallelSettings, mesh: Mesh, image_size: int
) -> Program:
    """The training step on images and captions, with the frozen autoencoder and text encoder inside.

    Raises:
        InputError: if the batch size is not divisible by the mesh, or no sharding rule covers a parameter.
    """
    check_batch(settings.batch_size, settings.accumulate, mesh)
    plan = make_sharding_plan(model, settings, parallel, mesh)
    rows = settings.batch_size

    def batch() -> dict[str, Any]:
        side = image_size // model.latent_stride
        return dict(
            image=jnp.zeros((rows, image_size, image_size, 3), jnp.uint8),
            caption_ids=jnp.zeros((rows, model.text_encoder.max_length), jnp.int32),
            grounding=null_grounding(model.unifusion.map_size, model.unet.context_dim, (rows,)),
            # Read only with masked attention.
            regions=dict(
                visual=jnp.zeros((rows, side * side), jnp.uint32), tokens=jnp.zeros((rows, NUM_TOKENS), jnp.uint32)
            ),
        )

    arrays = {name: shape for name, shape in jax.eval_shape(batch).items() if name in batch_keys(settings)}
    args = (plan.state_shapes(), plan.frozen_shapes(), place(arrays, mesh, BATCH))
    step = make_train_step(model, settings, plan)
    # The step is one shard_map, like the sampler: the count inside is one chip's share.
    return Program("train", compile_step(step, plan), args, {}, mesh, rows, count_flops_by_module(step, *args))


def sample_program(
    model: ModelConfig, settings: TrainSettings, mesh: Mesh, rows: int, image_size: int, fusers: bool = True
) -> Program:
    """The sampler's loop over rows, with guidance; without `fusers` its part in which α is 0.

    Each chip has a copy of the parameters in the compute dtype, as in the pipeline.

    Raises:
        InputError: if the number of rows is not a multiple of the number of chips.
    """
    if rows % mesh.size:
        raise InputError(f"--rows: expected a multiple of the topology's {mesh.size} chips, got {rows}")
    dtype, width, side = jnp.dtype(settings.dtype), model.unet.context_dim, image_size // model.latent_stride
    network = UNet(model.unet, dtype)
    params = make_sharding_plan(model, settings, ParallelSettings(), mesh).params["unet"]
    params = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), params)

    def condition(params: Any) -> Any:
        context = jnp.zeros((rows, model.text_encoder.max_length, width))
        tokens = jnp.zeros((rows, NUM_TOKENS, width)) if fusers else None
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
        place(Evaluations(jax.eval_shape(lambda: jax.tree.map(jnp.asarray, table)), bound, bound, scale), mesh),
    )
    predict_noise = NoisePredictor(network)
    options = dict(use_fusers=fusers, sharding=NamedSharding(mesh, BATCH))
    flops = count_flops_by_module(functools.partial(denoise, predict_noise, **options), *args)
    return Program("sample", denoise, (predict_noise, *args), options, mesh, rows, flops)


def compile_program(program: Program, name: str, dump: Path | None = None) -> tuple[Any, float]:
    """Compiles a program; also returns the processor time in seconds. The compiler's text of it goes to `dump`.

    Raises:
        InputError: if the program does not fit the chips' memory.
    """
    start, options = time.process_time(), {"xla_dump_to": str(dump), "xla_dump_hlo_as_text": True} if dump else {}
    try:
        compiled = program.function.lower(*program.args, **program.options).compile(compiler_options=options)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise InputError(f"{program.name} on {name}: {does_not_fit(str(error))}") from error
    return compiled, time.process_time() - start


def program_text(compiled: Any, dump: Path) -> str:
    """The compiled program as text. What jax cannot read back (v6e's programs) is taken from the compiler's dump."""
    try:
        return compiled.as_text()
    except jax.errors.JaxRuntimeError:
        written = sorted(dump.rglob("*.after_codegen.txt"), key=lambda path: path.stat().st_size)
        if not written:
            raise
        return written[-1].read_text()


def does_not_fit(message: str) -> str:
    """The compiler's out-of-memory message in one line: memory needed and memory available."""
    sizes = re.search(r"\((\d[\d.]*[KMGT]?)\) exceeds available HBM \((\d[\d.]*[KMGT]?)\)", message)
    sizes = sizes or re.search(r"Used (\d[\d.]*[KMGT]?) of (\d[\d.]*[KMGT]?) hbm", message)
    if sizes is None:
        return f"does not fit a chip: {message.splitlines()[0]}"
    return f"does not fit a chip: needs {sizes[1]}, has {sizes[2]}; see train.remat, parallel and the batch size"
