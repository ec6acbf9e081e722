"""COCO itself, and LVIS, whose files name images by their address (https://www.lvisdataset.org/dataset)."""

from collections.abc import Iterator
from pathlib import Path

from instdiff_jax.coco import Coco, CocoAnnotation, split_files
from instdiff_jax.data.importers.scene import Item, Options, Scene, attempt
from instdiff_jax.data.report import Report
from instdiff_jax.errors import InputError
from instdiff_jax.files import json_files
from instdiff_jax.paths import inside


def read_coco(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads a COCO folder, or one file with `--images`; exporters' _annotations.coco.json beside the images too."""
    found = (
        [folder]
        if folder.is_file()
        else json_files(folder / "annotations")
        if (folder / "annotations").is_dir()
        else []
    )
    for path in [path for path in found if not path.stem.startswith(("captions_", "person_keypoints_"))]:
        split = options.split if folder.is_file() else path.stem.removeprefix("instances_")
        files = split_files(path.parent.parent, split)
        images = options.images or (files.images if files.images.is_dir() else path.parent)
        yield from _scenes(path, split, images, report, files.captions if files.captions.is_file() else None)
    for path in [] if found else sorted(folder.glob("**/_annotations.coco.json")):
        split = path.parent.name if path.parent != folder else options.split
        yield from _scenes(path, split, path.parent, report)
    if not found and not any(folder.glob("**/_annotations.coco.json")):
        raise InputError(f"{folder}: expected annotations/*.json or _annotations.coco.json, found none")


def read_lvis(folder: Path, options: Options, report: Report) -> Iterator[tuple[str, Scene]]:
    """Reads lvis_*.json of a folder, or one file; images are COCO's: `--images` holds train2017/ and val2017/."""
    for path in [folder] if folder.is_file() else sorted(folder.glob("lvis_*.json")):
        split = next((name for name in ("train", "minival", "val") if name in path.stem), options.split)
        yield from _scenes(path, split, options.images or path.parent, report)


def _scenes(
    path: Path, split: str, images: Path, report: Report, captions: Path | None = None
) -> Iterator[tuple[str, Scene]]:
    coco = Coco(path, captions)
    for item in coco.unused:
        report.skip(item.kind, split, item.name, item.reason)
    for image_id in coco.image_ids:
        try:
            image = coco.image(image_id)
            if not image.file_name:
                raise InputError(f"{path}: image {image_id}: expected a file_name or a coco_url")
            name = image.file_name
            file = inside(images, name, f"{path}: image {image_id}")
        except InputError as error:
            report.skip("image", split, f"image {image_id}", str(error))
            continue

        def items(width: int, height: int, image_id: int = image_id) -> list:
            return [attempt(_item, one) for one in coco.annotations(image_id)]

        yield split, Scene(file, name, (image.width, image.height), items, tuple(coco.captions.get(image_id, ())))


def _item(one: CocoAnnotation) -> Item:
    # LVIS writes puffer_(fish); its own categories have no other use for the sign.
    category, values = one.category.replace("_", " "), one.values
    return Item(one.where, category, values.get("bbox"), values.get("segmentation"), one.own_caption, one.is_crowd)
