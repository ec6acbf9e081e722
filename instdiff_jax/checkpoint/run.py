"""Reads a training run's folder as a model: its config.json, and the averaged (EMA) parameters of one step.

A run's `checkpoints/` holds one folder per step (orbax): the training state, and `facts` with what the run started from
and a checksum of every array. Frozen parameters are not in it: they come from the base checkpoint, or are initialised
from the run's seed.
"""

import os
import traceback
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from jaxtyping import Array, UInt32

from instdiff_jax.buckets import absolute, unreachable
from instdiff_jax.checkpoint.fingerprints import base_fingerprint, older_fingerprint
from instdiff_jax.checkpoint.folder import read_config, restore_params
from instdiff_jax.checkpoint.quiet import say_errors_once
from instdiff_jax.checkpoint.rename import check_keys
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_group, parameter_shapes
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.checkpoint.verify import check_intact, is_intact
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json
from instdiff_jax.models.networks import init_params, make_networks
from instdiff_jax.paths import check_regular
from instdiff_jax.tree import flatten, unflatten

CHECKPOINTS = "checkpoints"  # folder of a run's steps


class RunConfig(NamedTuple):
    """What a run's config.json says; `train` is its group of training settings as plain values."""

    model: ModelConfig
    sampling: SamplingConfig
    train: dict[str, Any]


def read_run(workdir: Path) -> RunConfig:
    """Reads a run's config.json.

    Raises:
        InputError: for a folder that is not a run's.
    """
    path = workdir / "config.json"
    try:
        groups = read_json(path)
        model, sampling, train = groups["model"], groups["sampling"], dict(groups["train"])
    except (ValueError, KeyError, TypeError) as error:
        reason = str(error).removeprefix(f"{path}: ") if isinstance(error, InputError) else type(error).__name__
        raise InputError(f"{path}: expected the config of a training run ({reason})") from error
    check_intact(path, groups)
    if not (workdir / CHECKPOINTS).is_dir():
        raise InputError(f"{workdir / CHECKPOINTS}: expected the checkpoints of a training run")
    for name, kind, default in (("start", str, ""), ("seed", int, None), ("grounding", bool, True)):
        if type(train.get(name, default)) is not kind:
            raise InputError(f"{path}: train.{name}: expected {kind.__name__}, got {short(train.get(name))}")
    for name, group in (("model", model), ("sampling", sampling)):
        if not isinstance(group, dict):
            raise InputError(f"{path}: {name}: expected a group of settings, got {short(group)}")
    model = ModelConfig.from_dict(model, f"{path}: model")
    return RunConfig(model, SamplingConfig.from_dict(sampling, f"{path}: sampling"), train)


def run_tokenizer(workdir: Path) -> Path:
    """The folder of a run's tokenizer: its base's, else the one that its config names."""
    run = read_run(workdir)
    text = read_config(run.train["start"])[0].text_encoder if run.train.get("start") else run.model.text_encoder
    return find_tokenizer(text.tokenizer, text.vocab_size)


def absent_groups(params: Mapping[str, Any]) -> tuple[str, ...]:
    """Which of ADAPTERS a tree lacks: a run on captions alone has neither fusers nor UniFusion."""
    present = {parameter_group(path) for path in flatten(dict(params))}
    return tuple(group for group in ADAPTERS if group not in present)


def load_run(
    workdir: Path, step: int | None = None, verify: bool = True
) -> tuple[ModelConfig, SamplingConfig, dict[str, Any], int]:
    """A run's model with the averaged parameters of one step, in float32 on one device.

    With `verify` they, and the base, are compared with their checksums. Without a `step` it is the newest one that is
    intact; a warning names those that are not.

    Returns:
        The model's sizes, the sampling defaults, the whole parameter tree and the step.

    Raises:
        InputError: for a folder that is not a run's, a step that is not there, one that is damaged (without a `step`,
            if all are), or a base checkpoint that has changed.
    """
    run = read_run(workdir)
    start, seed, grounding = run.train.get("start", ""), run.train["seed"], run.train.get("grounding", True)
    step, averaged, facts = _restore_averaged(workdir, step, verify)
    known = facts["base_fingerprint"]
    if known != base_fingerprint(start, seed, run.model) and not (start and known == older_fingerprint(start)):
        raise InputError(f"{start}: changed since the run in {workdir} started from it (fingerprint)")
    absent = () if grounding else ("fusers", "unifusion", "trunk")
    shapes = flatten(parameter_shapes(run.model, absent))
    leaves = flatten(averaged)
    if start:
        leaves = _base_leaves(start, set(shapes) - set(leaves), verify) | leaves
    if rest := set(shapes) - set(leaves):
        leaves |= _fresh_leaves(run.model, seed, grounding, rest)
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in leaves.items()}
    check_keys(found, {"/".join(path): shape for path, shape in shapes.items()}, str(workdir / CHECKPOINTS / str(step)))
    return run.model, run.sampling, unflatten(leaves), step


def _base_leaves(start: str, wanted: set[tuple[str, ...]], verify: bool) -> dict[tuple[str, ...], Array]:
    """The wanted parameters that the base checkpoint has, as it stores them."""
    config, _, absent = read_config(start)
    held = set(flatten(parameter_shapes(config, absent))) & wanted
    parts = sorted({path[0] for path in held})
    leaves = flatten(restore_params(start, parts, verify=verify)) if parts else {}
    return {path: leaf for path, leaf in leaves.items() if path in held}


def _fresh_leaves(
    config: ModelConfig, seed: int, grounding: bool, wanted: set[tuple[str, ...]]
) -> dict[tuple[str, ...], Array]:
    """Parameters as the run initialised them."""

    def initial(key: jax.Array) -> dict[str, Any]:
        params = flatten(init_params(make_networks(config), config, key, grounding))
        return unflatten({path: leaf for path, leaf in params.items() if path in wanted})

    return flatten(jax.jit(initial)(jax.random.key(seed)))


def intact_step(workdir: Path, verify: bool = True) -> int:
    """The step that `load_run` takes without being given one: it reads that step's parameters to know."""
    return _restore_averaged(workdir, None, verify)[0]


def _restore_averaged(workdir: Path, step: int | None, verify: bool) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """The step, its averaged parameters and its facts."""
    folder = absolute(workdir) / CHECKPOINTS
    say_errors_once()
    options = ocp.CheckpointManagerOptions(create=False, read_only=True)
    # Without handlers orbax does not tell what a state that it has not saved itself consists of.
    handlers = {"state": ocp.PyTreeCheckpointHandler(), "facts": ocp.JsonCheckpointHandler()}
    with open_manager(folder, options, item_handlers=handlers) as manager:
        steps = sorted(manager.all_steps())
        if not steps or (step is not None and step not in steps):
            raise InputError(f"{folder}: no checkpoint {'' if step is None else f'of step {step} '}there: {steps}")
        for tried in reversed(steps) if step is None else [step]:
            try:
                return tried, *_read_averaged(manager, tried, verify)
            except Exception as error:  # orbax, tensorstore and json each raise their own kinds for damaged files
                problem = f"{folder / str(tried)}: damaged ({damage(error)})"
                if tried in (step, steps[0]):
                    raise InputError(problem) from error
                warnings.warn(f"{problem}; taking the one before it", stacklevel=2)
    raise AssertionError("unreachable: the last step tried returns or raises")


# Where orbax reads what it notes of each checkpoint.
_NOTES = os.path.join("orbax", "checkpoint", "_src", "metadata", "")


def open_manager(folder: Path, options: ocp.CheckpointManagerOptions, **items: Any) -> ocp.CheckpointManager:
    """orbax's manager of a run's checkpoints; InputError where its own notes of when each was written are damaged."""
    try:
        return ocp.CheckpointManager(folder, options=options, **items)
    except (TypeError, KeyError, AttributeError, ValueError, RecursionError) as error:
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
        if isinstance(error, ValueError | RecursionError) and not any(_NOTES in name for name in frames):
            raise
        problem = f"one of its _CHECKPOINT_METADATA files is damaged ({damage(error)}); remove that file"
        raise InputError(f"{folder}: {problem}") from error


def _read_averaged(manager: ocp.CheckpointManager, step: int, verify: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    check_regular(manager.directory / str(step))
    facts = manager.restore(step, args=ocp.args.Composite(facts=ocp.args.JsonRestore()))["facts"]
    sums = checked_sums(facts)
    stored = manager.item_metadata(step)["state"]
    state = manager.restore(step, args=ocp.args.Composite(state=_only_averaged(stored)))["state"]
    for path, value in checksums(state).items() if verify else ():
        if sums[path] != value:
            raise ValueError(f"checksum of {path}")
    return state["optimizer"]["ema"], facts


def _only_averaged(stored: Any) -> ocp.args.PyTreeRestore:
    """Restores the averaged parameters of a training state, and nothing else of it, to one device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    tree = {"optimizer": {"ema": stored["optimizer"]["ema"]}}
    item = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)
    args = ocp.checkpoint_utils.construct_restore_args(item)
    return ocp.args.PyTreeRestore(item, restore_args=args, partial_restore=True)


def damage(error: Exception) -> str:
    """What is wrong with a damaged checkpoint, in a line. An error that its files did not cause is raised again."""
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error) or unreachable(error):
        raise error
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:160] if lines else 'no message'}"


def checked_sums(facts: Any) -> dict[str, int]:
    """The checksums in a checkpoint's facts; older checkpoints have none of the facts themselves.

    Raises:
        ValueError, TypeError, KeyError: if the facts are damaged.
    """
    if not isinstance(facts["checksums"], dict) or not is_intact(facts):
        raise ValueError("facts are not those that were written")
    return facts["checksums"]


def checksums(tree: Any) -> dict[str, int]:
    """The sum of the bits of every 32-bit array in a tree, modulo 2^32, by path."""
    sums = jax.device_get([_checksum(leaf) for leaf in jax.tree.leaves(tree)])
    return dict(zip(leaf_paths(tree), map(int, sums), strict=True))


def leaf_paths(tree: Any) -> list[str]:
    """The paths of a tree's leaves, as `checksums` writes them."""
    return [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in jax.tree.leaves_with_path(tree)]


@jax.jit
def _checksum(leaf: Array) -> UInt32[Array, ""]:
    # Whole numbers add up to the same in any order, hence on any mesh.
    return jnp.sum(jax.lax.bitcast_convert_type(leaf, jnp.uint32), dtype=jnp.uint32)
