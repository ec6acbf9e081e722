"""A cache of every image's autoencoder posterior. Training then neither decodes nor encodes images.

mean.npy, logvar.npy    [2, images, h, w, z]; first axis: original, flipped (length 1 if data are never flipped)
crc32.npy               uint32 [2, 2, images]: checksums of the rows of mean and of logvar
latents.json            what they were made from; written last
"""

import collections
import fcntl
import os
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from tqdm import tqdm

from instdiff_jax.checkpoint.verify import check_intact, compare_files, file_crc, signed
from instdiff_jax.copies import local_copy, share_copy
from instdiff_jax.data.arrays import DAMAGED, new_array
from instdiff_jax.data.dataset import InstanceDataset, Record
from instdiff_jax.data.images import Crop
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, replace_folder, write_array, write_json
from instdiff_jax.images import open_image
from instdiff_jax.paths import check_regular

EncodeFunction = Callable[
    [UInt8[np.ndarray, "b H W 3"]], tuple[Float[np.ndarray, "b h w z"], Float[np.ndarray, "b h w z"]]
]

NAMES = ("mean", "logvar")


class LatentCache:
    """Posteriors by image and flip, memory-mapped; cheap to send to another process."""

    def __init__(
        self,
        path: str | Path,
        dataset: InstanceDataset,
        encoder_fingerprint: str,
        image_size: int,
        flips: bool = True,
    ):
        """Opens a cache that `cache_latents` made.

        Raises:
            InputError: if it is missing, or was made from other data, with another encoder or at another size.
        """
        self.path = Path(path)
        self._arrays, self._crcs = None, None
        file = self.path / "latents.json"
        meta = read_json(file)
        if not isinstance(meta, dict):
            raise InputError(f"{file}: expected a cache of latents, found a {type(meta).__name__}")
        check_intact(file, meta)
        self._rows, self._crcs_note = (1 + flips, len(dataset)), meta.get("checksums")
        for name, expected in _facts(dataset, encoder_fingerprint, image_size, flips).items():
            if meta.get(name) != expected:
                raise InputError(f"{file}: {name}: expected {expected!r}, got {meta.get(name)!r}; make the cache again")

    def lookup(self, index: int, flip: bool) -> tuple[Float[np.ndarray, "h w z"], Float[np.ndarray, "h w z"]]:
        """Mean and log-variance (raw, not clamped or scaled) of an image, float32.

        Raises:
            InputError: if their checksums do not match.
        """
        if self._arrays is None:
            self._open()
        mean, logvar = (np.asarray(array[int(flip), index], np.float32) for array in self._arrays)
        for k, row in enumerate((mean, logvar)):
            if self._crcs is not None and zlib.crc32(row.data) != self._crcs[k, int(flip), index]:
                raise InputError(f"{self.path / NAMES[k]}.npy: image {index}: damaged; make the cache again")
        return mean, logvar

    def _open(self) -> None:
        file = self.path / "crc32.npy"
        check_regular(self.path)
        if self._crcs_note is not None:
            compare_files(self.path, {file.name: self._crcs_note})
        try:
            arrays = [np.load(self.path / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in NAMES]
            self._crcs = np.load(file, allow_pickle=False) if file.exists() else None  # older caches have none
        except DAMAGED as error:
            raise InputError(f"{self.path}: damaged ({error}); make the cache again") from error
        for name, array in zip(NAMES, arrays, strict=True):
            if array.ndim != 5 or array.shape[:2] != self._rows or array.dtype != np.float32:
                found = f"{array.dtype} {list(array.shape)}"
                raise InputError(f"{self.path / name}.npy: damaged: it holds {found}; make the cache again")
        self._arrays = arrays

    def deviation(self, images: int = 1000) -> float:
        """Standard deviation of the first images' posterior means. Its inverse is a suitable `scale_factor`."""
        means = [self.lookup(index, False)[0] for index in range(min(images, self._rows[1]))]
        return float(np.std(means, dtype=np.float64))

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_arrays": None, "_crcs": None}


def cache_latents(
    encode: EncodeFunction,
    dataset: InstanceDataset,
    path: str | Path,
    encoder_fingerprint: str,
    image_size: int,
    batch_size: int | None = None,
    flips: bool = True,
) -> LatentCache:
    """Opens a cache of latents; encodes every image first, flipped and not, if it is missing (31 GB for COCO at 512).

    Args:
        encode: maps uint8 canvases to the posterior's mean and log-variance. It may return before they are ready:
            they are read after the next call. Always called with `batch_size` canvases.
        dataset: the split.
        path: folder of the cache; one in a bucket is copied to this machine, and written there when it is new.
        encoder_fingerprint: identifies the autoencoder and its weights.
        image_size: side of the canvas in pixels.
        batch_size: canvases per call; by default as many pixels as eight 512x512 canvases have, at most 128 canvases.
        flips: False leaves out the flipped images, for data that are never flipped.

    Raises:
        InputError: if the existing cache was made from something else, or the folder cannot be written.
    """
    place, path = path, local_copy(path, optional=True)
    if batch_size is None:
        batch_size = min(max(8 * 512**2 // image_size**2, 1), 128)
    if (path / "latents.json").exists():
        return LatentCache(path, dataset, encoder_fingerprint, image_size, flips)
    with _alone(path):
        # Another run may have made it in the meantime.
        if not (path / "latents.json").exists():
            _encode_all(encode, dataset, path, encoder_fingerprint, image_size, batch_size, flips)
            share_copy(path, place, last="latents.json")
    return LatentCache(path, dataset, encoder_fingerprint, image_size, flips)


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Holds the cache's lock, which no two processes hold at once. A process that dies releases it."""
    lock = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w", encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path}: the cache of latents cannot be written: {error}") from error
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _encode_all(
    encode: EncodeFunction,
    dataset: InstanceDataset,
    path: Path,
    encoder_fingerprint: str,
    image_size: int,
    batch_size: int,
    flips: bool,
) -> None:
    with replace_folder(path) as partial:
        arrays: list[np.ndarray] = []
        crcs = np.zeros((len(NAMES), 1 + flips, len(dataset)), np.uint32)
        jobs = [(index, flip) for index in range(len(dataset)) for flip in (False, True)[: 1 + flips]]
        blocks = [jobs[start : start + batch_size] for start in range(0, len(jobs), batch_size)]
        encoded = _encoded(encode, dataset, blocks, batch_size, image_size)
        for block, encoding in zip(tqdm(blocks, desc="latents", unit="batch"), encoded, strict=True):
            parts = [np.asarray(part) for part in encoding]
            if not arrays:
                shape = (1 + flips, len(dataset), *parts[0].shape[1:])
                arrays = [new_array(partial / f"{name}.npy", np.float32, shape) for name in NAMES]
            for array, part, crc in zip(arrays, parts, crcs, strict=True):
                for k, (index, flip) in enumerate(block):
                    row = np.ascontiguousarray(part[k], np.float32)
                    array[int(flip), index], crc[int(flip), index] = row, zlib.crc32(row.data)
        for array in arrays:
            array.flush()
        write_array(partial / "crc32.npy", crcs, sync=False)
        facts = _facts(dataset, encoder_fingerprint, image_size, flips)
        facts["checksums"] = file_crc(partial / "crc32.npy")
        write_json(partial / "latents.json", signed(facts), sync=False)


def _encoded(
    encode: EncodeFunction, dataset: InstanceDataset, blocks: list[list[tuple[int, bool]]], batch_size: int, size: int
) -> Iterator[tuple[Any, Any]]:
    """Yields each block's encoding while the next block is encoded and the one after that is read."""
    waiting: collections.deque = collections.deque()
    running: collections.deque = collections.deque()

    def call() -> None:
        canvases = [image.result() for image in waiting.popleft()]
        # The last batch is padded, so that a compiled encoder sees one shape.
        canvases += [canvases[-1]] * (batch_size - len(canvases))
        running.append(encode(np.stack(canvases)))

    with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        for block in blocks:
            waiting.append([pool.submit(_canvas, dataset[index], flip, size) for index, flip in block])
            if len(waiting) > 1:
                call()
            if len(running) > 1:
                yield running.popleft()
        while waiting:
            call()
        yield from running


def _canvas(record: Record, flip: bool, size: int) -> UInt8[np.ndarray, "size size 3"]:
    return Crop(record.width, record.height, size, flip).image(open_image(record.image, (record.width, record.height)))


def _facts(dataset: InstanceDataset, encoder_fingerprint: str, image_size: int, flips: bool) -> dict[str, str | int]:
    return {"dataset": dataset.fingerprint, "encoder": encoder_fingerprint, "image_size": image_size, "flips": flips}
