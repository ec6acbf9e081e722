"""Checkpoint folders: config.json, tokenizer/ and params/ (orbax, one checkpoint per top-level part).

config.json holds the model's sizes, sampling defaults, which adapters are absent, and the number and
size of the files of every part, so that an incomplete copy is noticed.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import operator
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from instdiff_jax.checkpoint.rename import check_keys
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_shapes
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten, unflatten

FORMAT, VERSION = "instdiff_jax checkpoint", 1
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json")
CONCURRENT_GB = 1  # how much orbax may hold in flight; bounds the memory beside the parameters themselves


# Parts below this many bytes are stored in a few files (OCDBT); above it every array is its own.
SMALL_PART = 1 << 28


def _handler(use_ocdbt: bool = False) -> ocp.PyTreeCheckpointHandler:
    # Without OCDBT every array is its own file, written as it is read: with it, all are gathered in memory first, which
    # only a small model can afford. (Reading finds out for itself.)
    # Compression makes float weights a tenth smaller and takes most of the time of reading them.
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=use_ocdbt,
        use_compression=False,
        save_concurrent_gb=CONCURRENT_GB,
        restore_concurrent_gb=CONCURRENT_GB,
    )


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Keeps orbax from warning at every save that there is no OCDBT to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def find_tokenizer(name: str, vocab_size: int | None = None) -> Path:
    """The folder of a CLIP tokenizer, on this machine only.

    Args:
        name: a folder, or a name on the hub whose files are in the hub's cache.
        vocab_size: the text encoder's vocabulary, which the tokenizer's must not exceed.

    Raises:
        InputError: where it is not there, is damaged or is too large for the text encoder.
    """
    where = "config.model.text_encoder.tokenizer"
    folder = Path(name)
    if not folder.is_dir():
        folder = _cached_tokenizer(name)
    missing = [file for file in TOKENIZER_FILES[:2] if not (folder / file).is_file()]
    if missing:
        raise InputError(f"{where}: {folder}: no {' and no '.join(missing)} there")
    try:
        vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
        largest = max(map(operator.index, vocabulary.values()))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise InputError(f"{where}: {folder / 'vocab.json'}: expected ids by token ({error})") from error
    # Without merges every word would become its letters, and nothing would say so.
    merges = [line for line in (folder / "merges.txt").read_bytes().splitlines() if not line.startswith(b"#version")]
    if not any(merges) and len(vocabulary) > 2 * 256 + 2:
        raise InputError(f"{where}: {folder / 'merges.txt'}: no merges there for {len(vocabulary)} tokens")
    if vocab_size is not None and largest >= vocab_size:
        raise InputError(f"{where}: {folder}: ids up to {largest}, but the text encoder has {vocab_size}")
    return folder


def _cached_tokenizer(name: str) -> Path:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, TOKENIZER_FILES[0])
    except ValueError:  # the hub's word for a name that cannot be one
        found = None
    if not isinstance(found, str):
        raise InputError(
            f"config.model.text_encoder.tokenizer: {name}: neither a folder here nor in the hub's cache; "
            "give a folder with --config.model.text_encoder.tokenizer=DIR"
        )
    return Path(found).parent


def check_output(directory: str | os.PathLike, overwrite: bool = False) -> None:
    """Raises InputError where `save_folder` must not write: a file, or a folder that would be lost."""
    directory = Path(directory)
    if not directory.exists() and not directory.is_symlink():
        return
    if not directory.is_dir() or directory.is_symlink():
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
            raise InputError(f"{path}: no part of the checkpoint there, and --overwrite would delete it; move it away")


@contextlib.contextmanager
def _replaced_when_done(directory: Path) -> Iterator[Path]:
    """Gives a folder beside `directory` that takes its place at the end, and vanishes on an error."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    # Names of its own: in a container every process may have the same number.
    beside, old = (directory.with_name(f".{directory.name}.{uuid.uuid4().hex}.{end}") for end in ("part", "old"))
    beside.mkdir()
    try:
        yield beside
        if directory.exists():
            directory.rename(old)
        beside.rename(directory)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if directory.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(directory)


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
        directory: where; missing, empty, or a checkpoint folder and `overwrite`.
        params: the parameter tree, numpy (memory-mapped stays so) or jax arrays.
        model_config: its sizes; the tokenizer's name is replaced by the folder's own copy.
        sampling_config: defaults for sampling.
        tokenizer_dir: where the tokenizer's files are.
        absent: those of ADAPTERS that the tree lacks.
        overwrite: replace a checkpoint folder.

    Raises:
        InputError: where it must not write, or the tree does not have the sizes of `model_config`.
    """
    directory = Path(directory).absolute()
    check_output(directory, overwrite)
    _check_tree({path: np.shape(leaf) for path, leaf in flatten(params).items()}, model_config, absent, "parameters")
    with _replaced_when_done(directory) as beside:
        (beside / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if (Path(tokenizer_dir) / name).is_file():
                shutil.copyfile(Path(tokenizer_dir) / name, beside / "tokenizer" / name)
        files = {}
        for part, tree in params.items():
            small = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) < SMALL_PART
            try:
                with _without_warnings(), ocp.Checkpointer(_handler(use_ocdbt=small)) as checkpointer:
                    checkpointer.save(beside / "params" / part, args=ocp.args.PyTreeSave(dict(tree)))
            except (ValueError, RuntimeError) as error:  # tensorstore's word for a full disk
                raise InputError(f"{directory}: cannot be written ({_first_line(error)})") from error
            # orbax's mark that a part is whole names this machine's path; `files` marks it here.
            (beside / "params" / part / "commit_success.txt").unlink(missing_ok=True)
            files[part] = _file_count(beside / "params" / part)
            if small:
                files[part]["sha256"] = _digest(tree)
        model = model_config.to_dict()
        model["text_encoder"]["tokenizer"] = "tokenizer"
        content = {
            "format": FORMAT,
            "version": VERSION,
            "absent": [group for group in ADAPTERS if group in absent],
            "model": model,
            "sampling": sampling_config.to_dict(),
            "params": files,
        }
        (beside / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _digest(tree: Mapping[str, Any]) -> str:
    """Names what a part holds: OCDBT's files have other names and bytes at every saving."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        digest.update(f"{'/'.join(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def stored_digests(directory: str | os.PathLike) -> dict[str, str]:
    """Part to a digest of the values it was saved with; parts of many files have none."""
    counts = _read_json(Path(directory))["params"]
    return {part: count["sha256"] for part, count in counts.items() if isinstance(count, dict) and "sha256" in count}


def _file_count(folder: Path) -> dict[str, int]:
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return {"files": len(sizes), "bytes": sum(sizes)}


def _read_json(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(f"{directory}: not a checkpoint folder: no config.json there")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error})") from error
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
    return content


def read_config(directory: str | os.PathLike) -> tuple[ModelConfig, SamplingConfig, tuple[str, ...]]:
    """What a checkpoint folder says of itself; reads no weights.

    Returns:
        The model's sizes (the tokenizer is the folder's own), the sampling defaults, and which adapters are absent.

    Raises:
        InputError: for a folder that is no checkpoint, or a damaged config.json.
    """
    directory = Path(directory)
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
) -> dict[str, Any]:
    """Reads parameters from a checkpoint folder, each array straight to its place and type.

    Args:
        directory: the checkpoint folder.
        parts: top-level keys of the tree to read (unet, unifusion, autoencoder, text_encoder); all by default.
        dtype: type of the leaves with two axes or more; vectors and scalars are float32. None: all as stored.
        sharding: one sharding for all leaves, or a tree of shardings; the default device otherwise.
        as_numpy: give numpy arrays instead of jax arrays.

    Raises:
        InputError: for a part that is absent, and for missing, damaged or mismatched files.
    """
    directory = Path(directory).absolute()
    config, _, absent = read_config(directory)
    shapes = parameter_shapes(config, absent)
    counts = _read_json(directory)["params"]
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params = {}
    for part in parts or shapes:
        folder = directory / "params" / part
        if part not in shapes or part not in counts:
            raise InputError(f"{directory}: {part}: this checkpoint does not have it (absent: {', '.join(absent)})")
        found, noted = _file_count(folder), counts[part]
        expected = {key: noted.get(key) for key in found} if isinstance(noted, dict) else noted
        if found != expected:
            raise InputError(f"{folder}: incomplete or changed: expected {expected}, got {found}")
        digest = noted.get("sha256") if isinstance(noted, dict) else None
        try:
            params[part] = _restore_part(folder, part, shapes[part], dtype, sharding, as_numpy, digest)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, OSError, RuntimeError, AttributeError) as error:
            raise InputError(f"{folder}: damaged ({_first_line(error)})") from error
    return params


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _restore_part(
    folder: Path, part: str, shapes: dict[str, Any], dtype: Any, sharding: Any, as_numpy: bool, digest: str | None
) -> Any:
    expected = flatten({part: shapes})
    with _without_warnings(), ocp.Checkpointer(_handler()) as checkpointer:
        metadata = checkpointer.metadata(folder).item_metadata
        if metadata is None:
            raise InputError(f"{folder}: damaged: what it holds cannot be read")
        stored = flatten({part: metadata.tree})
        found = {"/".join(path): tuple(leaf.shape) for path, leaf in stored.items()}
        check_keys(found, {"/".join(path): shape for path, shape in expected.items()}, str(folder))
        odd = next((path for path, leaf in stored.items() if not jnp.issubdtype(leaf.dtype, jnp.floating)), None)
        if odd is not None:
            raise InputError(f"{folder}: {'/'.join(odd)}: expected floats, got {stored[odd].dtype}")
        places = flatten(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(expected, sharding)
        restore_args = {}
        for path, shape in expected.items():
            leaf_dtype = stored[path].dtype if dtype is None else (dtype if len(shape) >= 2 else np.float32)
            if digest is not None:
                # Small enough to be looked at as it was saved; only then to its type and place.
                leaf_args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=stored[path].dtype)
            elif as_numpy:
                leaf_args = ocp.RestoreArgs(restore_type=np.ndarray, dtype=leaf_dtype)
            else:
                leaf_args = ocp.ArrayRestoreArgs(sharding=places[path], dtype=leaf_dtype, global_shape=shape)
            restore_args[path] = leaf_args
        tree = unflatten(restore_args)[part]
        values = checkpointer.restore(folder, args=ocp.args.PyTreeRestore(restore_args=tree))
    if digest is None:
        return values
    if _digest(values) != digest:
        raise InputError(f"{folder}: damaged: its values are not those that were saved")
    placed = {}
    for path, leaf in flatten({part: values}).items():
        leaf = leaf.astype(leaf.dtype if dtype is None else (dtype if leaf.ndim >= 2 else np.float32), copy=False)
        placed[path] = leaf if as_numpy else jax.make_array_from_callback(leaf.shape, places[path], leaf.__getitem__)
    return unflatten(placed)[part]


def _check_tree(
    found: Mapping[tuple[str, ...], tuple[int, ...]], config: ModelConfig, absent: Collection[str], where: str
) -> None:
    expected = flatten(parameter_shapes(config, absent))
    check_keys(
        {"/".join(path): tuple(shape) for path, shape in found.items()},
        {"/".join(path): shape for path, shape in expected.items()},
        where,
    )
