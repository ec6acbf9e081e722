"""Speed of the data loader on one core, compared to decoding the JPEG files alone.

    python -m benchmarks.loader

Makes COCO-like images (640x480, 7 instances with irregular masks), builds the dataset, and reads it at 512x512 with
one worker process. Prints images per second. "Per core" divides by processor time instead of wall time, so that other
load on the machine does not count.
"""

import json
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

from instdiff_jax.cli import build_coco as coco
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.examples import DataConfig
from instdiff_jax.data.images import load_image
from instdiff_jax.data.loader import BatchReader, LoaderSettings, Sources, make_loader
from instdiff_jax.data.phrases import phrase_table
from instdiff_jax.errors import ArgumentParser

WIDTH, HEIGHT = 640, 480


def make_folder(folder: Path, images: int, masks: int) -> None:
    """A COCO folder of photo-like images with `masks` irregular polygons of 1.5% to 25% of the image each."""
    rng = np.random.default_rng(0)
    (folder / "train").mkdir(parents=True)
    (folder / "annotations").mkdir()
    rows, annotations, captions = [], [], []
    for i in range(images):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).resize((WIDTH, HEIGHT), Image.BICUBIC)
        noise = rng.normal(0, 12, (HEIGHT, WIDTH, 3))
        pixels = np.clip(np.asarray(coarse) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / "train" / f"{i}.jpg", quality=90)
        rows.append({"id": i, "file_name": f"{i}.jpg", "width": WIDTH, "height": HEIGHT})
        captions.append({"id": i, "image_id": i, "caption": "many things of all kinds on a table"})
        for k in range(masks):
            radius = np.sqrt(rng.uniform(0.015, 0.25) * WIDTH * HEIGHT / np.pi)
            angles = np.linspace(0, 2 * np.pi, 60, endpoint=False)
            wobble = radius * (1 + 0.25 * np.sin(3 * angles + i) + 0.08 * rng.normal(size=60))
            x = np.clip(rng.uniform(0.2, 0.8) * WIDTH + wobble * np.cos(angles), 0, WIDTH - 1)
            y = np.clip(rng.uniform(0.2, 0.8) * HEIGHT + wobble * np.sin(angles), 0, HEIGHT - 1)
            polygon = np.stack([x, y], axis=1).round(2).reshape(-1).tolist()
            box = [float(x.min()), float(y.min()), float(np.ptp(x)), float(np.ptp(y))]
            annotations.append(
                {"id": len(annotations), "image_id": i, "bbox": box, "category_id": k % 7, "segmentation": [polygon]}
            )
    categories = [{"id": k, "name": f"thing {k}"} for k in range(7)]
    data = {"images": rows, "annotations": annotations, "categories": categories}
    (folder / "annotations" / "instances_train.json").write_text(json.dumps(data))
    (folder / "annotations" / "captions_train.json").write_text(json.dumps({"annotations": captions}))


def tokenize(captions: list[str]) -> np.ndarray:
    """In place of the tokenizer, which takes a fraction of a millisecond."""
    return np.zeros((len(captions), 77), np.int32)


def embed(phrases: list[str]) -> np.ndarray:
    """In place of the text encoder."""
    return np.zeros((len(phrases), 768), np.float32)


def rate(label: str, images: int, work) -> None:
    """Runs `work` and prints images per second, by wall time and by this process's processor time."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    seconds, busy = time.perf_counter() - start, time.process_time() - cpu
    print(f"{label:46s} {images / seconds:8.1f} images/s {images / busy:8.1f} images/s per core")


def main() -> None:
    """Makes the data, then measures."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=64, help="images in the dataset")
    parser.add_argument("--masks", type=int, default=7, help="instances in an image")
    parser.add_argument("--image_size", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=24)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_folder(folder / "coco", args.images, args.masks)
        coco.main(["--coco_dir", str(folder / "coco"), "--data_dir", str(folder / "data")])
        dataset = InstanceDataset(folder / "data", "train")
        table = phrase_table(folder / "data", "benchmark", embed)
        # Every sample is grounded: masks take most of the time.
        examples = DataConfig(image_size=args.image_size, map_size=args.image_size, null_grounding=0.0)
        sources, settings = Sources(dataset, tokenize, table), LoaderSettings(examples, args.batch_size, workers=1)
        files = [path.read_bytes() for path in sorted((folder / "coco" / "train").iterdir())]
        print(f"{WIDTH}x{HEIGHT}, {np.mean([len(file) for file in files]) / 1000:.0f} kB a file, {args.masks} masks")

        total = args.batch_size * args.steps
        rate("decode JPEG only", total, lambda: [load_image(files[i % len(files)]) for i in range(total)])
        reader = BatchReader(sources, settings)
        reader(0)
        rate("examples, this process", total, lambda: [reader(step) for step in range(args.steps)])

        loader = make_loader(sources, settings)
        next(loader)
        start = time.perf_counter()
        for _ in range(args.steps):
            next(loader)
        print(f"{'loader, one worker':46s} {total / (time.perf_counter() - start):8.1f} images/s")
        del loader


if __name__ == "__main__":
    main()
