"""Builds a training dataset from the official training JSON.

Each file holds one image: {"image": base64, "caption", "data_id", "is_det", "annos": [{"bbox": [x, y, w, h], "mask":
RLE, "category_name", "caption", "text_embedding_before": base64 float32, "blip_clip_embeddings": base64 float32}]}.
A .txt file lists such files, one per line, like the official --train_file. The embeddings are stored with the dataset,
see `phrases`.
"""

import base64
import binascii
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from instdiff_jax.data.build_coco import make_instance
from instdiff_jax.data.dataset import AnnotatedInstance, Record, caption_phrase
from instdiff_jax.data.phrases import ImportedEmbeddings
from instdiff_jax.data.report import Report
from instdiff_jax.data.write import check_output, check_split_name, write_dataset
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import json_files, read_json
from instdiff_jax.geometry.checks import NORMALISED, are_normalised, plain_integer, read_flag, read_text
from instdiff_jax.images import open_image, orientation_note
from instdiff_jax.paths import read_file


def find_files(inputs: Sequence[Path]) -> list[Path]:
    """The JSON files of folders (recursively), lists (.txt) and single files, in a fixed order.

    Raises:
        InputError: if an input does not exist or there is no file.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            files += json_files(path, inner=True)
        elif path.suffix == ".txt" and path.is_file():
            lines = (line.strip() for line in read_file(path).decode("utf-8-sig", "surrogateescape").splitlines())
            files += [path.parent / line for line in lines if line]
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path}: expected a folder, a .json file or a .txt list, found nothing")
    if not files:
        raise InputError(f"{inputs[0]}: expected official training JSON files, found none")
    return files


def decode_embedding(text: Any, where: str) -> Float[np.ndarray, " width"] | None:
    """An embedding from base64 of float32; None if it is absent or empty.

    Raises:
        InputError: for anything else.
    """
    if text is None or text == "":
        return None
    try:
        row = np.frombuffer(base64.b64decode(text, validate=True), np.float32)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(f"{where}: expected float32 in base64: {error}") from error
    if not len(row) or not np.isfinite(row).all():
        raise InputError(f"{where}: expected finite float32 numbers in base64")
    return row


def read_record(path: Path, number: int, report: Report, split: str, embeddings: ImportedEmbeddings) -> Record:
    """Reads one official file as a record; broken annotations go to the report, embeddings to the table.

    Raises:
        InputError: for a file that cannot be used.
    """
    item = read_json(path)
    if not isinstance(item, dict) or not isinstance(item.get("annos"), list):
        raise InputError(f"{path}: expected an object with image and annos, as the official training JSON")
    try:
        data = base64.b64decode(item.get("image"), validate=True)
        size = _annotated_size(item)
        image = open_image(data, size)
    except (binascii.Error, ValueError, TypeError) as error:
        raise InputError(f"{path}: image: expected an image file in base64: {error}") from error
    if note := orientation_note(data, size):
        report.note("image", split, path.name, note)
    if are_normalised(anno.get("bbox") for anno in item["annos"] if isinstance(anno, dict)):
        report.note("field", split, path.name, f"annos[].bbox: {NORMALISED}")
    instances = []
    for i, anno in enumerate(item["annos"]):
        where = f"annos[{i}]"
        try:
            instance, remarks = _read_instance(anno, image.size, where, embeddings)
        except InputError as error:
            report.skip("annotation", split, f"{path.name} {where}", str(error))
            continue
        for kind, remark in remarks:
            report.skip(kind, split, f"{path.name} {where}", remark)
        instances.append(instance)
    if item["annos"] and not instances:
        raise InputError(f"{path}: not one of its {len(item['annos'])} annotations can be used")
    caption, data_id = _caption(item, report, split, path.name), plain_integer(item.get("data_id"))
    return Record(
        image=data,
        width=image.width,
        height=image.height,
        image_id=number if data_id is None else data_id,
        file_name=_printable(item.get("file_name") or path.name),
        captions=(caption,) if caption else (),
        instances=tuple(instances),
        detection=read_flag(item.get("is_det"), f"{path}: is_det"),
    )


def _annotated_size(item: dict[str, Any]) -> tuple[Any, Any]:
    """Width and height that the annotations are made for, as far as the file says; unchecked."""
    size = (item.get("width"), item.get("height"))
    if size == (None, None):
        masks = [anno.get("mask") for anno in item["annos"] if isinstance(anno, dict)]
        sizes = [mask.get("size") for mask in masks if isinstance(mask, dict)]
        size = next((tuple(one[::-1]) for one in sizes if isinstance(one, list) and len(one) == 2), size)
    return size


def _caption(item: dict[str, Any], report: Report, split: str, name: str) -> str:
    """The image's caption in one line; one that is not text goes to the report."""
    try:
        return " ".join(read_text(item.get("caption") or "", "caption", empty=True).split())
    except InputError as error:
        report.skip("caption", split, name, str(error))
        return ""


def _printable(name: Any) -> str:
    return name if isinstance(name, str) and name.isprintable() else short(name)


def _id(value: Any) -> int:
    number = plain_integer(value)
    return -1 if number is None else number


def _read_instance(
    anno: Any, size: tuple[int, int], where: str, embeddings: ImportedEmbeddings
) -> tuple[AnnotatedInstance, list[tuple[str, str]]]:
    if not isinstance(anno, dict):
        raise InputError(f"{where}: expected an object, got {type(anno).__name__}")
    category = read_text(anno.get("category_name"), f"{where}.category_name", empty=True)
    plain = decode_embedding(anno.get("text_embedding_before"), f"{where}.text_embedding_before")
    own = decode_embedding(anno.get("blip_clip_embeddings"), f"{where}.blip_clip_embeddings")
    for name, row in (("text_embedding_before", plain), ("blip_clip_embeddings", own)):
        if row is not None:
            embeddings.check(row, f"{where}.{name}")
    if plain is not None and own is not None and plain.shape != own.shape:
        raise InputError(f"{where}.blip_clip_embeddings: expected {len(plain)} numbers, got {len(own)}")
    # The official training ignores a caption without an embedding (small instances repeat their category).
    text = anno.get("caption")
    caption = ""
    if own is not None and isinstance(text, str):
        caption = " ".join(read_text(text, f"{where}.caption", empty=True).split())
    instance, remark = make_instance(
        anno.get("bbox"),
        anno.get("mask"),
        size,
        category,
        where,
        "mask",
        crowd=read_flag(anno.get("iscrowd"), f"{where}.iscrowd"),
        caption=caption,
        category_id=_id(anno.get("category_id")),
        annotation_id=_id(anno.get("id")),
    )
    remarks = [("mask", remark)] if remark else []
    for phrase, row in ((category, plain), (caption_phrase(category, caption), own if caption else None)):
        if row is not None and not embeddings.add(phrase, row):
            remarks.append(("embedding", f"{phrase!r} already has another embedding, which is kept"))
    return instance, remarks


def read_records(files: Sequence[Path], report: Report, split: str, embeddings: ImportedEmbeddings) -> Iterator[Record]:
    """The records of official files; files that cannot be used go to the report."""
    for number, path in enumerate(files):
        try:
            yield read_record(path, number, report, split, embeddings)
        except InputError as error:
            report.skip("file", split, path.name, str(error))


def build(
    inputs: Sequence[Path], data_dir: Path, split: str = "train", overwrite: bool = False
) -> tuple[dict[str, Any], Report]:
    """Builds a training dataset of one split from official training JSON.

    Args:
        inputs: folders, .json files or .txt lists.
        data_dir: where the dataset goes.
        split: name of the split.
        overwrite: replace a dataset that is in `data_dir`.

    Returns:
        What dataset.json holds, and the report of what was skipped.

    Raises:
        InputError: for missing inputs, a split without usable files, or a folder that cannot be written.
    """
    report, embeddings = Report(), ImportedEmbeddings()
    check_output(data_dir, overwrite)
    check_split_name(split, "--split")
    files = find_files(inputs)
    splits = {split: (len(files), read_records(files, report, split, embeddings))}
    return write_dataset(data_dir, splits, report, "official_json", overwrite, finish=embeddings.write), report
