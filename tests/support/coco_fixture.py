"""A small COCO folder made on the spot: real JPEG files; polygons, run lengths, a crowd, broken things, captions."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from instdiff_jax.cli import build_coco

CATEGORIES = {1: "circle", 2: "square", 18: "dog"}
COLOURS = {1: (220, 40, 40), 2: (40, 90, 220), 18: (60, 180, 60)}


def uncompressed_rle(mask: np.ndarray) -> dict[str, Any]:
    """Run lengths down the columns, zeros first, as COCO's crowd annotations hold them."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(int), [1 - int(mask[-1, -1])]])
    edges = np.flatnonzero(np.diff(flat))
    runs = np.diff(np.concatenate([[0], edges]))
    assert runs.sum() == mask.size
    return {"size": list(mask.shape), "counts": [int(run) for run in runs]}


def make_split(
    folder: Path, name: str, images: int, seed: int = 0, size: tuple[int, int] | None = None, broken: bool = True
) -> None:
    """Writes annotations/instances_NAME.json, annotations/captions_NAME.json and NAME/*.jpg.

    Image i has 1 + i % 3 shapes; the first of every image is a polygon. Image 1 also has a crowd as uncompressed
    run lengths, image 2 an annotation without a mask. `broken` adds a file that ends early, a missing file, a box of
    no width and a mask of another size.
    """
    rng = np.random.default_rng(seed)
    (folder / name).mkdir(parents=True)
    (folder / "annotations").mkdir(exist_ok=True)
    categories = [{"id": key, "name": text} for key, text in CATEGORIES.items()]
    data: dict[str, list] = {"images": [], "annotations": [], "categories": categories}
    captions: list[dict] = []

    def annotate(image_id: int, box: list[float], segmentation: Any, category: int, crowd: int = 0) -> None:
        number = 1000 * (seed + 1) + len(data["annotations"])
        row = {"id": number, "image_id": image_id, "bbox": box, "category_id": category, "iscrowd": crowd}
        data["annotations"].append(row | {"segmentation": segmentation, "area": box[2] * box[3]})

    for i in range(images):
        width, height = size or [(160, 120), (96, 128), (100, 100)][i % 3]
        image = Image.new("RGB", (width, height), tuple(int(v) for v in rng.integers(150, 255, 3)))
        draw = ImageDraw.Draw(image)
        image_id = 10 * (i + 1)
        for k in range(1 + i % 3):
            category = list(CATEGORIES)[(i + k) % 3]
            side = int(rng.integers(min(width, height) // 4, min(width, height) // 2))
            x, y = int(rng.integers(0, width - side)), int(rng.integers(0, height - side))
            mask = Image.new("1", (width, height))
            for canvas, fill in ((ImageDraw.Draw(mask), 1), (draw, COLOURS[category])):
                (canvas.ellipse if category == 1 else canvas.rectangle)([x, y, x + side - 1, y + side - 1], fill=fill)
            if k == 0:
                polygon = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotate(image_id, [x, y, side, side], [[float(v) for v in polygon]], category)
            elif i % 3 == 2 and k == 2:
                annotate(image_id, [x, y, side, side], [], category)
            else:
                annotate(image_id, [x, y, side, side], uncompressed_rle(np.array(mask)), category)
        if i == 1:
            crowd = np.zeros((height, width), bool)
            crowd[:20, :30] = True
            annotate(image_id, [0, 0, 30, 20], uncompressed_rle(crowd), 18, crowd=1)
        file_name = f"{image_id:012d}.jpg"
        image.save(folder / name / file_name, quality=92)
        data["images"].append({"id": image_id, "file_name": file_name, "width": width, "height": height})
        for text in ("a picture of shapes", f"number {i}\nof the shapes"):
            captions.append({"id": len(captions), "image_id": image_id, "caption": text})
    if broken:
        whole = (folder / name / data["images"][0]["file_name"]).read_bytes()
        (folder / name / "short.jpg").write_bytes(whole[: len(whole) // 2])
        width, height = data["images"][0]["width"], data["images"][0]["height"]
        data["images"].append({"id": 7, "file_name": "short.jpg", "width": width, "height": height})
        data["images"].append({"id": 8, "file_name": "gone.jpg", "width": width, "height": height})
        annotate(10, [5, 5, 0, 10], [], 1)
        annotate(10, [5, 5, 10, 10], uncompressed_rle(np.ones((10, 10), bool)), 1)
        annotate(99, [5, 5, 10, 10], [], 1)
    (folder / "annotations" / f"instances_{name}.json").write_text(json.dumps(data))
    (folder / "annotations" / f"captions_{name}.json").write_text(json.dumps({"annotations": captions}))


def make_coco(
    folder: Path, train: int = 12, val: int = 4, names: tuple[str, str] = ("train2017", "val2017"), **options: Any
) -> Path:
    """A COCO folder with two splits; `options` go to `make_split`. Returns the folder."""
    make_split(folder, names[0], train, seed=0, **options)
    make_split(folder, names[1], val, seed=1, **options)
    return folder


def build(folder: Path, data_dir: Path, *options: str) -> None:
    """Runs instdiff build-coco."""
    build_coco.main(["--coco_dir", str(folder), "--data_dir", str(data_dir), "--workers", "2", *options])


def edit(folder: Path, name: str, change: Callable[[dict], Any]) -> None:
    """Rewrites annotations/NAME.json after `change` had its way with it."""
    path = folder / "annotations" / f"{name}.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def oriented(pixels: np.ndarray, number: int, kind: str = "PNG") -> bytes:
    """An image file that stores these pixels under an EXIF orientation."""
    exif = Image.Exif()
    exif[0x0112] = number
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(buffer, kind, exif=exif, quality=92)
    return buffer.getvalue()
