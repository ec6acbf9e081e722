"""What `instdiff import-data` reads, datasets of other tools, and what `instdiff benchmark` does."""

import functools
import json
import random
import tempfile
from pathlib import Path

import yaml
from importer_cases import MAKERS, NAMES

from instdiff_jax.coco import Coco
from instdiff_jax.data.importers.scene import Options
from instdiff_jax.data.importers.write import import_data
from instdiff_jax.evaluation.benchmarks.run import BENCHMARKS, read_cases
from instdiff_jax.layout import MAX_INSTANCES, Layout
from tests.fuzz.cases import Kind
from tests.fuzz.mutate import any_file, json_file

_BOXES = [[0.1, 0.1, 0.5, 0.9], [0.5, 0, 1, 1]]
_REGIONS = {"bbox_list": "[[0, 0, 50, 50]]", "region_captions": "['a cat']", "detail_region_captions": "['a red cat']"}
_ANNOTATION = {
    "global_prompt": "two",
    "annotations": {
        f"cat_{i}": {"bbox": [0, 0, 500, 500 + i], "category": "cat", "local_prompt": "x"} for i in range(2)
    },
    "relations": {"(cat_0, cat_1)": "near"},
    "valid_overlap": [{"overlap_box": [0, 1]}],
}
FILES = {
    "coco-mig": {"6": {"caption": "two", "segment": [{"label": "a red cat", "bbox": box} for box in _BOXES]}},
    "coco-position": {"0": {"caption": "two", "segment": [{"label": "a cat", "bbox": box} for box in _BOXES]}},
    "coco-colour": {
        "images": [{"id": 1, "width": 90, "height": 60, "file_name": "1.jpg"}],
        "annotations": [
            {"id": 4, "image_id": 1, "category_id": 2, "bbox": [9, 9, 30, 30], "point": [20, 20]}
            | {"segmentation": [[9, 9, 30, 9, 30, 30]], "iscrowd": 0}
        ],
        "categories": [{"id": 2, "name": "cat"}],
    },
    "lvis-box": {
        "images": [
            {"id": 1, "width": 90, "height": 60, "coco_url": "http://x/val2017/1.jpg"}
            | {"neg_category_ids": [3], "not_exhaustive_category_ids": [2]}
        ],
        "annotations": [{"id": 4, "image_id": 1, "category_id": 2, "bbox": [9, 9, 30, 30], "segmentation": []}],
        "categories": [{"id": k, "name": f"big_cat_{k}", "frequency": "r"} for k in (2, 3)],
    },
    "layoutsam": [{"file_name": "1.jpg", "width": 90, "height": 90, "global_caption": "one"} | _REGIONS],
    "overlaybench": [{"image_id": 3, "annotation": _ANNOTATION}],
}


def _write_dataset(kind: str, rng: random.Random | None, folder: Path) -> None:
    MAKERS[kind](folder / "source")
    files = sorted(path for path in (folder / "source").rglob("*") if path.is_file())
    if rng is None:
        return
    notes = [path for path in files if path.suffix != ".png"]
    path = rng.choice(notes if rng.random() < 0.8 else files)
    if path.suffix == ".json" and rng.random() < 0.8:
        path.write_bytes(json_file(rng, json.loads(path.read_text())))
    else:
        path.write_bytes(any_file(rng, path.read_bytes()))


def _read_dataset(kind: str, folder: Path) -> None:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        counts, report = import_data(kind, folder / "source", Path(out) / "coco", Options(names=NAMES))
        assert any(instances for _, instances in counts.values())
        for name, (images, instances) in counts.items():
            coco = Coco(Path(out) / "coco" / "annotations" / f"instances_{name}.json")
            rows = [one for image_id in coco.image_ids for one in coco.annotations(image_id)]
            assert len(coco.image_ids) == images and len(rows) == instances and not coco.unused
            assert all(one.category.strip() and min(one.box[2:]) > 0 for one in rows)
            assert all((Path(out) / "coco" / name / coco.image(i).file_name).is_file() for i in coco.image_ids)
        assert all(entry["reason"] and "\n" not in entry["reason"] for entry in report.skipped)


def _write_benchmark(name: str, rng: random.Random | None, folder: Path) -> None:
    if name == "coco-mig" and rng is not None and rng.random() < 0.5:
        values = {"two": {"a red cat": _BOXES, "coco_id": "6"}}
        (folder / "data.yaml").write_bytes(any_file(rng, yaml.safe_dump(values).encode()))
    else:
        (folder / "data.json").write_bytes(json_file(rng, FILES[name]))


def _read_benchmark(name: str, folder: Path) -> None:
    (path,) = folder.glob("data.*")
    benchmark = BENCHMARKS[name]
    for case in read_cases(benchmark, path):
        if len(case.things) <= MAX_INSTANCES:
            assert isinstance(benchmark.layout(case, 128), Layout)


def kinds(folder: Path) -> list[Kind]:
    readers = [(f"import {kind}", _write_dataset, _read_dataset, kind) for kind in MAKERS]
    readers += [(f"benchmark {name}", _write_benchmark, _read_benchmark, name) for name in FILES]
    return [
        Kind(name, functools.partial(write, arg), functools.partial(read, arg)) for name, write, read, arg in readers
    ]
