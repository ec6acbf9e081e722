"""Checkpoint folders: config.json, tokenizer/ and params/ (orbax, one checkpoint per top-level part).

config.json holds the model's sizes, the sampling defaults, which adapters are absent, and a note on the files of every
part (see parts.py).
"""

import dataclasses
import json
import os
import shutil
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from instdiff_jax.buckets import absolute, as_path, bucket_errors, files_below, is_bucket
from instdiff_jax.checkpoint.parts import first_line, restore_part, save_part
from instdiff_jax.checkpoint.rename import check_keys
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_shapes
from instdiff_jax.checkpoint.tokenizer_files import TOKENIZER_FILES
from instdiff_jax.checkpoint.verify import check_intact, compare_files, file_crcs, read_checksums, signed
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.copies import local_copy
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, recover_folder, remove_leftovers, replace_folder, write_errors
from instdiff_jax.models.networks import Networks
from instdiff_jax.paths import check_regular
from instdiff_jax.tree import flatten

FORMAT, VERSION = "instdiff_jax checkpoint", 1


def check_output(directory: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises InputError if `save_folder` must not write there: a file, or a folder that would be lost."""
    directory = as_path(directory)
    if not is_bucket(directory):
        remove_leftovers(directory.absolute().parent, directory.name)
    is_link = os.path.islink(directory)
    if not directory.exists() and not is_link:
        return
    if not directory.is_dir() or is_link:
        raise InputError(f"{directory}: exists and is not a folder")
    if not any(directory.iterdir()):
        return
    try:
        read_config(directory)
    except InputError as error:
        raise InputError(f"{directory}: not empty and not a checkpoint folder; nothing is written there") from error
    if not overwrite:
        raise InputError(f"{directory}: a checkpoint is there already; --overwrite replaces it")
    for path in sorted(directory.iterdir()):
        if path.name not in ("config.json", "params", "tokenizer"):
            raise InputError(f"{path}: not part of the checkpoint, and --overwrite would delete it; move it away")


def save_folder(
    directory: str | os.PathLike,
    params: Mapping[str, Any],
    model_config: ModelConfig,
    sampling_config: SamplingConfig,
    tokenizer_dir: str | os.PathLike,
    absent: Collection[str] = (),
    overwrite: bool = False,
) -> None:
    """Writes a checkpoint folder; it appears whole or not at all.

    Args:
        directory: a new or empty folder, or with `overwrite` a checkpoint folder.
        params: the parameter tree, of numpy or jax arrays; memory-mapped arrays are not read as a whole.
        model_config: its sizes; the tokenizer becomes the folder's own copy.
        sampling_config: defaults for sampling.
        tokenizer_dir: the folder of the tokenizer.
        absent: those of ADAPTERS that the tree lacks.
        overwrite: replace a checkpoint folder.

    Raises:
        InputError: if it must not write there, or the tree does not have the sizes of `model_config`.
    """
    directory = absolute(directory)
    check_output(directory, overwrite)
    _check_tree({path: np.shape(leaf) for path, leaf in flatten(params).items()}, model_config, absent, "parameters")
    with replace_folder(directory, last="config.json") as beside:
        (beside / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, beside / "tokenizer" / name)
        try:
            with write_errors(directory):
                notes = {part: save_part(beside / "params" / part, tree) for part, tree in params.items()}
        except InputError:
            raise
        except (ValueError, RuntimeError) as error:  # what tensorstore raises
            raise InputError(f"{directory}: cannot be written ({first_line(error)})") from error
        model = model_config.to_dict()
        model["text_encoder"]["tokenizer"] = "tokenizer"
        content = {
            "format": FORMAT,
            "version": VERSION,
            "absent": [group for group in ADAPTERS if group in absent],
            "model": model,
            "sampling": sampling_config.to_dict(),
            "params": notes,
            "tokenizer": file_crcs(beside / "tokenizer", [path.name for path in (beside / "tokenizer").iterdir()]),
        }
        (beside / "config.json").write_text(json.dumps(signed(content), indent=2) + "\n", encoding="utf-8")


def stored_digests(directory: str | os.PathLike) -> dict[str, str]:
    """The digest of each part's values when it was saved; large parts have none."""
    return _notes_with(directory, "sha256")


def has_checksums(directory: str | os.PathLike) -> bool:
    """Whether config.json tells by itself whether any value in the folder has changed since it was saved."""
    content = _read_json(as_path(directory))
    known = _notes_with(directory, "sha256") | _notes_with(directory, "crc32")
    return known.keys() == content["params"].keys() and isinstance(content.get("tokenizer"), dict)


def part_checksums(directory: str | os.PathLike, part: str) -> dict[str, int]:
    """The checksum of each file of a part: those noted when it was saved, else those of the files as they are."""
    folder = as_path(directory) / "params" / part
    noted = _notes_with(directory, "crc32").get(part)
    if noted is not None:
        return read_checksums(folder, noted)
    return file_crcs(folder, files_below(folder))


def _notes_with(directory: str | os.PathLike, kind: str) -> dict[str, Any]:
    notes = _read_json(as_path(directory))["params"]
    return {part: note[kind] for part, note in notes.items() if isinstance(note, dict) and kind in note}


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    recover_folder(directory)
    with bucket_errors(directory):
        found = path.is_file()
    if not found:
        raise InputError(f"{directory}: not a checkpoint folder: no config.json there")
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise InputError(f"{path}: not the config.json of a checkpoint folder: format is not {FORMAT!r}")
    if content.get("version") != VERSION:
        raise InputError(f"{path}: version: expected {VERSION}, got {content.get('version')!r}")
    absent = content.get("absent")
    if not isinstance(absent, list) or not all(group in ADAPTERS for group in absent):
        raise InputError(f"{path}: absent: expected a list of {', '.join(ADAPTERS)}, got {absent!r}")
    for name in ("model", "sampling", "params"):
        if not isinstance(content.get(name), dict):
            raise InputError(f"{path}: {name}: expected a group of settings, got {content.get(name)!r}")
    check_intact(path, content)
    return content


def read_config(directory: str | os.PathLike) -> tuple[ModelConfig, SamplingConfig, tuple[str, ...]]:
    """Reads the config of a checkpoint folder.

    Returns:
        The model's sizes (the tokenizer is the folder's own), the sampling defaults, and which adapters are absent.

    Raises:
        InputError: for a folder that is no checkpoint, or a damaged config.json.
    """
    directory = as_path(directory)
    content = _read_json(directory)
    path = directory / "config.json"
    model = ModelConfig.from_dict(content["model"], f"{path}: model")
    sampling = SamplingConfig.from_dict(content["sampling"], f"{path}: sampling")
    text = dataclasses.replace(model.text_encoder, tokenizer=str(directory / model.text_encoder.tokenizer))
    return dataclasses.replace(model, text_encoder=text), sampling, tuple(content["absent"])


def restore_params(
    directory: str | os.PathLike,
    parts: Collection[str] | None = None,
    dtype: Any = np.float32,
    sharding: Any = None,
    as_numpy: bool = False,
    verify: bool = True,
) -> dict[str, Any]:
    """Reads parameters from a checkpoint folder, each array directly in its dtype and sharding.

    Args:
        directory: the checkpoint folder.
        parts: top-level keys of the tree to read (unet, unifusion, autoencoder, text_encoder); all by default.
        dtype: of leaves with two axes or more; vectors and scalars are float32. None: all as stored.
        sharding: one sharding for all leaves, or a tree of shardings; the default device otherwise.
        as_numpy: give numpy arrays instead of jax arrays.
        verify: compare what is read, and the tokenizer's files, with the digests and checksums in config.json.

    Raises:
        InputError: for a part that is absent, and for missing, damaged or mismatched files.
    """
    directory = absolute(directory)
    config, _, absent = read_config(directory)
    content = _read_json(directory)
    notes = content["params"]
    check_regular(directory / "params")
    if verify and "text_encoder" in (parts or notes) and isinstance(content.get("tokenizer"), dict):
        compare_files(local_copy(directory / "tokenizer"), content["tokenizer"])
    known = [part for part in Networks._fields if parts is None or part in parts]
    shapes = parameter_shapes(config, absent, known)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    for part in parts or shapes:
        if part not in shapes or part not in notes:
            raise InputError(f"{directory}: {part}: this checkpoint does not have it (absent: {', '.join(absent)})")
        folder = directory / "params" / part
        params[part] = restore_part(folder, part, shapes[part], notes[part], dtype, sharding, as_numpy, verify)
    return params


def _check_tree(
    found: Mapping[tuple[str, ...], tuple[int, ...]], config: ModelConfig, absent: Collection[str], where: str
) -> None:
    expected = flatten(parameter_shapes(config, absent))
    check_keys(
        {"/".join(path): tuple(shape) for path, shape in found.items()},
        {"/".join(path): shape for path, shape in expected.items()},
        where,
    )
