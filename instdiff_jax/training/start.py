"""A run's initial parameters: restored from a checkpoint folder, or initialised where the folder lacks them."""

import jax

from instdiff_jax.buckets import absolute, as_path
from instdiff_jax.checkpoint import fingerprints
from instdiff_jax.checkpoint.fingerprints import model_sizes
from instdiff_jax.checkpoint.folder import read_config, restore_params
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import REPLICATED, shardings
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import Params, ShardingPlan, fresh_params
from instdiff_jax.tree import flatten, unflatten


def base_fingerprint(settings: TrainSettings, model: ModelConfig, part: str = "") -> str:
    """Fingerprint of a run's initial parameters; see `fingerprints.base_fingerprint`."""
    return fingerprints.base_fingerprint(settings.start, settings.seed, model, part)


def start_params(
    plan: ShardingPlan, model: ModelConfig, settings: TrainSettings, only_frozen: bool = False
) -> tuple[Params, Params]:
    """The parameters before the first step: the trainable ones (none if `only_frozen`), and the frozen ones.

    Parameters are restored already sharded. Those that the folder lacks are initialised, also already sharded.

    Raises:
        InputError: if the folder is not a checkpoint, is damaged, or has a model of other sizes.
    """
    wanted = set(flatten(plan.frozen if only_frozen else plan.params))
    held: dict[tuple[str, ...], jax.Array] = {}
    if settings.start and wanted:
        held = {path: leaf for path, leaf in _restore(plan, model, settings).items() if path in wanted}
    fresh = fresh_params(plan, settings.seed, wanted - set(held)) if wanted - set(held) else ({}, {})
    halves = []
    for half, new in zip((plan.trainable, plan.frozen), fresh, strict=True):
        leaves = flatten(new)
        gates = {path: leaf for path, leaf in leaves.items() if path[-1] in ("gate_attn", "gate_ff")}
        leaves |= {path: jax.numpy.full_like(leaf, settings.gates) for path, leaf in gates.items()}
        for path, shape in flatten(half).items():
            if path in held:
                leaf = held.pop(path)
                leaves[path] = leaf if leaf.dtype == shape.dtype else leaf.astype(shape.dtype)
        halves.append(unflatten(leaves))
    return tuple(halves)


def _restore(plan: ShardingPlan, model: ModelConfig, settings: TrainSettings) -> dict[tuple[str, ...], jax.Array]:
    directory = as_path(settings.start)
    found, _, absent = read_config(directory)
    ours, theirs = flatten(model_sizes(model)), flatten(model_sizes(found))
    if not found.unet.positions:
        # Positions may be added to a model without them: the layer starts at zero.
        theirs["unet", "positions"] = model.unet.positions
    if settings.switch_prediction:
        theirs["schedule", "prediction"] = ours["schedule", "prediction"]
    if ours != theirs:
        path = next(path for path in ours if ours[path] != theirs.get(path))
        raise InputError(
            f"config.model.{'.'.join(path)}: expected {theirs.get(path)} as in {directory}, got {ours[path]}"
        )
    shapes = parameter_shapes(found, absent)
    places = flatten(shardings(plan.trainable_specs, plan.mesh)) | flatten(plan.frozen_shardings())
    copied = jax.sharding.NamedSharding(plan.mesh, REPLICATED)
    held = {}
    for part in shapes:
        # A part with trainable parameters is read in float32, for the masters. Its frozen ones are cast afterwards.
        dtype = "float32" if part in plan.trainable else settings.dtype
        tree = unflatten({path: places.get(path, copied) for path in flatten({part: shapes[part]})})
        held |= flatten(restore_params(directory, (part,), dtype=jax.numpy.dtype(dtype), sharding=tree))
    return held


def run_facts(settings: TrainSettings, model: ModelConfig, dataset_fingerprint: str) -> dict:
    """The facts that a checkpoint must share with the run that resumes from it; see `checkpoints`."""
    return {
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "base": str(absolute(settings.start)) if settings.start else "",
        "base_fingerprint": base_fingerprint(settings, model),
        "older_base_fingerprint": fingerprints.older_fingerprint(settings.start) if settings.start else "",
        "dataset_fingerprint": dataset_fingerprint,
        "model": model_sizes(model),
    }
