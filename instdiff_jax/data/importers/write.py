"""Writes scenes of any format as a COCO folder, which build-coco and evaluate take."""

import contextlib
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pycocotools.mask as coco_mask
from tqdm import tqdm

from instdiff_jax.data.build_coco import make_instance
from instdiff_jax.data.importers import coco_like, labelme, labelstudio, openimages, records, voc, yolo
from instdiff_jax.data.importers.scene import Importer, Item, Options, Scene
from instdiff_jax.data.report import Report
from instdiff_jax.data.write import check_output, check_split_name
from instdiff_jax.errors import InputError
from instdiff_jax.files import replace_folder, write_errors, write_json
from instdiff_jax.geometry.checks import read_text
from instdiff_jax.geometry.masks import RLE
from instdiff_jax.images import open_image
from instdiff_jax.paths import output_path, read_file

IMPORTERS: dict[str, Importer] = {
    "coco": coco_like.read_coco,
    "lvis": coco_like.read_lvis,
    "yolo": yolo.read,
    "voc": voc.read,
    "labelme": labelme.read,
    "labelstudio": labelstudio.read,
    "openimages": openimages.read,
    "webdataset": records.read_tars,
    "imagefolder": records.read_folder,
}


def import_data(
    kind: str, source: Path, coco_dir: Path, options: Options, in_place: bool = False, overwrite: bool = False
) -> tuple[dict[str, tuple[int, int]], Report]:
    """Writes a dataset of another tool as a COCO folder, with report.json beside its annotations.

    Args:
        kind: a key of `IMPORTERS`.
        source: the dataset's folder or file.
        coco_dir: the new folder.
        options: what the dataset's files do not tell.
        in_place: name the images by their absolute paths instead of copying them; build-coco then needs
            --images_outside.
        overwrite: replace a folder that this function has written.

    Returns:
        Images and instances of each split, and the report of what was left out.

    Raises:
        InputError: for a dataset that is not of this kind, or from which nothing can be used.
    """
    if not source.exists():
        raise InputError(f"{source}: missing")
    report = Report()
    scenes = IMPORTERS[kind](source, options, report)
    facts = {"kind": kind, "source": str(source.absolute())}
    return write_scenes(scenes, coco_dir, report, facts, in_place, overwrite), report


def write_scenes(
    scenes: Iterable[tuple[str, Scene]],
    coco_dir: Path,
    report: Report,
    facts: Mapping[str, str],
    in_place: bool = False,
    overwrite: bool = False,
) -> dict[str, tuple[int, int]]:
    """Writes scenes as a COCO folder with report.json, which has `facts` too; see `import_data`.

    Returns:
        Images and instances of each split.
    """
    check_output(coco_dir, overwrite, "report.json")
    with replace_folder(coco_dir) as folder, write_errors(coco_dir):
        writer = _Writer(folder, report, in_place)
        for split, scene in tqdm(scenes, desc=facts["kind"], unit="image", disable=None):
            writer.add(split, scene)
        counts = writer.finish()
        if not any(instances for _, instances in counts.values()):
            reasons = "; ".join(f"{entry['name']}: {entry['reason']}" for entry in report.skipped[:3])
            raise InputError(f"{facts['source']}: not one instance can be used{': ' * bool(reasons)}{reasons}")
        write_json(folder / "report.json", dict(facts) | report.values())
    return counts


class _Split(NamedTuple):
    images: list[dict[str, Any]]
    annotations: list[dict[str, Any]]
    captions: list[dict[str, Any]]


class _Writer:
    """Collects COCO's tables and copies images; ids count over all splits."""

    def __init__(self, folder: Path, report: Report, in_place: bool):
        self.folder, self.report, self.in_place = folder, report, in_place
        self.splits: dict[str, _Split] = defaultdict(lambda: _Split([], [], []))
        self.categories: dict[str, int] = {}
        self.own_captions: dict[str, str] = {}
        self.number = self.image_number = 0

    def add(self, split: str, scene: Scene) -> None:
        """Adds an image with its items; one that cannot be opened goes to the report."""
        if split not in self.splits:
            check_split_name(split, "--split")
        try:
            data = scene.image if isinstance(scene.image, bytes) else read_file(scene.image)
            width, height = open_image(data, scene.size).size
            if scene.size and (width, height) != scene.size:
                size = "x".join(map(str, scene.size))
                raise InputError(f"expected {size} pixels as annotated, got {width}x{height}")
            name = self._place(split, scene, data)
        except ValueError as error:  # an InputError is one too
            return self.report.skip("image", split, scene.name, str(error))
        table, self.image_number = self.splits[split], self.image_number + 1
        table.images.append(dict(id=self.image_number, file_name=name, width=width, height=height))
        for text in scene.captions:
            table.captions.append(dict(id=len(table.captions) + 1, image_id=self.image_number, caption=text))
        with self._skipping("annotations", split, scene.name):
            for item in scene.items(width, height):
                with self._skipping("annotation", split, scene.name):
                    table.annotations.append(self._row(item, width, height, split, scene.name))

    @contextlib.contextmanager
    def _skipping(self, kind: str, split: str, name: str) -> Iterator[None]:
        try:
            yield
        except InputError as error:
            self.report.skip(kind, split, name, str(error))

    def _place(self, split: str, scene: Scene, data: bytes) -> str:
        """Copies an image; its name in the table of images."""
        if self.in_place and isinstance(scene.image, Path):
            (self.folder / split).mkdir(exist_ok=True)
            return str(scene.image.absolute())
        path = output_path(self.folder, split, *PurePosixPath(scene.name).parts)
        if path.exists():
            raise InputError(f"{scene.name}: a second image of this name in split {split}")
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(scene.image, Path):
            shutil.copyfile(scene.image, path)
        else:
            path.write_bytes(data)
        return PurePosixPath(scene.name).as_posix()

    def _row(self, item: Item | InputError, width: int, height: int, split: str, name: str) -> dict[str, Any]:
        """An annotation of COCO's table, checked as build-coco checks it."""
        if isinstance(item, InputError):
            raise item
        category = " ".join(read_text(item.category, f"{item.where}: category").split())
        box = item.box if item.box is not None else mask_box(item.mask, width, height, f"{item.where}.mask")
        instance, remark = make_instance(box, item.mask, (width, height), category, item.where, "mask")
        if remark:
            self.report.skip("mask", split, name, remark)
        self.number += 1
        row = dict(
            id=self.number,
            image_id=self.image_number,
            category_id=self.categories.setdefault(category, len(self.categories) + 1),
            bbox=[round(value, 3) for value in instance.box],
            area=instance.box[2] * instance.box[3],
            iscrowd=int(item.crowd),
        )
        if instance.mask:
            rle = RLE((height, width), instance.mask.decode("ascii"))
            row |= dict(segmentation=rle.to_dict() if remark or item.crowd else item.mask, area=rle.area)
        if item.caption.strip():
            row["caption"] = self.own_captions[str(self.number)] = " ".join(item.caption.split())
        return row

    def finish(self) -> dict[str, tuple[int, int]]:
        """Writes the tables; images and instances of each split."""
        notes = self.folder / "annotations"
        notes.mkdir()
        categories = [dict(id=number, name=name) for name, number in self.categories.items()]
        for name, table in self.splits.items():
            values = dict(images=table.images, categories=categories, annotations=table.annotations)
            write_json(notes / f"instances_{name}.json", values, None)
            if table.captions:
                images = [dict(id=image["id"]) for image in table.images]
                write_json(notes / f"captions_{name}.json", dict(images=images, annotations=table.captions), None)
        if self.own_captions:
            write_json(self.folder / "instance_captions.json", self.own_captions, None)
        return {name: (len(table.images), len(table.annotations)) for name, table in self.splits.items()}


def mask_box(mask: Any, width: int, height: int, where: str) -> tuple[float, ...]:
    """The box x, y, w, h around a mask: polygons by their corners, run lengths by their pixels."""
    if not mask:
        raise InputError(f"{where}: expected a box or a mask")
    rle = RLE.from_coco(mask, height, width, where)
    if isinstance(mask, list):
        xs, ys = ([value for ring in mask for value in ring[start::2]] for start in (0, 1))
        x0, x1, y0, y1 = max(min(xs), 0), min(max(xs), width), max(min(ys), 0), min(max(ys), height)
        return x0, y0, x1 - x0, y1 - y0
    return tuple(map(float, coco_mask.toBbox({"size": list(rle.size), "counts": rle.counts.encode()})))


def read_names(path: Path) -> tuple[str, ...]:
    """Names of categories in the order of their numbers, one a line."""
    names = tuple(line.strip() for line in read_file(path).decode("utf-8-sig", "replace").splitlines() if line.strip())
    if not names:
        raise InputError(f"{path}: expected names, one a line")
    return names
