"""Builds a training dataset from a COCO folder.

The folder has COCO's own structure: annotations/instances_NAME.json, annotations/captions_NAME.json and a folder of
images NAME/ (or images/NAME/) for each split NAME, for example train2017. Broken images and annotations are skipped,
counted and listed in DATA_DIR/report.json.
"""

import contextlib
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from instdiff_jax.coco import Coco, CocoAnnotation, CocoImage, SplitFiles, split_files
from instdiff_jax.data.dataset import AnnotatedInstance, Record
from instdiff_jax.data.report import Report
from instdiff_jax.data.write import UnusableSplit, check_output, check_split_name, write_dataset
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json
from instdiff_jax.geometry.checks import read_text, read_xywh
from instdiff_jax.geometry.masks import RLE
from instdiff_jax.images import open_image, orientation_note
from instdiff_jax.paths import read_file


def make_instance(
    box: Any, mask: Any, size: tuple[int, int], category: str, where: str, mask_field: str, **fields: Any
) -> tuple[AnnotatedInstance, str]:
    """Makes a checked instance of one annotation.

    Args:
        box: x, y, width, height in pixels.
        mask: any of COCO's formats; None or empty for an instance without a mask.
        size: width and height of the image in pixels.
        category: the category's name.
        where: names the annotation in messages.
        mask_field: the mask's name in the file.
        **fields: further fields of `AnnotatedInstance`.

    Returns:
        The instance, and a remark if its mask, or a part of it, cannot be used and is left out, else "".

    Raises:
        InputError: for an annotation that cannot be used.
    """
    width, height = size
    x, y, w, h = read_xywh(box, f"{where}.bbox")
    if w == 0 or h == 0 or x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise InputError(f"{where}.bbox: expected a box on the image of {width}x{height} pixels, got {short(box)}")
    counts, remark = _usable_mask(mask, width, height, f"{where}.{mask_field}") if mask else (b"", "")
    return AnnotatedInstance(box=(x, y, w, h), category=category, mask=counts, **fields), remark


def _usable_mask(mask: Any, width: int, height: int, where: str) -> tuple[bytes, str]:
    """The counts of the mask or of its good polygons, and a remark on what is left out."""
    try:
        rle, remark = RLE.from_coco(mask, height, width, where), ""
    except InputError as error:
        good = []
        for ring in mask if isinstance(mask, list) else ():
            with contextlib.suppress(InputError):
                RLE.from_coco([ring], height, width, where)
                good.append(ring)
        if not good:
            return b"", f"{error}; the instance keeps its box only"
        rle = RLE.from_coco(good, height, width, where)
        remark = f"{error}; the other {len(good)} of {len(mask)} polygons are used"
    if not rle.area:
        return b"", f"{where}: has no pixel; the instance keeps its box only"
    return rle.counts.encode("ascii"), remark


class CocoSplit:
    """The records of one split of a COCO folder; what is broken goes to the report.

    Attributes:
        annotations: image id to annotations.
    """

    def __init__(
        self,
        name: str,
        files: SplitFiles,
        captions: bool,
        report: Report,
        own_captions: Mapping[str, str],
        workers: int,
    ):
        """Reads the annotation files.

        Args:
            name: of the split.
            files: where it is.
            captions: whether to read the captions file.
            report: told of what is left out.
            own_captions: annotation id to the caption of that instance.
            workers: threads that decode images.

        Raises:
            InputError: for files that are not COCO annotations, no images, or an id used twice.
        """
        self.name, self.files, self.report = name, files, report
        self.own_captions, self.workers = own_captions, workers
        self.coco = Coco(files.instances, files.captions if captions else None)
        if not self.coco.image_ids:
            raise InputError(f"{files.instances}: images: empty, expected at least one")
        self.annotations = {image_id: self.coco.annotations(image_id) for image_id in self.coco.image_ids}
        for item in self.coco.unused:
            report.skip(item.kind, name, item.name, item.reason)
        for note in self.coco.notes:
            report.note("field", name, files.instances.name, note)

    def __len__(self) -> int:
        return len(self.annotations)

    def __iter__(self) -> Iterator[Record]:
        kept, broken = 0, ""
        for image_id, outcome in self._read_images():
            name = self.coco.file_name(image_id)
            if isinstance(outcome, str):
                self.report.skip("image", self.name, name, outcome)
                continue
            image, data = outcome
            if note := orientation_note(data, (image.width, image.height)):
                self.report.note("image", self.name, name, note)
            instances = []
            for annotation in self.annotations[image_id]:
                try:
                    instances.append(self._instance(annotation, image))
                except InputError as error:
                    broken = broken or str(error)
                    self._skip("annotation", annotation, str(error))
            kept += len(instances)
            captions = tuple(self.coco.captions.get(image_id, ()))
            yield Record(data, image.width, image.height, image_id, name, captions, tuple(instances))
        if broken and not kept:
            raise UnusableSplit(f"{self.coco.path}: not one annotation can be used; the first: {self._short(broken)}")

    def _instance(self, annotation: CocoAnnotation, image: CocoImage) -> AnnotatedInstance:
        instance, remark = make_instance(
            annotation.values.get("bbox"),
            annotation.values.get("segmentation"),
            (image.width, image.height),
            annotation.category,
            annotation.where,
            "segmentation",
            crowd=annotation.is_crowd,
            category_id=annotation.category_id,
            annotation_id=annotation.number,
            caption=self.own_captions.get(str(annotation.number), ""),
        )
        if remark:
            self._skip("mask", annotation, remark)
        return instance

    def _skip(self, kind: str, annotation: CocoAnnotation, reason: str) -> None:
        self.report.skip(kind, self.name, f"annotation {short(annotation.values.get('id'))}", self._short(reason))

    def _short(self, reason: str) -> str:
        return reason.removeprefix(f"{self.coco.path}: ")

    def _read_images(self) -> Iterator[tuple[int, tuple[CocoImage, bytes] | str]]:
        """The images in order, read and decoded ahead by threads; a text is the error of a broken image."""
        with ThreadPoolExecutor(self.workers) as pool:
            waiting: deque = deque()
            for image_id in self.coco.image_ids:
                waiting.append((image_id, pool.submit(self._read_image, image_id)))
                if len(waiting) > 4 * self.workers:
                    first, future = waiting.popleft()
                    yield first, future.result()
            for image_id, future in waiting:
                yield image_id, future.result()

    def _read_image(self, image_id: int) -> tuple[CocoImage, bytes] | str:
        try:
            image = self.coco.image(image_id)
            if image.file_name is None:
                return "expected a file_name"
            data = read_file(self.files.image(image.file_name, "file_name"))
            pixels = open_image(data, (image.width, image.height))
        except ValueError as error:  # an InputError is one too
            return self._short(str(error))
        if pixels.size != (image.width, image.height):
            size = f"{image.width}x{image.height}"
            return f"expected {size} pixels as annotated, got {pixels.width}x{pixels.height}"
        return image, data


def find_splits(
    coco_dir: Path, wanted: Sequence[str], captions: bool, report: Report, outside: bool = False
) -> dict[str, SplitFiles]:
    """The splits of a COCO folder by name.

    Args:
        coco_dir: the folder that holds annotations/ and the image folders.
        wanted: names of splits that must be there; empty for all that have images.
        captions: whether every split must have a captions file.
        report: told of splits that have no images.
        outside: whether a `file_name` may lead out of its folder.

    Raises:
        InputError: for a missing file or folder.
    """
    notes = coco_dir / "annotations"
    found = [path.stem.removeprefix("instances_") for path in sorted(notes.glob("instances_*.json"))]
    for path in sorted(notes.glob("*")):
        if (
            path.name.lower().startswith("instances_")
            and path.suffix.lower() == ".json"
            and path.stem[10:] not in found
        ):
            report.skip("file", path.stem[10:], path.name, "expected a name like instances_NAME.json, in lower case")
    for name in wanted:
        if name not in found:
            raise InputError(f"{notes / f'instances_{name}.json'}: missing; COCO's annotation file of split {name}")
    if not found:
        raise InputError(f"{notes}: expected COCO's annotation files instances_*.json, found none")
    splits = {}
    for name in [name for name in found if name in wanted or not wanted]:
        files = split_files(coco_dir, name, outside)
        if not files.images.is_dir():
            if wanted:
                raise InputError(f"{files.images}: missing; the images of split {name}")
            report.skip("file", name, files.instances.name, f"no folder of images {name}; the split is left out")
            continue
        check_split_name(name, str(files.instances))
        if captions and not files.captions.exists():
            raise InputError(f"{files.captions}: missing; pass --no_captions to go without captions of whole images")
        splits[name] = files
    if not splits:
        raise InputError(f"{coco_dir}: expected a folder of images for one of {', '.join(found)}, found none")
    return splits


def read_instance_captions(path: Path, report: Report) -> dict[str, str]:
    """Captions of single instances from a JSON object {annotation id: caption}; the report is told of broken ones."""
    data, captions = read_json(path), {}
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected an object that maps annotation ids to captions")
    for key, text in data.items():
        try:
            captions[key] = " ".join(read_text(text, f"{path.name}: {short(key)}", empty=True).split())
        except InputError as error:
            report.skip("caption", "instance", f"annotation {short(key)}", str(error))
    return captions


def build(
    coco_dir: Path,
    data_dir: Path,
    splits: Sequence[str] = (),
    captions: bool = True,
    instance_captions: Path | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    outside: bool = False,
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
        outside: images may be anywhere: a `file_name` may be absolute or lead out of its folder.

    Returns:
        What dataset.json holds, and the report of what was skipped.

    Raises:
        InputError: for missing files, files that are not COCO annotations, or a folder that cannot be written.
    """
    report = Report()
    check_output(data_dir, overwrite)
    found = find_splits(coco_dir, splits, captions, report, outside)
    texts = read_instance_captions(instance_captions, report) if instance_captions else {}
    workers = max(workers or os.cpu_count() or 1, 1)
    opened = {}
    for name, files in found.items():
        print(f"reading {files.instances}", file=sys.stderr)
        split = CocoSplit(name, files, captions, report, texts, workers)
        opened[name] = (len(split), split)
    if texts:
        rows = (one for _, split in opened.values() for listed in split.annotations.values() for one in listed)
        known = {str(one.number) for one in rows}
        for key in sorted(texts.keys() - known):
            report.skip("caption", "instance", f"annotation {short(key)}", "no annotation has this id")
    return write_dataset(data_dir, opened, report, "coco", overwrite), report
