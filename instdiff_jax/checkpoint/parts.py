"""Saves and restores one part of a parameter tree (one network) with orbax.

Beside the files goes a note in the folder's config.json: their number and size, so that an incomplete copy is noticed,
for a small part a digest of its values, and for a large part the checksum of a list of its files' checksums.
"""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from instdiff_jax.buckets import files_below
from instdiff_jax.checkpoint.quiet import say_errors_once
from instdiff_jax.checkpoint.rename import check_keys
from instdiff_jax.checkpoint.verify import start_compare_folder, write_checksums
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten, unflatten

# Parts below this many bytes are stored in a few files (OCDBT), larger ones in one file per array.
SMALL_PART = 1 << 28
CONCURRENT_GB = 1  # how much orbax may hold in flight; bounds the memory beside the parameters themselves


def save_part(folder: Path, tree: Mapping[str, Any]) -> dict[str, Any]:
    """Writes a part to a new folder.

    Returns:
        Its note: {"files", "bytes"}, and "sha256" for a small part, "crc32" for a large one (see verify.py).

    Raises:
        ValueError, RuntimeError: if the disk is full.
    """
    say_errors_once()
    small = sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) < SMALL_PART
    with ocp.Checkpointer(_handler(use_ocdbt=small)) as checkpointer:
        checkpointer.save(folder, args=ocp.args.PyTreeSave(dict(tree)))
    # orbax's mark that a part is whole holds this machine's path; the note replaces it.
    (folder / "commit_success.txt").unlink(missing_ok=True)
    check = {"sha256": tree_digest(tree)} if small else {"crc32": write_checksums(folder)}
    return _count_files(folder) | check


def restore_part(
    folder: Path,
    part: str,
    shapes: Mapping[str, Any],
    note: Any,
    dtype: Any,
    sharding: Any,
    as_numpy: bool,
    verify: bool,
) -> Any:
    """Reads a part; see `folder.restore_params`.

    Args:
        folder: of the part.
        part: its top-level key, for errors and for a tree of shardings.
        shapes: its tree of shapes.
        note: what `save_part` returned.
        dtype: of leaves with two axes or more; None: all as stored.
        sharding: one for all leaves, or a tree with the key `part`.
        as_numpy: give numpy arrays.
        verify: compare with the note's digest or checksum, while reading.

    Raises:
        InputError: for missing, damaged or mismatched files.
    """
    found = _count_files(folder)
    expected = {key: note.get(key) for key in found} if isinstance(note, dict) else note
    if found != expected:
        raise InputError(f"{folder}: incomplete or changed: expected {expected}, got {found}")
    digest, crc = (note.get(kind) if isinstance(note, dict) and verify else None for kind in ("sha256", "crc32"))
    comparison = None if crc is None else start_compare_folder(folder, crc)
    try:
        restored = _restore(folder, flatten({part: shapes}), digest, dtype, sharding, as_numpy)[part]
        if comparison is not None:
            comparison.result()
        return restored
    except InputError:
        raise
    except (ValueError, KeyError, TypeError, OSError, RuntimeError, AttributeError) as error:
        raise InputError(f"{folder}: damaged ({first_line(error)})") from error


def _restore(folder: Path, shapes: dict, digest: str | None, dtype: Any, sharding: Any, as_numpy: bool) -> dict:
    (part,) = {path[0] for path in shapes}
    places = flatten(sharding) if isinstance(sharding, Mapping) else dict.fromkeys(shapes, sharding)
    # In a bucket orbax looks for its own mark that a part is whole; the note replaces it.
    finished = ocp.path.atomicity.AtomicRenameTemporaryPath
    say_errors_once()
    with ocp.Checkpointer(_handler(), temporary_path_class=finished) as checkpointer:
        stored = _stored_dtypes(checkpointer, folder, part, shapes)
        dtypes = {path: _leaf_dtype(stored[path], shape, dtype) for path, shape in shapes.items()}
        restore_args = {}
        for path, shape in shapes.items():
            if digest is not None:
                # Restored as saved, to be compared with the digest; cast and placed afterwards.
                restore_args[path] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=stored[path])
            elif as_numpy:
                restore_args[path] = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtypes[path])
            else:
                restore_args[path] = ocp.ArrayRestoreArgs(sharding=places[path], dtype=dtypes[path], global_shape=shape)
        args = ocp.args.PyTreeRestore(restore_args=unflatten(restore_args)[part])
        values = {part: checkpointer.restore(folder, args=args)}
    if digest is None:
        return values
    if tree_digest(values[part]) != digest:
        raise InputError(f"{folder}: damaged: its values are not those that were saved")
    leaves = {path: leaf.astype(dtypes[path], copy=False) for path, leaf in flatten(values).items()}
    if not as_numpy:
        leaves = {
            path: jax.make_array_from_callback(leaf.shape, places[path], leaf.__getitem__)
            for path, leaf in leaves.items()
        }
    return unflatten(leaves)


def _stored_dtypes(checkpointer: ocp.Checkpointer, folder: Path, part: str, shapes: dict) -> dict[tuple, np.dtype]:
    """The dtypes of a part's arrays, after a check that they are those of `shapes`."""
    metadata = checkpointer.metadata(folder).item_metadata
    if metadata is None:
        raise InputError(f"{folder}: damaged: what it holds cannot be read")
    stored = flatten({part: metadata.tree})
    found = {"/".join(path): tuple(leaf.shape) for path, leaf in stored.items()}
    check_keys(found, {"/".join(path): shape for path, shape in shapes.items()}, str(folder))
    for path, leaf in stored.items():
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise InputError(f"{folder}: {'/'.join(path)}: expected floats, got {leaf.dtype}")
    return {path: leaf.dtype for path, leaf in stored.items()}


def _leaf_dtype(stored: Any, shape: tuple[int, ...], dtype: Any) -> Any:
    if dtype is None:
        return stored
    return dtype if len(shape) >= 2 else np.float32


def tree_digest(tree: Mapping[str, Any]) -> str:
    """A hash of a tree's values: OCDBT's files have other names and bytes each time they are saved."""
    digest = hashlib.sha256()
    for path, leaf in sorted(flatten(tree).items()):
        digest.update(f"{'/'.join(path)} {leaf.dtype} {leaf.shape}\n".encode())
        digest.update(np.ascontiguousarray(leaf).tobytes())
    return digest.hexdigest()


def _count_files(folder: Path) -> dict[str, int]:
    sizes = files_below(folder).values()
    return {"files": len(sizes), "bytes": sum(sizes)}


def first_line(error: Exception) -> str:
    """The first line of an error's text."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _handler(use_ocdbt: bool = False) -> ocp.PyTreeCheckpointHandler:
    # With OCDBT orbax gathers all arrays in memory before it writes, which only a small part can afford. (Reading does
    # not need to be told.) Compression saves a tenth of the size of float weights and takes most of the reading time.
    return ocp.PyTreeCheckpointHandler(
        use_ocdbt=use_ocdbt,
        use_compression=False,
        save_concurrent_gb=CONCURRENT_GB,
        restore_concurrent_gb=CONCURRENT_GB,
    )
