"""Writes a dataset; see `dataset` for what it holds."""

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from instdiff_jax.checkpoint.verify import file_crc, signed
from instdiff_jax.data.dataset import FORMAT, RECORDS, VERSION, Record, caption_phrase
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json, remove_leftovers, replace_folder, write_json

Splits = Mapping[str, tuple[int, Iterable[Record]]]


class InstancesBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of images with instances; `splits` maps a name to a function that yields records."""

    VERSION = tfds.core.Version(VERSION)
    name = RECORDS

    def __init__(self, *, splits: Mapping[str, Callable[[], Iterator[Record]]] | None = None, **kwargs: Any):
        self._splits = splits or {}
        super().__init__(**kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features
        return self.dataset_info_from_configs(
            description="Images with boxes, masks, categories and captions of their instances.",
            features=features.FeaturesDict(
                {
                    "image": features.Image(shape=(None, None, 3), doc="the encoded file, unchanged"),
                    "width": np.int64,
                    "height": np.int64,
                    "image_id": np.int64,
                    "file_name": features.Text(),
                    "captions": features.Sequence(features.Text()),
                    "detection": np.bool_,
                    "instances": features.Sequence(
                        {
                            "box": features.Tensor(shape=(4,), dtype=np.float32, doc="x, y, width, height in pixels"),
                            "mask": features.Text(doc="counts of compressed COCO RLE, empty without a mask"),
                            "crowd": np.bool_,
                            "category": features.Text(),
                            "caption": features.Text(),
                            "category_id": np.int64,
                            "annotation_id": np.int64,
                            "phrase": np.int64,
                            "caption_phrase": np.int64,
                        }
                    ),
                }
            ),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {name: self._generate_examples(records) for name, records in self._splits.items()}

    def _generate_examples(self, records: Callable[[], Iterator[Record]]) -> Iterator[tuple[int, dict]]:
        for key, record in enumerate(records()):
            example = {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}
            example["captions"] = list(record.captions)
            example["instances"] = [dataclasses.asdict(instance) for instance in record.instances]
            yield key, example


def check_output(data_dir: Path, overwrite: bool, mark: str = "dataset.json") -> None:
    """Raises InputError unless a dataset may be written to `data_dir`. Call it before any long work.

    `mark` is the file by which a dataset of this kind is known.
    """
    remove_leftovers(data_dir.absolute().parent, data_dir.name)
    if data_dir.is_symlink() or os.path.ismount(data_dir):
        raise InputError(f"{data_dir}: expected a folder that can be replaced, found a link or a mount point")
    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"{data_dir}: expected a folder for the dataset, found a file")
    if data_dir.exists() and any(data_dir.iterdir()) and not _holds_failed_report(data_dir):
        if not (data_dir / mark).exists():
            raise InputError(f"{data_dir}: expected an empty or new folder, found one that holds other files")
        if not overwrite:
            raise InputError(f"{data_dir}: already holds a dataset; pass --overwrite to replace it")
    parent = data_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(data_dir if data_dir.exists() else parent, os.W_OK):
        raise InputError(f"{data_dir}: this folder cannot be written")


def check_split_name(name: str, source: str) -> None:
    """Raises InputError for a split name that TFDS could not read back."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", name) or name.lower() == "all":
        expected = 'a name of letters, digits, "_" and "-", and not "all"'
        raise InputError(f"{source}: split {short(name)}: expected {expected}; rename it")


def _holds_failed_report(data_dir: Path) -> bool:
    """Whether a folder holds only the report of a failed build."""
    if [path.name for path in data_dir.iterdir()] != ["report.json"]:
        return False
    try:
        return read_json(data_dir / "report.json").keys() >= {"counts", "skipped"}
    except (InputError, AttributeError):
        return False


def write_dataset(
    data_dir: str | Path,
    splits: Splits,
    report: Report,
    source: str,
    overwrite: bool = False,
    finish: Callable[[Path, list[str]], None] | None = None,
) -> dict[str, Any]:
    """Writes a dataset, completely or not at all.

    Args:
        data_dir: the dataset's folder; new, empty, or a dataset to overwrite.
        splits: for each split, the expected number of records (for the progress bar) and the records.
        report: what the source skipped, for report.json.
        source: where the records come from, for dataset.json.
        overwrite: replace an existing dataset.
        finish: called with the unfinished folder and the list of phrases, to add files.

    Returns:
        What dataset.json holds.

    Raises:
        InputError: if a split has no records or the folder cannot be written.
    """
    check_output(Path(data_dir), overwrite)
    try:
        return _write_dataset(data_dir, splits, report, source, finish)
    except UnusableSplit as error:
        kept = Path(data_dir) / "report.json"
        if (Path(data_dir) / "dataset.json").exists():  # keep that dataset and its own report
            kept = kept.with_name("report-failed.json")
        write_json(kept, report.values(), sync=False)
        raise InputError(f"{error}; all reasons are in {kept}") from error


class UnusableSplit(InputError):
    """A split has no usable image or instance. The report gives the reasons."""


def _write_dataset(
    data_dir: str | Path,
    splits: Splits,
    report: Report,
    source: str,
    finish: Callable[[Path, list[str]], None] | None,
) -> dict[str, Any]:
    with replace_folder(data_dir) as folder:
        phrases, facts = _write_records(folder, splits, report)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        meta = {
            "format": FORMAT,
            "source": source,
            "fingerprint": digest[:32],
            "splits": facts,
            "phrases": len(phrases),
        }
        write_json(folder / "phrases.json", phrases, indent=None, sync=False)
        write_json(folder / "report.json", report.values(), sync=False)
        meta = signed(meta | {"phrases_crc32": file_crc(folder / "phrases.json")})
        write_json(folder / "dataset.json", meta, sync=False)
        if finish is not None:
            finish(folder, phrases)
    return meta


def _write_records(folder: Path, splits: Splits, report: Report) -> tuple[list[str], dict[str, dict]]:
    """Writes the records. Returns the phrases that they refer to, and each split's facts."""
    phrases: dict[str, int] = {}
    facts: dict[str, dict] = {}
    generators = {
        name: functools.partial(_watched, name, total, records, phrases, facts, report)
        for name, (total, records) in splits.items()
    }
    tfds.disable_progress_bar()
    builder = InstancesBuilder(splits=generators, data_dir=str(folder), file_format="array_record")
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS announces a download that does not happen
        # TFDS would make one in the folder for temporary files, and leave it there where it cannot write.
        builder.download_and_prepare(download_dir=str(folder / "downloads"))
    shutil.rmtree(folder / "downloads", ignore_errors=True)
    return list(phrases), facts


def _watched(
    split: str,
    total: int,
    records: Iterable[Record],
    phrases: dict[str, int],
    facts: dict[str, dict],
    report: Report,
) -> Iterator[Record]:
    """Yields records with numbered phrases. Shows a progress bar, and sets the split's facts at the end."""
    digest, instances, count = hashlib.sha256(), 0, 0
    bar = tqdm(records, total=total, desc=split, unit="image", smoothing=0.05)
    for record in bar:
        numbered = []
        for instance in record.instances:
            phrase = phrases.setdefault(instance.category, len(phrases))
            own = -1
            if instance.caption:
                own = phrases.setdefault(caption_phrase(instance.category, instance.caption), len(phrases))
            numbered.append(dataclasses.replace(instance, phrase=phrase, caption_phrase=own))
        record = dataclasses.replace(record, instances=tuple(numbered))
        digest.update(hashlib.sha256(record.image).digest())
        digest.update(repr(dataclasses.replace(record, image=b"")).encode())
        instances, count = instances + len(numbered), count + 1
        yield record
    bar.total = bar.n  # skipped images are never yielded
    bar.refresh()
    reasons = report.first_reasons(split)
    reasons = f"; the first reasons: {reasons}" if reasons else ""
    if not count:
        raise UnusableSplit(f"split {split}: empty, expected at least one image that can be read{reasons}")
    if not instances:
        raise UnusableSplit(f"split {split}: no instance in {count} images, expected at least one{reasons}")
    facts[split] = {"images": count, "instances": instances, "fingerprint": digest.hexdigest()[:32]}
