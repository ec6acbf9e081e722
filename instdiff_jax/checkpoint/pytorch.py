"""Imports PyTorch checkpoints as our parameter tree and writes them back.

`sources.py` says which files and folders are read.

A base and several adapter files form one model. With a base, only the adapters of the released checkpoint are used.
"""

import importlib.util
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from instdiff_jax.checkpoint.buffers import check_schedule, schedule_buffers
from instdiff_jax.checkpoint.rename import first_few, from_state_dict, is_ignored, to_state_dict
from instdiff_jax.checkpoint.shapes import ADAPTERS
from instdiff_jax.checkpoint.sources import ADAPTER_KEYS, State, open_source, read_vae, split_convnext
from instdiff_jax.checkpoint.tables import PARTS, Entry, rename_table
from instdiff_jax.checkpoint.torch_file import write_safetensors, write_torch
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError

_logger = logging.getLogger(__name__)

FLOATS = tuple(np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))


def load_pytorch(
    paths: Sequence[str | Path],
    config: ModelConfig,
    convnext: str | Path | None = None,
    verify: bool = True,
    vae: str | Path | None = None,
    ignore_extra: bool = False,
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads files and folders as one model. Leaves of files are read-only views of them, in their dtype.

    Args:
        paths: the released checkpoint, or a base and any adapter files, in any order; see `sources.open_source`.
        config: the model's sizes.
        convnext: ImageNet weights of ConvNeXt in their official layout, for UniFusion's trunk.
        verify: compare the files with the checksums in them.
        vae: an autoencoder instead of the others'; see `sources.read_vae`.
        ignore_extra: keys that no part of the model has are logged and dropped, instead of an error.

    Returns:
        The parameter tree, and which of ADAPTERS it lacks.

    Raises:
        InputError: for unreadable or unknown files, for a key that is missing, extra, of another shape,
            given twice, not finite or not a float tensor, and for buffers of another noise schedule.
    """
    files = [(Path(path), *open_source(Path(path), config, verify, ignore_extra)) for path in paths]
    if any(kind == "base" for _, kind, _ in files):
        files = [(path, kind, _adapters_only(state) if kind == "released" else state) for path, kind, state in files]
    if convnext is not None:
        files.append((Path(convnext), "adapter", split_convnext(Path(convnext), verify)))
    if vae is not None:
        for _, _, state in files:
            state.pop("autoencoder", None)
        files.append((Path(vae), "vae", read_vae(Path(vae), config, verify)))
    tables = {part: rename_table(part, config) for part in PARTS}
    for path, _, state in files:
        _drop_extra(path, state, tables, ignore_extra)
    merged = _merge(files)
    source = ", ".join(str(path) for path, _, _ in files)
    check_schedule(merged["diffusion"], config.schedule, source)
    present = {tables["model"][key].group for key in merged["model"] if key in tables["model"]}
    absent = tuple(group for group in ADAPTERS if group not in present)
    params: dict[str, Any] = {}
    for part in PARTS:
        params.update(from_state_dict(part, merged[part], config, absent, source))
    return params, absent


def _adapters_only(state: State) -> State:
    return {"model": {key: value for key, value in state["model"].items() if re.fullmatch(ADAPTER_KEYS, key)}}


def _drop_extra(path: Path, state: State, tables: Mapping[str, Mapping[str, Entry]], ignore: bool) -> None:
    """Removes what is no parameter. What other programs are known to store goes silently, the rest if `ignore`."""
    for part in tables.keys() & state.keys():
        state[part] = {key: value for key, value in state[part].items() if not is_ignored(part, key)}
    extra = list(state.pop("extra", {}))
    if extra and not ignore:
        raise InputError(f"{path}: {first_few(extra)}: not a key of Stable Diffusion 1.5; --ignore_extra drops it")
    if ignore:
        for part, table in tables.items():
            unknown = [key for key in state.get(part, {}) if key not in table]
            for key in unknown:
                del state[part][key]
            extra += [f"{part}: {key}" for key in unknown]
    if extra:
        _logger.warning("%s: %d extra keys dropped: %s", path, len(extra), first_few(extra, 20))


def _merge(files: Sequence[tuple[Path, str, State]]) -> State:
    """All files' tensors; each is checked, and given once."""
    merged: State = {part: {} for part in (*PARTS, "diffusion")}
    origin: dict[tuple[str, str], Path] = {}
    for path, _, state in files:
        for part, tensors in state.items():
            for key, value in tensors.items():
                if (part, key) in origin:
                    raise InputError(f"{path}: {key}: already given by {origin[part, key]}")
                if not isinstance(value, np.ndarray) or value.dtype not in FLOATS:
                    found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                    raise InputError(f"{path}: {part}: {key}: expected a tensor of floats, got {found}")
                if not _is_finite(value):
                    raise InputError(f"{path}: {part}: {key}: holds NaN or infinity, expected finite numbers")
                origin[part, key] = path
                merged[part][key] = value
    return merged


def _is_finite(value: np.ndarray) -> bool:
    # Minimum and maximum propagate NaN, and allocate no array of the tensor's size.
    with np.errstate(invalid="ignore"):
        return not value.size or bool(np.isfinite(value.min()) and np.isfinite(value.max()))


def save_pytorch(path: str | Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Writes a checkpoint in the released layout, which the official code loads with strict=True.

    Empties `params` while writing, to avoid a second copy of the model.

    Args:
        path: .pth (a dict of model, autoencoder, text_encoder and diffusion; needs torch) or .safetensors
            (the same as flat keys with these prefixes; needs no torch).
        params: the whole parameter tree as numpy arrays; empty afterwards.
        config: the model's sizes.

    Raises:
        InputError: for another file ending, an incomplete tree, or a .pth without torch installed.
    """
    path = Path(path)
    check_export_path(path)
    content: State = {part: to_state_dict(part, params, config) for part in PARTS}
    params.clear()
    content["diffusion"] = dict(schedule_buffers(config.schedule))
    if path.suffix == ".pth":
        write_torch(path, content)
    else:
        write_safetensors(path, {f"{part}.{key}": x for part, group in content.items() for key, x in group.items()})


def check_export_path(path: Path) -> None:
    """Raises InputError if `save_pytorch` could not write to this path."""
    if path.suffix not in (".pth", ".safetensors"):
        raise InputError(f"{path}: expected a name ending in .pth or .safetensors")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if path.suffix == ".pth" and importlib.util.find_spec("torch") is None:
        raise InputError(f"{path}: writing .pth needs torch; write .safetensors, or install torch")
