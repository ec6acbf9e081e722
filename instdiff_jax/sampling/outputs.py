"""The output folder of `instdiff sample`: images and drawings of each layout, a contact sheet, a record of the run.

OUT/x/<seed>.png  OUT/x/layout.png  OUT/x/latents.npy  OUT/contact_sheet.png  OUT/run.json or OUT/run-i-of-n.json
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image, PngImagePlugin

from instdiff_jax.buckets import bucket_errors, check_writable, is_bucket, objects
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import InputError, NotFiniteError, short
from instdiff_jax.files import read_json, remove_leftovers, with_defaults, write_array, write_file, write_json
from instdiff_jax.layout import Layout
from instdiff_jax.locks import lock_folder
from instdiff_jax.paths import output_path, read_file
from instdiff_jax.sampling.metadata import png_text
from instdiff_jax.sampling.shards import Shard
from instdiff_jax.sampling.visualize import contact_sheet, draw_layout, enlarge

if TYPE_CHECKING:
    from instdiff_jax.sampling.results import Result  # imports jax

_OWN_NAMES = re.compile(r"contact_sheet\.png|run(-\d+-of-\d+)?\.json", re.IGNORECASE)
_AT_ONCE = 16  # images
SHEET_LAYOUTS, SHEET_SEEDS = 64, 16  # the most that the contact sheet shows
_MADE_FROM = "instdiff-input"  # key of the text in a PNG that says what it was made from
# What all images of an output folder have in common.
COMMON = ("checkpoint", "fingerprint", "model", "sampling", "format", "width", "height", "strength", "dtype")


@dataclasses.dataclass(frozen=True)
class OutputFolder:
    """Where the images of layouts are written.

    Attributes:
        path: the folder.
        seeds: of each layout's images.
        save_latents: whether latents are written too.
        inputs: fingerprint of the start image, its mask, the noise, LoRAs and embeddings, see `fingerprint_inputs`.
    """

    path: Path
    seeds: list[int]
    save_latents: bool = False
    inputs: str = ""

    def files(self, name: str) -> list[Path]:
        """All that is written for a layout."""
        names = [*(f"{seed}.png" for seed in self.seeds), "layout.png", *["latents.npy"] * self.save_latents]
        return [self.file(name, file) for file in names]

    def file(self, name: str, file: str = "") -> Path:
        """A layout's folder, or a file in it; InputError for a name that may not be written there."""
        if _OWN_NAMES.fullmatch(name):
            raise InputError(f"{self.path}: {name} is a file of the run itself; rename the layout")
        return output_path(self.path, name, *[file] * bool(file))

    def fingerprint(self, layout: Layout) -> str:
        """Of what a layout's images are made from, apart from the settings: contents count, not paths."""
        text = json.dumps([layout.to_dict(), self.inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]

    def finished(self, names: Iterable[str], layouts: Mapping[str, Layout]) -> tuple[set[str], set[str]]:
        """The layouts whose files are all there, and those that have images made from something else."""
        finished, changed, exists = set(), set(), self._exists()
        there = {name: [file for file in self.files(name) if exists(file)] for name in names}
        images = [file for files in there.values() for file in files if file.suffix == ".png"]
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # a bucket takes its time for each
            found = dict(zip(images, pool.map(_read_made_from, images), strict=True))
        for name, files in there.items():
            made_from = {found[file] for file in files if file in found}
            if made_from and made_from != {self.fingerprint(layouts[name])}:
                changed.add(name)
            elif len(files) == len(self.files(name)):
                finished.add(name)
        if self.save_latents:
            seeds = self._seeds_of_latents()
            finished = {name for name in finished if seeds.get(name) == self.seeds}
        return finished, changed

    @contextlib.contextmanager
    def opened(self, names: Iterable[str]) -> Iterator[None]:
        """Checks that layouts can be written before minutes are spent on them; removes the folder if it stays empty.

        Raises:
            InputError: if they cannot, and for a file that cannot be written inside the block.
        """
        if is_bucket(self.path):
            check_writable(self.path)
            yield
            return
        there = os.path.exists(self.path)
        try:
            self._try_writing()
        except OSError as error:
            raise InputError(f"--output: {self.path}: expected a folder to write to ({error.strerror})") from error
        try:
            for path in map(self.file, names):
                if path.exists() and not path.is_dir():
                    raise InputError(f"--output: {path}: expected a folder to write to, found a file")
                remove_leftovers(path)
            remove_leftovers(self.path)
            yield
        except OSError as error:
            raise InputError(f"--output: {error.filename or self.path}: {error.strerror or error}") from error
        finally:
            if not there:
                with contextlib.suppress(OSError):  # there are images
                    self.path.rmdir()

    def _try_writing(self, attempts: int = 100) -> None:
        while True:
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                # An anonymous file: shards on several machines look at once.
                return tempfile.TemporaryFile(dir=self.path).close()
            except FileNotFoundError:  # a shard that had nothing to write has just removed the folder
                attempts -= 1
                if not attempts:
                    raise

    def remove(self, names: Iterable[str]) -> None:
        """Removes what an earlier run wrote for layouts, latents included."""
        exists = self._exists() if is_bucket(self.path) else None
        for name in names:
            for file in filter(exists, (*self.files(name), self.file(name, "latents.npy"))):
                with bucket_errors(file, "cannot be removed"):
                    file.unlink(missing_ok=True)

    def _exists(self) -> Callable[[Path], bool]:
        """Tells which files are there; of a bucket there is one list for all."""
        if not is_bucket(self.path):
            return os.path.exists
        there = {str(self.path / name) for name in objects(self.path)}
        return lambda file: str(file) in there

    def write(self, results: Iterable["Result"], about: Mapping[str, Any]) -> str:
        """Writes one layout's files, each image as it comes; returns the layout's name.

        Args:
            results: the layout's.
            about: the run's record, see `metadata.png_text`.

        Raises:
            NotFiniteError: for latents that are not finite; then none of the layout's images is kept.
        """
        latents: list[np.ndarray] = []
        try:
            for result in results:
                name, made_from = result.layout.name, self.fingerprint(result.layout)
                text = png_text(result, about, self.inputs)
                write_image(self.file(name, f"{result.seed}.png"), result.array, made_from, text)
                latents += [result.latents] if self.save_latents else []
        except NotFiniteError as error:
            self.remove([error.layout])
            raise
        drawing = draw_layout(result.layout, np.full_like(result.array, 255))
        write_image(self.file(name, "layout.png"), drawing, made_from)
        if self.save_latents:
            stacked = np.stack(latents).astype(np.float32)
            write_array(self.file(name, "latents.npy"), stacked, sync=False)
        return name

    def write_contact_sheet(self, layouts: Iterable[Layout]) -> None:
        """Writes layouts beside their first images in a grid."""
        cells = []
        for layout in layouts:
            images = [read_image(self.file(layout.name, f"{seed}.png")) for seed in self.seeds[:SHEET_SEEDS]]
            # On a small canvas captions cannot be read; the images' own files keep their size.
            blank = enlarge(np.full_like(images[0], 255))
            cells += [draw_layout(layout, blank), *map(enlarge, images)]
        write_image(output_path(self.path, "contact_sheet.png"), contact_sheet(cells, columns=1 + len(images)))

    def _seeds_of_latents(self) -> dict[str, list[int]]:
        """The seeds of each layout's latents.npy, from records: the file does not say which they are.

        A run without --save_latents leaves an earlier run's file in place, and did not make it.
        """
        entries = [entry for path in find_records(self.path) for entry in read_record(path)["layouts"]]
        return {entry["layout"]: entry["seeds"] for entry in entries if entry.get("latents") is True}


class RunRecord:
    """The record of a run: all its settings, and each layout that is done."""

    def __init__(self, folder: Path, shard: Shard, values: dict[str, Any]):
        name = "run.json" if shard.count == 1 else f"run-{shard.index}-of-{shard.count}.json"
        self.path = output_path(folder, name)
        self.values = values | {"layouts": []}

    def resume(self, again: Sequence[str]) -> None:
        """Takes over what an earlier run noted of its layouts, except for those that are made again.

        Raises:
            InputError: if images in the folder were made with other settings.
        """
        values = json.loads(json.dumps(self.values))
        for path in find_records(self.path.parent):
            old = read_record(path)
            old = with_defaults(old, {"sampling": SamplingConfig().to_dict(), "model": ModelConfig().to_dict()})
            for name in COMMON:
                if old.get(name) != values[name]:
                    raise InputError(
                        f"{path}: {name}: the images there were made with {short(old.get(name))}, "
                        f"got {short(values[name])}; use another --output, or go without --resume"
                    )
            if path == self.path:
                made_again = set(again)
                self.values["layouts"] = [entry for entry in old["layouts"] if entry["layout"] not in made_again]

    def lock(self) -> contextlib.AbstractContextManager[None]:
        """Keeps out runs of other settings; shards of one run share the folder."""
        common = json.dumps([self.values[name] for name in COMMON], sort_keys=True)
        return lock_folder(self.path.parent, hashlib.sha256(common.encode()).hexdigest())

    def add(self, **entry: Any) -> None:
        """Notes a layout that is done."""
        self.values["layouts"].append(entry)

    def write(self) -> None:
        write_json(self.path, self.values, indent=2, sync=False)


def find_records(folder: Path) -> list[Path]:
    """The run.json of a run and the run-i-of-n.json of shards in a folder."""
    return [path for path in sorted(folder.glob("run*.json")) if re.fullmatch(r"run(-\d+-of-\d+)?\.json", path.name)]


def read_record(path: Path) -> dict[str, Any]:
    """A run's record; InputError for a file that is none."""
    record = read_json(path)
    entries = record.get("layouts") if isinstance(record, dict) else None
    if not isinstance(entries, list) or not all(
        isinstance(entry, dict) and isinstance(entry.get("layout"), str) and isinstance(entry.get("seeds"), list)
        for entry in entries
    ):
        raise InputError(f"{path}: layouts: expected those of a run's record; use another --output, or remove the file")
    return record


def is_record(path: Path) -> bool:
    """Whether a file with such a name is a run's record, and no layout."""
    return b'"fingerprint"' in read_file(path)


def read_image(path: Path) -> UInt8[np.ndarray, "H W 3"]:
    with Image.open(io.BytesIO(read_file(path))) as image:
        return np.asarray(image.convert("RGB"))


def write_image(
    path: Path,
    pixels: UInt8[np.ndarray, "H W 3"],
    made_from: str = "",
    text: PngImagePlugin.PngInfo | None = None,
) -> None:
    """Writes a PNG, whole or not at all, with the fingerprint of what it was made from, and with other text."""
    text = text or PngImagePlugin.PngInfo()
    if made_from:
        text.add_text(_MADE_FROM, made_from)
    write_file(path, lambda file: Image.fromarray(pixels).save(file, format="PNG", pnginfo=text), sync=False)


def _read_made_from(path: Path) -> str | None:
    """What `write_image` noted; None if it did not, or the file is damaged."""
    if not is_bucket(path) and not path.is_file():
        return None
    try:
        with Image.open(io.BytesIO(read_file(path)) if is_bucket(path) else path) as image:
            return image.info.get(_MADE_FROM)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None


def fingerprint_inputs(arrays: Mapping[str, np.ndarray], addons: Mapping[str, Sequence[Mapping[str, Any]]] = {}) -> str:
    """What images are made from beside the layout and the checkpoint: contents count, not the names of files."""
    added = {
        name: [[value for key, value in entry.items() if key != "file"] for entry in entries]
        for name, entries in addons.items()
    }
    return str(fingerprint_arrays(arrays)) + (json.dumps(added) if added else "")


def fingerprint_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
    """A hash of each array's values."""
    prints = {}
    for name, array in arrays.items():
        digest = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
        prints[name] = digest.hexdigest()[:32]
    return prints
