"""What `instdiff sample` reads: layouts in every format, their folders, COCO files, images and noise."""

import functools
import io
import json
import random
from pathlib import Path
from unittest import mock

import numpy as np
from layout_cases import check_grounding
from PIL import Image
from tiny_checkpoint import tiny_config

from instdiff_jax.cli import sample
from instdiff_jax.config import SamplingConfig
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.grounding import FORMAT_CHOICES, make_grounding
from instdiff_jax.layout import Layout
from instdiff_jax.models.regions import region_bits
from instdiff_jax.sampling.conditions import list_conditions
from instdiff_jax.sampling.loading import Process
from instdiff_jax.sampling.memory import MemoryLimits
from instdiff_jax.sampling.outputs import read_image
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.results import PendingBatch
from tests.fuzz.cases import Kind, command
from tests.fuzz.mutate import any_file, json_file, junk

WIDTH, HEIGHT = 64, 48
_RING = [4, 4, 30, 4, 30, 30, 4, 30]
LAYOUT = {
    "caption": "a scene",
    "width": WIDTH,
    "height": HEIGHT,
    "annos": [
        {"caption": "a box", "category_name": "thing", "bbox": [8, 8, 24, 30], "mask": []},
        {"caption": "a point", "point": [10, 10], "scribble": [1, 2, 3, 4, 5, 6]},
        {"caption": "runs", "mask": {"size": [HEIGHT, WIDTH], "counts": [100, 200, 2772]}, "bbox": [0, 0, 64, 48]},
        {"caption": "polygon", "mask": [_RING], "scribble": [[1, 2], [3, 4]], "point": [20.5, 11.25]},
        {"caption": "packed", "mask": {"size": [HEIGHT, WIDTH], "counts": ""}},
    ],
}
COCO = {
    "images": [{"id": 5, "width": WIDTH, "height": HEIGHT, "file_name": "5.png"}],
    "categories": [{"id": 1, "name": "cat"}, {"id": 3, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 5, "category_id": 1, "bbox": [1, 2, 30, 20], "segmentation": [_RING], "iscrowd": 0},
        {"id": 2, "image_id": 5, "category_id": 3, "bbox": [9, 9, 9.5, 9], "caption": "a brown dog", "iscrowd": 0},
        {"id": 3, "image_id": 5, "category_id": 3, "bbox": [0, 0, 9, 9], "iscrowd": 1},
    ],
}
CAPTIONS = {"annotations": [{"id": 1, "image_id": 5, "caption": "a cat and a dog"}]}


class GrayPipeline(Pipeline):
    """Checks and prepares all that sampling does on the host; its pictures are gray."""

    def __init__(self):
        self.config, self.dtype = tiny_config(), "float32"
        self.sampling, self.params = SamplingConfig(steps=4, mis=0.5, masked_attention="strict"), {}
        self.limits = MemoryLimits(self.config, itemsize=4, parameter_bytes=0)
        self._process = Process()

    def start_batch(self, request, batch, watched=False):
        layouts = {image.number: image.layout for image in batch}
        listed = list_conditions(
            layouts, "", self.config, request.options.format, request.options.drop, request.separate_instances
        )
        assert all(isinstance(rows, ImageRows) for rows in listed.rows.values())
        width, height = batch[0].canvas
        for entry in listed.conditions:
            check_grounding(entry.grounding | {"phrase_embeddings": np.zeros((30, 768), np.float32)}, 64)
            region_bits(entry.grounding, *request.latent_shape(batch[0].canvas)[:2], "strict")
        seeds = [request.seeds[image.seed_index] for image in batch]
        latents = np.zeros((len(batch), *request.latent_shape(batch[0].canvas)), np.float32)
        pixels = np.full((len(batch), height, width, 3), 128, np.uint8)
        finite = np.ones(len(batch), bool)
        return PendingBatch([image.layout for image in batch], seeds, request, latents, [(pixels, finite)], None)


@functools.cache
def gray_pipeline() -> GrayPipeline:
    return GrayPipeline()


def run_sample(folder: Path, *flags: object) -> dict:
    """`instdiff sample` with that pipeline; returns the run's record, after a look at the pictures."""
    output = folder / "out"
    (folder / "model").mkdir(exist_ok=True)
    (folder / "model" / "config.json").write_text("{}")
    known = mock.patch("instdiff_jax.sampling.loading.checkpoint_fingerprint", lambda *args: "gray")
    with known, mock.patch.object(sample, "open_pipeline", lambda args: gray_pipeline()):
        command("sample", "--checkpoint", folder / "model", "--output", output, *flags, output=output)
    record = json.loads((output / "run.json").read_text(), parse_constant=_no_constant)
    for entry in record["layouts"]:
        for name in ("layout", *entry["seeds"]):
            assert read_image(output / entry["layout"] / f"{name}.png").ndim == 3
    return record


def _no_constant(name: str) -> None:
    raise AssertionError(f"{name} is not JSON")


def check_layout(layout: Layout) -> None:
    """All that holds for any layout."""
    again = Layout.from_dict(json.loads(layout.to_json(), parse_constant=_no_constant))
    assert again == layout, "its own file gives another layout"
    assert 1 <= len(layout.instances) <= 30
    for instance in layout.instances:
        assert instance.caption.strip()
        if instance.box is not None:
            x0, y0, x1, y1 = instance.box
            assert 0 <= x0 < x1 <= layout.width and 0 <= y0 < y1 <= layout.height
        if instance.rle is not None:
            assert instance.rle.size == (layout.height, layout.width)
            assert 0 < instance.rle.area <= layout.height * layout.width
    for name in FORMAT_CHOICES:
        grounding = make_grounding(layout, tiny_config(), name)
        check_grounding(grounding | {"phrase_embeddings": np.zeros((30, 768), np.float32)}, 64)
        assert grounding["valid"].sum() == len(layout.instances)


def _write_layout(rng, folder: Path) -> None:
    value = json.loads(json.dumps(LAYOUT))
    value["annos"][4]["mask"]["counts"] = "T1d8S3"
    value["annos"][4]["mask"] = _packed()
    (folder / "scene.json").write_bytes(json_file(rng, value))


@functools.cache
def _packed() -> dict:
    from instdiff_jax.geometry.masks import encode_mask

    mask = np.zeros((HEIGHT, WIDTH), bool)
    mask[5:20, 10:40:2] = True
    return encode_mask(mask)


def _read_layout(folder: Path) -> None:
    check_layout(Layout.from_json(folder / "scene.json"))


def _sample_layout(folder: Path) -> None:
    assert run_sample(folder, "--layout", folder / "scene.json")["layouts"]


def _write_folder(rng, folder: Path) -> None:
    (folder / "in").mkdir()
    names = ["a.json", "b.JSON"]
    if rng is not None:
        odd = ["...json", ".json", "run.json", "-x.json", "a b.json", "contact_sheet.png.json", "é.json", "x\n.json"]
        names += rng.sample([*odd, "run-0-of-2.json", "\udcff.json", "A.json", ".ipynb_checkpoints"], 3)
    for name in names:
        value = {**LAYOUT, "annos": LAYOUT["annos"][:2]}
        (folder / "in" / name).write_bytes(json_file(None if rng is None or rng.random() < 0.7 else rng, value))


def _sample_folder(folder: Path) -> None:
    names = [entry["layout"] for entry in run_sample(folder, "--layout", folder / "in")["layouts"]]
    assert len(set(names)) == len(names) == len({name.lower() for name in names} | set(names)) and names


def _write_coco(rng, folder: Path) -> None:
    which = None if rng is None else rng.random()
    (folder / "instances.json").write_bytes(json_file(rng if which is not None and which < 0.8 else None, COCO))
    (folder / "captions.json").write_bytes(json_file(rng if which is not None and which >= 0.8 else None, CAPTIONS))


def _sample_coco(folder: Path) -> None:
    files = ("--coco", folder / "instances.json", "--captions", folder / "captions.json")
    record = run_sample(folder, *files, "--image_id", 5)
    assert [entry["layout"] for entry in record["layouts"]] == ["5"]


def _image(rng: random.Random | None, modes: tuple[str, ...]) -> bytes:
    """An image file of some mode and format."""
    mode = "RGB" if rng is None else rng.choice(modes)
    size = (WIDTH, HEIGHT) if rng is None or rng.random() < 0.8 else (rng.choice([1, 47, 3000]), rng.choice([1, 64]))
    ramp = np.linspace(0, 1, size[0] * size[1]).reshape(size[::-1])
    if mode in ("I;16", "F", "I"):
        top = 1 if rng is None else rng.choice([0, 1, 255, 300, 65535, np.nan, -1, 1e30])
        kind = {"I;16": np.uint16, "F": np.float32, "I": np.int32}[mode]
        image = Image.fromarray(np.nan_to_num(ramp * top, nan=0 if mode != "F" else np.nan).clip(-9, 6e4).astype(kind))
    else:
        image = Image.fromarray(((ramp > 0.5) * 255).astype(np.uint8)).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 1 if rng is None else rng.choice([1, 3, 6, 0, 99])
    buffer = io.BytesIO()
    form = (
        "TIFF"
        if mode in ("F", "I", "CMYK")
        else "PNG"
        if rng is None or mode not in ("RGB", "L")
        else rng.choice(["PNG", "JPEG"])
    )
    image.save(buffer, form, exif=exif)
    return any_file(rng if rng is not None and rng.random() < 0.6 else None, buffer.getvalue())


def _write_images(rng, folder: Path) -> None:
    _write_layout(None, folder)
    modes = ("RGB", "L", "1", "P", "RGBA", "LA", "I;16", "F", "I", "CMYK")
    (folder / "start.png").write_bytes(_image(rng, modes))
    (folder / "mask.png").write_bytes(_image(rng, modes))


def _sample_images(folder: Path) -> None:
    images = ("--init_image", folder / "start.png", "--inpaint_mask", folder / "mask.png")
    assert run_sample(folder, "--layout", folder / "scene.json", *images)["inputs"].keys() == {
        "init_image",
        "inpaint_mask",
    }


def _write_noise(rng, folder: Path) -> None:
    _write_layout(None, folder)
    shape, kind = (1, HEIGHT // 2, WIDTH // 2, 4), np.float32
    values: object = np.random.default_rng(0).standard_normal(shape).astype(kind)
    choice = 1 if rng is None else rng.random()
    if choice < 0.3:
        values = rng.choice([values.astype(">f4"), values.astype(object), values * np.nan, values[:0], np.float32(1)])
    elif choice < 0.4:
        values = np.array([junk(rng)], object)
    buffer = io.BytesIO()
    np.save(buffer, values, allow_pickle=True)
    (folder / "noise.npy").write_bytes(any_file(rng if choice < 0.9 else None, buffer.getvalue()))


def _sample_noise(folder: Path) -> None:
    run_sample(folder, "--layout", folder / "scene.json", "--noise", folder / "noise.npy")


def kinds(folder: Path) -> list[Kind]:
    return [
        Kind("layout", _write_layout, _read_layout, weight=12),
        Kind("sample --layout", _write_layout, _sample_layout, weight=4),
        Kind("sample --layout FOLDER", _write_folder, _sample_folder),
        Kind("sample --coco", _write_coco, _sample_coco, weight=4),
        Kind("sample --init_image", _write_images, _sample_images, weight=2),
        Kind("sample --noise", _write_noise, _sample_noise),
    ]
