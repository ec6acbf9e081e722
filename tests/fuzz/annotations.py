"""COCO's annotation files, as `instdiff build-coco` reads them: instances, captions, captions of instances, images."""

import io
import json
import random
from pathlib import Path

import numpy as np
from coco_fixture import uncompressed_rle
from PIL import Image

from instdiff_jax.coco import Coco
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.phrases import read_phrases
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import RLE
from instdiff_jax.images import open_image
from instdiff_jax.layout import Layout
from tests.fuzz.cases import Kind, command
from tests.fuzz.layouts import check_layout
from tests.fuzz.mutate import any_file, json_file

SIZES = {4: (40, 32), 5: (32, 40), 9: (36, 36)}


def coco_values() -> dict:
    """The annotations of three images: polygons, run lengths, packed ones, a crowd, boxes alone."""
    images, annotations = [], []
    for image_id, (width, height) in SIZES.items():
        name = f"{image_id}.png"
        images.append({"id": image_id, "width": width, "height": height, "file_name": name, "license": 1})
        mask = np.zeros((height, width), bool)
        mask[4:20, 6:18] = True
        for category, shape in (
            (1, [[6, 4, 18, 4, 18, 20, 6, 20]]),
            (2, uncompressed_rle(mask)),
            (18, RLE.from_mask(mask).to_dict()),
            (18, []),
        ):
            row = {"id": 10 * image_id + len(annotations) % 4, "image_id": image_id, "category_id": category}
            row |= {"bbox": [6, 4, 12, 16], "iscrowd": int(category == 2), "segmentation": shape, "area": 192.0}
            annotations.append(row)
    categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}, {"id": 18, "name": "traffic light"}]
    return {"info": {"year": 2017}, "images": images, "annotations": annotations, "categories": categories}


def panoptic_values() -> dict:
    """A file of COCO's panoptic task, which a user may take for one of instances."""
    values = coco_values()
    rows = [{"image_id": i, "file_name": f"{i}.png", "segments_info": [{"id": 3, "category_id": 1}]} for i in SIZES]
    return values | {"annotations": rows}


def write_coco(rng: random.Random | None, folder: Path, what: str, panoptic: bool = False) -> None:
    """A COCO folder of one split, train; `what` names the file that is changed."""
    coco = folder / "coco"
    (coco / "annotations").mkdir(parents=True)
    (coco / "train").mkdir()
    for image_id, (width, height) in SIZES.items():
        pixels = np.random.default_rng(image_id).integers(0, 255, (height, width, 3), np.uint8)
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        changed = rng if what == "image" and rng is not None and rng.random() < 0.5 else None
        (coco / "train" / f"{image_id}.png").write_bytes(any_file(changed, buffer.getvalue()))
    captions = [{"id": i, "image_id": i, "caption": f"scene {i}"} for i in SIZES]
    files = {
        "instances": panoptic_values() if panoptic else coco_values(),
        "captions": {"annotations": captions, "images": []},
        "texts": {"40": "a small cat", "41": "a dog", "50": "another cat"},
    }
    places = {"instances": coco / "annotations" / "instances_train.json"}
    places |= {"captions": coco / "annotations" / "captions_train.json", "texts": folder / "texts.json"}
    for name, value in files.items():
        places[name].write_bytes(json_file(rng if name == what else None, value))


def check_dataset(data_dir: Path) -> list:
    """The records of a dataset's only split, after a look at every field."""
    meta = json.loads((data_dir / "dataset.json").read_text())
    (split,) = meta["splits"]
    dataset, phrases = InstanceDataset(data_dir, split), read_phrases(data_dir)
    records = [dataset[i] for i in range(len(dataset))]
    for record in records:
        assert 0 <= record.image_id < 2**63 and record.width > 0 and record.height > 0
        assert open_image(record.image, (record.width, record.height)).size == (record.width, record.height)
        assert all(caption.strip() for caption in record.captions)
        for instance in record.instances:
            x, y, w, h = instance.box
            assert np.isfinite(instance.box).all() and w > 0 and h > 0
            assert x < record.width and y < record.height and x + w > 0 and y + h > 0
            assert phrases[instance.phrase] == instance.category
            assert -1 <= instance.caption_phrase < len(phrases)
            if instance.mask:
                rle = RLE((record.height, record.width), instance.mask.decode())
                assert 0 < rle.decode().sum() == rle.area
    json.loads((data_dir / "report.json").read_text())
    return records


def _build(folder: Path, *flags: object) -> None:
    output = folder / "data"
    output.parent.mkdir(exist_ok=True)
    command(
        "build-coco",
        "--coco_dir",
        folder / "coco",
        "--data_dir",
        output,
        "--workers",
        1,
        *flags,
        output=output,
        writes_early=True,  # the report of a build that fails
    )
    records = check_dataset(output)
    assert len({record.image_id for record in records}) == len(records)
    _check_against_file(folder, records)


def _check_against_file(folder: Path, records: list) -> None:
    """A box, category and crowd of a record are those of the file's annotation with its id."""
    coco = Coco(folder / "coco" / "annotations" / "instances_train.json")
    for record in records:
        rows = {one.number: one for one in coco.annotations(record.image_id)}
        for instance in record.instances:
            if instance.annotation_id >= 0:
                row = rows[instance.annotation_id]
                assert np.allclose(row.box, instance.box, rtol=1e-6)
                assert (row.category, row.is_crowd) == (instance.category, instance.crowd)
        try:
            layout = Layout.from_coco(coco, record.image_id)
        except InputError as error:
            assert "\n" not in str(error)
        else:
            check_layout(layout)


def kinds(folder: Path) -> list[Kind]:
    def kind(what: str, weight: int, *flags: str, **options: bool) -> Kind:
        return Kind(
            f"build-coco, {what}" + " panoptic" * bool(options),
            lambda rng, place: write_coco(rng, place, what, **options),
            lambda place: _build(place, *(place / flag if flag.endswith(".json") else flag for flag in flags)),
            weight,
            refused=bool(options),
        )

    return [
        kind("instances", 6),
        kind("instances", 1, panoptic=True),
        kind("captions", 2),
        kind("texts", 1, "--instance_captions", "texts.json"),
        kind("image", 1),
    ]
