"""Where a run's parameters come from: a checkpoint folder, and fresh ones for what it lacks."""

import hashlib
import json
import os
from pathlib import Path

import jax

from instdiff_jax.checkpoint.folder import read_config, restore_params, stored_digests
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import REPLICATED, shardings
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import Params, RunLayout, fresh_params
from instdiff_jax.tree import flatten, unflatten

# Of each file this much at the beginning and at the end goes into a fingerprint.
_SAMPLE = 1 << 16


def base_fingerprint(settings: TrainSettings, model: ModelConfig, part: str = "") -> str:
    """Names the parameters that a run starts from, by what they hold and not by where they lie.

    Args:
        part: one of the tree's top-level keys, for a fingerprint of that network alone.
    """
    if not settings.start:
        text = json.dumps([settings.seed, part, _sizes(model)], sort_keys=True)
        return "fresh-" + hashlib.sha256(text.encode()).hexdigest()[:24]
    directory = Path(settings.start)
    read_config(directory)
    digest = hashlib.sha256()
    root, digests = directory / "params" / part, stored_digests(directory)
    for name, value in sorted(digests.items()):
        if part in ("", name):
            digest.update(f"{name} {value}\n".encode())
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        if path.relative_to(directory / "params").parts[0] in digests:
            continue
        size = path.stat().st_size
        # orbax's notes hold time and place of writing: two conversions of one file are the same start.
        if path.name.startswith("_") or path.name == "commit_success.txt":
            continue
        digest.update(f"{path.relative_to(root)} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(_SAMPLE))
            if size > _SAMPLE:
                file.seek(max(_SAMPLE, size - _SAMPLE))
                digest.update(file.read())
    return digest.hexdigest()[:32]


def start_params(
    layout: RunLayout, model: ModelConfig, settings: TrainSettings, only_frozen: bool = False
) -> tuple[Params, Params]:
    """The parameters before the first step: those that train (none where `only_frozen`), and the frozen ones.

    Restored arrays go straight to their places; only what the folder lacks is initialised, born in its place.

    Raises:
        InputError: for a folder that is no checkpoint, is damaged, or holds a model of other sizes.
    """
    wanted = set(flatten(layout.frozen if only_frozen else layout.params))
    held: dict[tuple[str, ...], jax.Array] = {}
    if settings.start and wanted:
        held = {path: leaf for path, leaf in _restore(layout, model, settings).items() if path in wanted}
    fresh = fresh_params(layout, settings.seed, wanted - set(held)) if wanted - set(held) else ({}, {})
    halves = []
    for half, new in zip((layout.trainable, layout.frozen), fresh, strict=True):
        leaves = flatten(new)
        for path, shape in flatten(half).items():
            if path in held:
                leaf = held.pop(path)
                leaves[path] = leaf if leaf.dtype == shape.dtype else leaf.astype(shape.dtype)
        halves.append(unflatten(leaves))
    return tuple(halves)


def _restore(layout: RunLayout, model: ModelConfig, settings: TrainSettings) -> dict[tuple[str, ...], jax.Array]:
    directory = Path(settings.start)
    found, _, absent = read_config(directory)
    ours, theirs = flatten(_sizes(model)), flatten(_sizes(found))
    if not found.unet.positions:
        # A model without may be given them: the layer begins as zeros.
        theirs["unet", "positions"] = model.unet.positions
    if ours != theirs:
        path = next(path for path in ours if ours[path] != theirs.get(path))
        raise InputError(
            f"config.model.{'.'.join(path)}: expected {theirs.get(path)} as in {directory}, got {ours[path]}"
        )
    shapes = parameter_shapes(found, absent)
    places = flatten(shardings(layout.trainable_specs, layout.mesh)) | flatten(layout.frozen_shardings())
    copied = jax.sharding.NamedSharding(layout.mesh, REPLICATED)
    held = {}
    for part in shapes:
        # A part of which some trains is read in float32, for its masters; the rest of it is cast afterwards.
        dtype = "float32" if part in layout.trainable else settings.dtype
        tree = unflatten({path: places.get(path, copied) for path in flatten({part: shapes[part]})})
        held |= flatten(restore_params(directory, (part,), dtype=jax.numpy.dtype(dtype), sharding=tree))
    return held


def _sizes(model: ModelConfig) -> dict:
    """Every setting that decides the networks; where the tokenizer lies does not."""
    sizes = json.loads(json.dumps(model.to_dict()))
    del sizes["text_encoder"]["tokenizer"]
    return sizes


def run_facts(settings: TrainSettings, model: ModelConfig, dataset_fingerprint: str) -> dict:
    """What a checkpoint must share with the run that resumes from it; see `checkpoints`."""
    return {
        "seed": settings.seed,
        "batch_size": settings.batch_size,
        "base": os.path.abspath(settings.start) if settings.start else "",
        "base_fingerprint": base_fingerprint(settings, model),
        "dataset_fingerprint": dataset_fingerprint,
        "model": _sizes(model),
    }
