"""The dataset on disk: images with captioned, located instances, as TFDS array_record files; needs no TensorFlow.

TFDS shuffles the records, in the same order for the same source. A dataset folder holds

    instances/1.0.0/   the records of every split
    dataset.json       the source, and each split's size and fingerprint
    phrases.json       every phrase once; records refer to it by number
    report.json        what was skipped and why
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from instdiff_jax.checkpoint.verify import check_intact
from instdiff_jax.copies import local_copy
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json, recover_folder
from instdiff_jax.paths import check_regular

FORMAT = 1
# The folder and the version of the records.
RECORDS, VERSION = "instances", "1.0.0"


@dataclasses.dataclass(frozen=True)
class AnnotatedInstance:
    """One object in an image.

    `box` is x, y, width, height in pixels of the original image; `mask` holds the counts of compressed COCO RLE at the
    image's size, empty without a mask. `phrase` and `caption_phrase` are the numbers in phrases.json of the category
    name and of the instance's own caption (-1 without one); writing a dataset sets them.
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
    """One image: the encoded file, unchanged, its size in pixels, captions and instances.

    `detection` marks annotations for object detection: a training caption may then begin with the counted category
    names (`is_det` of the official training data).
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
    """The phrase of an instance with its own caption, preceded by the category unless the caption names it.

    As in the official script that generates training data: its embeddings are of such phrases.
    """
    if not category or category.lower() in caption.lower():
        return caption
    return f"{category}. {caption}"


class InstanceDataset:
    """A split of a dataset: `dataset[i]` is a `Record`. Cheap to send to another process.

    Attributes:
        split: the split's full name.
        fingerprint: depends on the split's records, not on its folder.
    """

    def __init__(self, data_dir: str | Path, split: str):
        """Opens a split by its name, with or without the year ("train" for "train2017").

        Records in a bucket are copied to this machine first: array_record reads files only.

        Raises:
            InputError: if there is no dataset or no such split, or if it is damaged.
        """
        self.data_dir = copy_records(data_dir)
        meta = read_meta(self.data_dir)
        names = [name for name in meta["splits"] if name == split] or [
            name for name in meta["splits"] if re.fullmatch(re.escape(split) + r"_?\d+", name)
        ]
        if len(names) != 1:
            have = ", ".join(meta["splits"])
            raise InputError(f"{data_dir}: split {split}: expected one of {have}")
        self.split = names[0]
        if meta["splits"][self.split].get("instances") == 0:
            raise InputError(f"{data_dir}: split {self.split}: no instances, expected at least one to train on")
        self.fingerprint: str = meta["splits"][self.split]["fingerprint"]
        self._length: int = meta["splits"][self.split]["images"]
        self._source = None
        check_regular(self.data_dir / RECORDS)
        try:
            there = len(self._open())
            self._open()[0]  # reading opens the files
            self._source = None  # each process that reads opens its own
        except Exception as error:  # of tfds, of array_record, or the system's
            reason = (str(error).strip().splitlines() or [""])[-1]
            raise InputError(f"{self.data_dir / RECORDS}: damaged or incomplete: {reason}") from error
        if there != self._length:
            raise InputError(f"{data_dir}: split {self.split}: expected {self._length} images, found {there}")

    def __len__(self) -> int:
        return self._length

    def _open(self) -> Sequence[Any]:
        if self._source is None:
            folder = self.data_dir / RECORDS / VERSION
            builder = tfds.builder_from_directory(str(folder))
            self._source = builder.as_data_source(self.split, decoders={"image": tfds.decode.SkipDecoding()})
        return self._source

    def __getitem__(self, index: int) -> Record:
        try:
            row = self._open()[int(index)]
        except (RuntimeError, ValueError) as error:  # array_record's checksums
            reason = (str(error).strip().splitlines() or ["no message"])[0]
            raise InputError(f"{self.data_dir / RECORDS}: record {index} is damaged: {short(reason)}") from error
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


def copy_records(data_dir: str | Path) -> Path:
    """The dataset's folder on this machine; of one in a bucket a copy, without what training has added to it."""
    return local_copy(data_dir, lambda name: not name.startswith(("phrases/", "latents/")))


def read_meta(data_dir: str | Path) -> dict[str, Any]:
    """What dataset.json says: format, source, fingerprint, splits {name: {images, instances, fingerprint}}, phrases.

    Raises:
        InputError: if there is no dataset, or it has another format.
    """
    path = Path(data_dir) / "dataset.json"
    recover_folder(data_dir)
    try:
        meta = read_json(path)
    except InputError as error:
        reason = str(error).removeprefix(f"{path}: ")
        raise InputError(f"{path}: expected a dataset made by instdiff build-coco ({reason})") from error
    found = meta.get("format") if isinstance(meta, dict) else None
    if found != FORMAT:
        raise InputError(f"{path}: format: expected {FORMAT}, got {found!r}; build the dataset again")
    if type(meta.get("phrases")) is not int:
        raise InputError(f"{path}: phrases: expected their number; build the dataset again")
    splits = meta.get("splits")
    if not isinstance(splits, dict) or not all(
        isinstance(facts, dict) and type(facts.get("images")) is int and isinstance(facts.get("fingerprint"), str)
        for facts in splits.values()
    ):
        raise InputError(f"{path}: splits: expected images and fingerprint of every split; build the dataset again")
    check_intact(path, meta)
    return meta
