"""COCO instances as a dataset for training.

    python -m instdiff_jax build-coco --coco_dir coco --data_dir datasets/coco

reads a folder as people download it: annotations/instances_NAME.json, annotations/captions_NAME.json and a folder
of images NAME/ (or images/NAME/) for every split NAME, for example train2017. Images and annotations that are broken
are skipped, counted and named in DATA_DIR/report.json.
"""

import itertools
import json
import math
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from instdiff_jax.data.dataset import AnnotatedInstance, Record, check_output, write_dataset
from instdiff_jax.data.images import load_image
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError, short
from instdiff_jax.geometry.masks import decode_mask, encode_mask


def make_instance(
    box: Any, mask: Any, size: tuple[int, int], category: str, where: str, **fields: Any
) -> tuple[AnnotatedInstance, str]:
    """One annotation, checked.

    Args:
        box: x, y, width, height in pixels.
        mask: anything `geometry.decode_mask` reads; None or empty for an instance without a mask.
        size: width and height of the image in pixels.
        category: the category's name.
        where: names the annotation in messages.
        **fields: further fields of `AnnotatedInstance`.

    Returns:
        The instance, and a remark ("" mostly): a mask that covers no pixel is left out.

    Raises:
        InputError: for an annotation that cannot be used.
    """
    width, height = size
    is_box = isinstance(box, Sequence) and len(box) == 4
    if not is_box or not all(isinstance(v, (int, float)) and math.isfinite(v) for v in box):
        raise InputError(f"{where}.bbox: expected [x, y, width, height] in pixels, got {str(box)[:60]}")
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise InputError(f"{where}.bbox: expected a box on the image of {width}x{height} pixels, got {list(box)}")
    counts, remark = b"", ""
    if mask:
        decoded = decode_mask(mask, height, width, f"{where}.segmentation")
        if decoded.any():
            counts = encode_mask(decoded)["counts"].encode("ascii")
        else:
            remark = f"{where}.segmentation: covers no pixel; the instance keeps its box only"
    return AnnotatedInstance(box=(x, y, w, h), category=category, mask=counts, **fields), remark


class CocoSplit:
    """One split of a COCO folder: iterate over its records; what is broken goes to the report."""

    def __init__(
        self,
        name: str,
        instances_file: Path,
        captions_file: Path | None,
        image_dir: Path,
        report: Report,
        instance_captions: Mapping[str, str],
        workers: int,
    ):
        """Reads the annotation files.

        Raises:
            InputError: for files that are not COCO annotations, category ids that do not exist, no images.
        """
        self.name, self.file, self.image_dir = name, instances_file, image_dir
        self.report, self.workers = report, workers
        self.instance_captions = instance_captions
        data = read_json(instances_file)
        self.images = _table(data, "images", instances_file)
        for table, keys in (("images", ("id",)), ("categories", ("id",)), ("annotations", ("image_id", "category_id"))):
            for row, key in itertools.product(_table(data, table, instances_file), keys):
                if isinstance(row.get(key), (list, dict)):
                    raise InputError(f"{instances_file}: {table}: {key}: expected a number, got {short(row[key])}")
        self.categories = {
            row["id"]: row["name"]
            for row in _table(data, "categories", instances_file)
            if isinstance(row.get("name"), str) and "id" in row
        }
        self.annotations: dict[Any, list[dict]] = {row.get("id"): [] for row in self.images}
        for row in _table(data, "annotations", instances_file):
            if row.get("category_id") not in self.categories:
                raise InputError(
                    f"{instances_file}: annotation {row.get('id')}: category_id: expected one of the "
                    f"{len(self.categories)} ids in categories, got {row.get('category_id')!r}"
                )
            if row.get("image_id") in self.annotations:
                self.annotations[row["image_id"]].append(row)
            else:
                report.skip("annotation", name, f"annotation {row.get('id')}", f"no image {row.get('image_id')!r}")
        self.captions: dict[Any, list[str]] = {}
        for row in _table(read_json(captions_file), "annotations", captions_file) if captions_file else []:
            text = row.get("caption")
            if isinstance(text, str) and text.strip() and row.get("image_id") in self.annotations:
                self.captions.setdefault(row["image_id"], []).append(" ".join(text.split()))
            else:
                report.skip("caption", name, f"caption {row.get('id')}", "empty, or of no image")
        if not self.images:
            raise InputError(f"{instances_file}: images: empty, expected at least one")

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Record]:
        seen, kept, broken = set(), 0, ""
        for row, outcome in self._read_images():
            name = str(row.get("file_name"))
            if row.get("id") in seen:
                outcome = f"another image has the id {row.get('id')!r}"
            if isinstance(outcome, str):
                self.report.skip("image", self.name, name, outcome)
                continue
            seen.add(row["id"])
            instances = []
            for annotation in self.annotations[row["id"]]:
                try:
                    instances.append(self._instance(annotation, row))
                except InputError as error:
                    broken = broken or str(error)
                    self.report.skip("annotation", self.name, f"annotation {annotation.get('id')}", str(error))
            kept += len(instances)
            yield Record(
                image=outcome,
                width=row["width"],
                height=row["height"],
                image_id=row["id"],
                file_name=name,
                captions=tuple(self.captions.get(row["id"], ())),
                instances=tuple(instances),
            )
        if broken and not kept:
            raise InputError(f"{self.file}: not one annotation can be used; the first: {broken}")

    def _instance(self, annotation: dict, row: dict) -> AnnotatedInstance:
        name = f"annotation {annotation.get('id')}"
        number = annotation.get("id")
        instance, remark = make_instance(
            annotation.get("bbox"),
            annotation.get("segmentation"),
            (row["width"], row["height"]),
            self.categories[annotation["category_id"]],
            name,
            crowd=bool(annotation.get("iscrowd", 0)),
            category_id=annotation["category_id"],
            annotation_id=number if isinstance(number, int) else -1,
            caption=self.instance_captions.get(str(number), ""),
        )
        if remark:
            self.report.skip("mask", self.name, name, remark)
        return instance

    def _read_images(self) -> Iterator[tuple[dict, bytes | str]]:
        """The files in order, read and decoded by threads ahead: the bytes, or what is wrong with them."""
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque = deque()
            for row in self.images:
                waiting.append((row, pool.submit(self._read_image, row)))
                if len(waiting) > 4 * self.workers:
                    row, future = waiting.popleft()
                    yield row, future.result()
            for row, future in waiting:
                yield row, future.result()

    def _read_image(self, row: dict) -> bytes | str:
        size, number = (row.get("width"), row.get("height")), row.get("id")
        if type(number) is not int or not all(type(side) is int and side > 0 for side in size):
            return "expected whole numbers for id, width and height"
        try:
            data = (self.image_dir / str(row.get("file_name"))).read_bytes()
            image = load_image(data)
        except OSError as error:
            return f"cannot be read: {error.strerror}"
        except ValueError as error:
            return str(error)
        if image.size != size:
            return f"expected {size[0]}x{size[1]} pixels as annotated, got {image.width}x{image.height}"
        return data


def read_json(path: Path) -> Any:
    """Reads a JSON file; InputError names the file where it is missing or not JSON."""
    try:
        with open(path, "rb") as file:
            return json.load(file)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: expected a JSON file: {reason}") from error


def _table(data: Any, field: str, path: Path) -> list[dict]:
    rows = data.get(field) if isinstance(data, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(f"{path}: {field}: expected a list of objects as in COCO's annotation files")
    return rows


def find_splits(coco_dir: Path, wanted: Sequence[str], captions: bool, report: Report) -> dict[str, tuple]:
    """The splits of a COCO folder: name -> (instances file, captions file or None, image folder).

    Args:
        coco_dir: the folder that holds annotations/ and the image folders.
        wanted: names of splits that must be there; empty for all that have images.
        captions: whether every split must have a captions file.
        report: told of splits whose images are not there.

    Raises:
        InputError: where a file or a folder is missing.
    """
    notes = coco_dir / "annotations"
    found = {path.stem.removeprefix("instances_"): path for path in sorted(notes.glob("instances_*.json"))}
    for name in wanted:
        if name not in found:
            raise InputError(f"{notes / f'instances_{name}.json'}: missing; COCO's annotation file of split {name}")
    if not found:
        raise InputError(f"{notes}: expected COCO's annotation files instances_*.json, found none")
    splits = {}
    for name, path in found.items():
        if wanted and name not in wanted:
            continue
        folders = [coco_dir / name, coco_dir / "images" / name]
        folder = next((folder for folder in folders if folder.is_dir()), None)
        if folder is None:
            if wanted:
                raise InputError(f"{folders[0]}: missing; the images of split {name}")
            report.skip("file", name, path.name, f"no folder of images {name}; the split is left out")
            continue
        file = notes / f"captions_{name}.json"
        if captions and not file.exists():
            raise InputError(f"{file}: missing; pass --no_captions to go without captions of whole images")
        splits[name] = (path, file if captions else None, folder)
    if not splits:
        raise InputError(f"{coco_dir}: expected a folder of images for one of {', '.join(found)}, found none")
    return splits


def read_instance_captions(path: Path) -> dict[str, str]:
    """Captions of single instances from a JSON object {annotation id: caption}."""
    data = read_json(path)
    if not isinstance(data, dict) or not all(isinstance(text, str) for text in data.values()):
        raise InputError(f"{path}: expected an object that maps annotation ids to captions")
    return {key: " ".join(text.split()) for key, text in data.items()}


def build(
    coco_dir: Path,
    data_dir: Path,
    splits: Sequence[str] = (),
    captions: bool = True,
    instance_captions: Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
) -> tuple[dict[str, Any], Report]:
    """Builds a training dataset from a COCO folder.

    Args:
        coco_dir: the folder that holds annotations/ and the image folders.
        data_dir: where the dataset goes.
        splits: names of splits; by default all that have images.
        captions: whether every split must have a captions file.
        instance_captions: a JSON file {annotation id: caption}.
        overwrite: replace a dataset that is in `data_dir`.
        workers: threads that decode images; by default one for each CPU.

    Returns:
        What dataset.json holds, and the report of what was skipped.

    Raises:
        InputError: for missing files, files that are not COCO annotations, or a folder that cannot be written.
    """
    report = Report()
    check_output(data_dir, overwrite)
    found = find_splits(coco_dir, splits, captions, report)
    texts = read_instance_captions(instance_captions) if instance_captions else {}
    workers = max(workers or os.cpu_count() or 1, 1)
    opened = {}
    for name, (instances_file, captions_file, folder) in found.items():
        print(f"reading {instances_file}", file=sys.stderr)
        split = CocoSplit(name, instances_file, captions_file, folder, report, texts, workers)
        opened[name] = (len(split), split)
    if texts:
        known = {
            str(row.get("id")) for _, split in opened.values() for rows in split.annotations.values() for row in rows
        }
        for key in texts.keys() - known:
            report.skip("caption", "instance", f"annotation {key}", "no annotation has this id")
    return write_dataset(data_dir, opened, report, "coco", overwrite), report
