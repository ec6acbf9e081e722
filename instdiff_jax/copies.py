"""Copies of folders in buckets on this machine, for what can be read from files only."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from tqdm import tqdm

from instdiff_jax.buckets import as_path, bucket_errors, is_bucket, objects
from instdiff_jax.errors import InputError
from instdiff_jax.files import write_file
from instdiff_jax.paths import cache_folder, inside

_AT_ONCE = 16  # objects


def local_copy(
    folder: str | os.PathLike, wanted: Callable[[str], bool] = lambda name: True, optional: bool = False
) -> Path:
    """A folder on this machine as it is; of one in a bucket, a copy that is kept in the user's cache folder.

    Only what has changed is copied again, and what is gone is removed. The processes of a host share the copy.

    Args:
        folder: the folder.
        wanted: which files to copy, by their names below the folder.
        optional: the folder may be missing.

    Raises:
        InputError: if it is missing or cannot be read, or there is no room for it.
    """
    if not is_bucket(folder):
        return Path(folder)
    source = as_path(folder)
    target = cache_folder() / "buckets" / str(source).removeprefix("gs://")
    found = {name: facts for name, facts in objects(source).items() if wanted(name)}
    if not found and not optional:
        raise InputError(f"{source}: nothing there that can be read")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with open(target.with_name(f".{target.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _mirror(source, target, found, wanted)
    except OSError as error:
        raise InputError(f"{target}: the copy of {source} cannot be written: {error.strerror or error}") from error
    return target


def _mirror(source: Path, target: Path, found: dict[str, dict[str, Any]], wanted: Callable[[str], bool]) -> None:
    for path in [path for path in target.rglob("*") if path.is_file()]:
        name = path.relative_to(target).as_posix()
        if wanted(name) and name not in found:
            path.unlink()
    new = {name: facts for name, facts in found.items() if not _is_copy(inside(target, name, str(source)), facts)}
    need, target_disk = sum(facts["size"] for facts in new.values()), target.parent
    if need > (free := shutil.disk_usage(target_disk).free):
        raise InputError(
            f"{source}: {need / 1e9:.1f} GB to copy, and {free / 1e9:.1f} GB of room in {target_disk}; "
            "XDG_CACHE_HOME=DIR chooses another disk"
        )

    def copy(name: str) -> int:
        with bucket_errors(source / name), (source / name).open("rb") as file:
            write_file(target / name, lambda out: shutil.copyfileobj(file, out, 1 << 22), sync=False)
        mark_copy(target / name, new[name])
        return new[name]["size"]

    options = dict(desc=f"copying {source}", unit="B", unit_scale=True, disable=not new, file=sys.stderr)
    with ThreadPoolExecutor(_AT_ONCE) as pool, tqdm(total=need, **options) as bar:
        for size in pool.map(copy, new):
            bar.update(size)


def mark_copy(path: Path, facts: dict[str, Any]) -> None:
    """Gives a file the time of the object that it is a copy of."""
    time = int(facts["mtime"].timestamp() * 1e6) * 1000
    os.utime(path, ns=(time, time))


def _is_copy(path: Path, facts: dict[str, Any]) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    return there.st_size == facts["size"] and there.st_mtime_ns == int(facts["mtime"].timestamp() * 1e6) * 1000


def share_copy(local: Path, folder: str | os.PathLike, last: str = "") -> None:
    """Writes what this machine has added to its copy to the bucket; nothing for a folder on this machine."""
    from instdiff_jax.buckets import upload_folder

    if not is_bucket(folder):
        return
    upload_folder(local, folder, last)
    for name, facts in objects(folder).items():
        mark_copy(local / name, facts)
