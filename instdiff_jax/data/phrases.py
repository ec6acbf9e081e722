"""Phrase embeddings: each phrase of a dataset is embedded once and stored in its folder.

    DATA_DIR/phrases/KEY/embeddings.npy    float32 [phrases, width], row i for phrase i of phrases.json
    DATA_DIR/phrases/imported/             embeddings that came with the data (official training JSON), and their rows

KEY is the text encoder's fingerprint, so a table is never used with another encoder.
"""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Float, Int
from tqdm import tqdm

from instdiff_jax.buckets import as_path
from instdiff_jax.checkpoint.verify import compare_files, file_crc
from instdiff_jax.copies import local_copy, share_copy
from instdiff_jax.data.arrays import DAMAGED, new_array
from instdiff_jax.data.dataset import copy_records, read_meta
from instdiff_jax.errors import InputError
from instdiff_jax.files import read_json, replace_folder, write_array
from instdiff_jax.paths import check_regular

EmbedFunction = Callable[[list[str]], Float[np.ndarray, "n width"]]

_TRAILER = b"CRC32"
_IMPORTED = ("embeddings.npy", "numbers.npy")


class PhraseTable:
    """Rows of an embedding table, memory-mapped; cheap to send to another process.

    Attributes:
        path: the table's file.
        width: length of an embedding.
    """

    def __init__(self, path: Path):
        """Opens embeddings.npy.

        Raises:
            InputError: if it is missing or not such a table.
        """
        self.path = path
        self._rows = None
        self.width: int = self._open().shape[1]

    def lookup(self, numbers: Int[np.ndarray, "*n"]) -> Float[np.ndarray, "*n width"]:
        """The embeddings of phrases by number; zeros where the number is negative."""
        rows = self._open()
        return np.where((numbers >= 0)[..., None], rows[np.maximum(numbers, 0)], np.float32(0))

    def _open(self) -> np.ndarray:
        if self._rows is None:
            check_regular(self.path)
            try:
                self._rows = np.load(self.path, mmap_mode="r", allow_pickle=False)
            except DAMAGED as error:
                raise InputError(f"{self.path}: expected a table of phrase embeddings: {error}") from error
            if self._rows.ndim != 2 or self._rows.dtype != np.float32:
                found = f"{self._rows.dtype} {list(self._rows.shape)}"
                raise InputError(f"{self.path}: expected float32 of shape [phrases, width], got {found}")
        return self._rows

    def __len__(self) -> int:
        return len(self._open())

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_rows": None}


def read_phrases(data_dir: str | Path) -> list[str]:
    """The phrases of a dataset; records refer to them by number.

    Raises:
        InputError: if the file is missing or does not fit the dataset.
    """
    path = Path(data_dir) / "phrases.json"
    phrases, meta = read_json(path), read_meta(data_dir)
    count = meta["phrases"]
    if not isinstance(phrases, list) or len(phrases) != count or not all(isinstance(text, str) for text in phrases):
        raise InputError(f"{path}: expected a list of {count} phrases as dataset.json says")
    if "phrases_crc32" in meta:  # older datasets have none
        compare_files(path.parent, {path.name: meta["phrases_crc32"]})
    return phrases


def phrase_table(
    data_dir: str | Path,
    fingerprint: str,
    embed: EmbedFunction | None = None,
    use_imported: bool = False,
    batch_size: int = 256,
) -> PhraseTable:
    """Opens a text encoder's table. Computes it first if it is missing.

    Several processes may call this at once: each writes its own file, and the last one remains.

    Args:
        data_dir: the dataset's folder.
        fingerprint: identifies the text encoder and its weights.
        embed: maps phrases to pooled text features, one row each; only called if the table is missing.
        use_imported: use the embeddings that came with the data, and embed only the other phrases.
        batch_size: phrases per call of `embed`.

    Raises:
        InputError: if the table is missing and `embed` is None, or the dataset has no imported embeddings.
    """
    key = fingerprint + ("-imported" if use_imported else "")
    place = as_path(data_dir) / "phrases" / key
    path = local_copy(place, optional=True) / "embeddings.npy"
    phrases = read_phrases(copy_records(data_dir))
    if not phrases:
        raise InputError(f"{data_dir}: expected a dataset with instances, found none")
    if path.exists():
        table = PhraseTable(path)
        if len(table) != len(phrases):
            raise InputError(f"{path}: expected {len(phrases)} rows as in phrases.json, got {len(table)}; delete it")
        _compare(path)
        return table
    if embed is None:
        raise InputError(f"{path}: missing; the phrases of this dataset are not embedded for this text encoder yet")
    known = _read_imported(local_copy(place.with_name("imported")), len(phrases)) if use_imported else {}
    with replace_folder(path.parent) as folder:
        _embed_all(folder / path.name, phrases, known, embed, batch_size)
        _add_checksum(folder / path.name)
    share_copy(path.parent, place)
    return PhraseTable(path)


def _add_checksum(path: Path) -> None:
    """Appends a table's CRC-32 to its file, where numpy ignores it. So both always come from the same run."""
    crc = file_crc(path)
    with path.open("ab") as file:
        file.write(_TRAILER + crc.to_bytes(4, "little"))


def _compare(path: Path) -> None:
    """Raises InputError if a table does not match its checksum. Older tables have none."""
    check_regular(path)
    rows = np.load(path, mmap_mode="r", allow_pickle=False)
    size, length = path.stat().st_size, rows.offset + rows.nbytes
    if size == length:
        return
    with path.open("rb") as file:
        file.seek(length)
        trailer = file.read()
    if trailer != _TRAILER + file_crc(path, length).to_bytes(4, "little"):
        raise InputError(f"{path}: damaged: its checksum is not the one of when it was written; delete it")


def _embed_all(
    path: Path,
    phrases: list[str],
    known: dict[int, Float[np.ndarray, " width"]],
    embed: EmbedFunction,
    batch_size: int,
) -> None:
    """Writes the embeddings of all phrases. Those in `known` are not computed."""
    missing = [i for i in range(len(phrases)) if i not in known]
    first = next(iter(known.values())) if known else embed([phrases[missing[0]]])[0]
    rows = new_array(path, np.float32, (len(phrases), len(first)))
    for i, row in known.items():
        rows[i] = row
    for start in tqdm(range(0, len(missing), batch_size), desc="phrases", unit="batch", disable=not missing):
        block = missing[start : start + batch_size]
        new = np.asarray(embed([phrases[i] for i in block]))
        if new.shape != (len(block), rows.shape[1]):
            raise InputError(
                f"{path.name}: expected embeddings of width {rows.shape[1]}, like those that came with the data, "
                f"got {new.shape[-1]}"
            )
        rows[block] = new
    rows.flush()


class ImportedEmbeddings:
    """Collects the embeddings that come with the data. Each phrase keeps its first one."""

    def __init__(self):
        self._rows: dict[str, Float[np.ndarray, " width"]] = {}

    def check(self, row: Float[np.ndarray, " width"], where: str) -> None:
        """Raises InputError if an embedding's width differs from the first one's."""
        width = next((len(first) for first in self._rows.values()), len(row))
        if len(row) != width:
            raise InputError(f"{where}: expected {width} numbers, as in the embeddings before, got {len(row)}")

    def add(self, phrase: str, row: Float[np.ndarray, " width"]) -> bool:
        """Adds a phrase's embedding; False if it differs from its first one by more than half-precision rounding."""
        first = self._rows.setdefault(phrase, row)
        return first.shape == row.shape and float(np.abs(first - row).max()) <= 1e-2 * float(np.abs(first).max())

    def write(self, data_dir: Path, phrases: Sequence[str]) -> None:
        """Writes phrases/imported/ for the phrases in the dataset."""
        held = [(i, self._rows[phrase]) for i, phrase in enumerate(phrases) if phrase in self._rows]
        if not held:
            return
        folder = data_dir / "phrases" / "imported"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_array(folder / "embeddings.npy", np.stack([row for _, row in held]).astype(np.float32), sync=False)
        write_array(folder / "numbers.npy", np.array([i for i, _ in held], np.int64), sync=False)
        for name in _IMPORTED:
            _add_checksum(folder / name)


def _read_imported(folder: Path, count: int) -> dict[int, Float[np.ndarray, " width"]]:
    try:
        for name in _IMPORTED:
            _compare(folder / name)
        rows, numbers = (np.load(folder / name, mmap_mode="r", allow_pickle=False) for name in _IMPORTED)
    except InputError:
        raise
    except DAMAGED as error:
        raise InputError(f"{folder}: expected embeddings that came with the data: {error}") from error
    good = rows.ndim == 2 and rows.dtype == np.float32 and numbers.shape == rows.shape[:1] and numbers.dtype == np.int64
    if not good or len(set(numbers.tolist())) < len(numbers) or not np.isfinite(rows).all():
        raise InputError(f"{folder}: expected finite float32 [n, width], and n different int64 numbers of phrases")
    if len(numbers) and not 0 <= numbers.min() <= numbers.max() < count:
        raise InputError(f"{folder}: expected numbers of phrases from 0 to {count - 1}")
    return {int(number): row for number, row in zip(numbers, rows, strict=True)}
