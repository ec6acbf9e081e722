"""The dataset on disk: images with instances, written and read by TFDS as array_record, without TensorFlow.

Records lie in an order shuffled by TFDS, always the same for the same source.

A dataset folder holds
    instances/1.0.0/   the records of every split
    dataset.json       what made it, the size and fingerprint of each split; written last
    phrases.json       every phrase once; records refer to it by number
    report.json        what was skipped, and why
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError

FORMAT = 1
_VERSION = "1.0.0"


@dataclasses.dataclass(frozen=True)
class AnnotatedInstance:
    """One object in an image.

    `box` is x, y, width, height in pixels of the original image; `mask` is the counts of compressed COCO RLE at
    the image's size, empty where there is none. `phrase` and `caption_phrase` number the category name and the
    instance's own caption in phrases.json; -1 stands for no caption. Writing a dataset fills them in.
    """

    box: tuple[float, float, float, float]
    category: str
    mask: bytes = b""
    crowd: bool = False
    caption: str = ""
    category_id: int = -1
    annotation_id: int = -1
    phrase: int = -1
    caption_phrase: int = -1


@dataclasses.dataclass(frozen=True)
class Record:
    """One image: the encoded file as it was, its size in pixels, captions and instances.

    `detection` says that the annotations come from object detection, so that a training caption may begin with the
    counted category names (`is_det` of the official training data).
    """

    image: bytes
    width: int
    height: int
    image_id: int
    file_name: str
    captions: tuple[str, ...]
    instances: tuple[AnnotatedInstance, ...]
    detection: bool = True


def caption_phrase(category: str, caption: str) -> str:
    """The phrase of an instance with its own caption: the category stands in front unless the caption names it.

    So did the official training data (its generation script), and the released embeddings are of such phrases.
    """
    if not category or category.lower() in caption.lower():
        return caption
    return f"{category}. {caption}"


class InstancesBuilder(tfds.core.GeneratorBasedBuilder):
    """TFDS builder of images with instances; `splits` maps a name to a function that yields records."""

    VERSION = tfds.core.Version(_VERSION)
    name = "instances"

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


def check_output(data_dir: Path, overwrite: bool) -> None:
    """Raises InputError unless a dataset may be written to `data_dir`; cheap, to be called before any work."""
    if data_dir.is_symlink() or os.path.ismount(data_dir):
        raise InputError(f"{data_dir}: expected a folder that can be replaced, found a link or a mount point")
    if data_dir.exists() and not data_dir.is_dir():
        raise InputError(f"{data_dir}: expected a folder for the dataset, found a file")
    if data_dir.exists() and any(data_dir.iterdir()):
        if not (data_dir / "dataset.json").exists():
            raise InputError(f"{data_dir}: expected an empty or new folder, found one that holds other files")
        if not overwrite:
            raise InputError(f"{data_dir}: already holds a dataset; pass --overwrite to replace it")
    parent = data_dir.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(data_dir if data_dir.exists() else parent, os.W_OK):
        raise InputError(f"{data_dir}: this folder cannot be written")


def write_dataset(
    data_dir: str | Path,
    splits: Mapping[str, tuple[int, Iterable[Record]]],
    report: Report,
    source: str,
    overwrite: bool = False,
    finish: Callable[[Path, list[str]], None] | None = None,
) -> dict[str, Any]:
    """Writes a dataset beside `data_dir` and moves it into place when it is complete.

    Args:
        data_dir: the dataset's folder; new, empty, or a dataset to overwrite.
        splits: for each split, how many records to expect (for the progress bar) and the records.
        report: what the source skipped; written to report.json.
        source: where the records come from, noted in dataset.json.
        overwrite: replace a dataset that is there.
        finish: called with the unfinished folder and the list of phrases, to add files.

    Returns:
        What dataset.json holds.

    Raises:
        InputError: for a split without records, or a folder that cannot be written.
    """
    data_dir = Path(data_dir)
    check_output(data_dir, overwrite)
    partial = data_dir.absolute().with_name(data_dir.absolute().name + ".partial")
    old = partial.with_name(f".{partial.stem}.{os.getpid()}.old")  # of a name that no user's folder has
    phrases: dict[str, int] = {}
    facts: dict[str, dict] = {}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        generators = {
            name: lambda name=name, total=total, records=records: _watched(name, total, records, phrases, facts)
            for name, (total, records) in splits.items()
        }
        tfds.disable_progress_bar()
        builder = InstancesBuilder(splits=generators, data_dir=str(partial), file_format="array_record")
        with contextlib.redirect_stdout(io.StringIO()):  # it announces a download that does not take place
            builder.download_and_prepare()
        shutil.rmtree(partial / "downloads", ignore_errors=True)
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
        meta = {
            "format": FORMAT,
            "source": source,
            "fingerprint": digest[:32],
            "splits": facts,
            "phrases": len(phrases),
        }
        (partial / "phrases.json").write_text(json.dumps(list(phrases), ensure_ascii=False))
        (partial / "report.json").write_text(
            json.dumps({"counts": report.counts(), "skipped": report.skipped}, indent=1, ensure_ascii=False)
        )
        if finish is not None:
            finish(partial, list(phrases))
        (partial / "dataset.json").write_text(json.dumps(meta, indent=1))
        if data_dir.exists():
            data_dir.rename(old)
        partial.rename(data_dir)
    except OSError as error:
        raise InputError(f"{data_dir}: the dataset cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if data_dir.exists():
            shutil.rmtree(old, ignore_errors=True)
        elif old.exists():
            old.rename(data_dir)
    return meta


def _watched(
    split: str, total: int, records: Iterable[Record], phrases: dict[str, int], facts: dict[str, dict]
) -> Iterator[Record]:
    """Passes records on, with a progress bar, their phrases numbered, and counted into the split's fingerprint."""
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
    bar.total = bar.n  # what was skipped never comes
    bar.refresh()
    if not count:
        raise InputError(f"split {split}: empty, expected at least one image that can be read")
    facts[split] = {"images": count, "instances": instances, "fingerprint": digest.hexdigest()[:32]}


class InstanceDataset:
    """A split of a dataset, by index: `dataset[i]` is a `Record`. Cheap to send to another process.

    Attributes:
        split: the split's full name.
        fingerprint: changes with any record of the split, not with the folder it lies in.
    """

    def __init__(self, data_dir: str | Path, split: str):
        """Opens a split by its name, or by its name without the year ("train" for "train2017").

        Raises:
            InputError: where there is no dataset, or no such split.
        """
        self.data_dir = Path(data_dir)
        meta = read_meta(self.data_dir)
        names = [name for name in meta["splits"] if name == split] or [
            name for name in meta["splits"] if re.fullmatch(re.escape(split) + r"_?\d+", name)
        ]
        if len(names) != 1:
            have = ", ".join(meta["splits"])
            raise InputError(f"{data_dir}: split {split}: expected one of {have}")
        self.split = names[0]
        self.fingerprint: str = meta["splits"][self.split]["fingerprint"]
        self._length: int = meta["splits"][self.split]["images"]
        self._source = None
        try:
            there = len(self._open())
            self._open()[0]  # files are opened when they are read
            self._source = None  # each process that reads opens its own
        except Exception as error:  # of tfds, of array_record, or the system's
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise InputError(f"{self.data_dir / InstancesBuilder.name}: damaged or incomplete: {reason}") from error
        if there != self._length:
            raise InputError(f"{data_dir}: split {self.split}: expected {self._length} images, found {there}")

    def __len__(self) -> int:
        return self._length

    def _open(self) -> Sequence[Any]:
        if self._source is None:
            folder = self.data_dir / InstancesBuilder.name / _VERSION
            builder = tfds.builder_from_directory(str(folder))
            self._source = builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})
        return self._source

    def __getitem__(self, index: int) -> Record:
        row = self._open()[int(index)]
        columns = row["instances"]
        instances = tuple(
            AnnotatedInstance(
                box=tuple(float(value) for value in columns["box"][i]),
                category=columns["category"][i].decode("utf-8"),
                mask=columns["mask"][i],
                crowd=bool(columns["crowd"][i]),
                caption=columns["caption"][i].decode("utf-8"),
                category_id=int(columns["category_id"][i]),
                annotation_id=int(columns["annotation_id"][i]),
                phrase=int(columns["phrase"][i]),
                caption_phrase=int(columns["caption_phrase"][i]),
            )
            for i in range(len(columns["box"]))
        )
        return Record(
            image=row["image"],
            width=int(row["width"]),
            height=int(row["height"]),
            image_id=int(row["image_id"]),
            file_name=row["file_name"].decode("utf-8"),
            captions=tuple(caption.decode("utf-8") for caption in row["captions"]),
            instances=instances,
            detection=bool(row["detection"]),
        )

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_source": None}

    def __repr__(self) -> str:
        return f"InstanceDataset({str(self.data_dir)!r}, {self.split!r})"


def read_meta(data_dir: str | Path) -> dict[str, Any]:
    """What dataset.json says: format, source, fingerprint, splits {name: {images, instances, fingerprint}}, phrases.

    Raises:
        InputError: where there is no dataset, or one of another format.
    """
    path = Path(data_dir) / "dataset.json"
    try:
        meta = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"{path}: expected a dataset made by python -m instdiff_jax build-coco ({type(error).__name__})"
        ) from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: format: expected {FORMAT}, got {found!r}; build the dataset again")
    splits = meta.get("splits")
    if not isinstance(splits, dict) or not all(
        isinstance(facts, dict) and type(facts.get("images")) is int and isinstance(facts.get("fingerprint"), str)
        for facts in splits.values()
    ):
        raise InputError(f"{path}: splits: expected images and fingerprint of every split; build the dataset again")
    return meta
