"""The inputs of `instdiff sample`: layouts and arrays, from files."""

import argparse
import io
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np

from instdiff_jax.buckets import is_bucket
from instdiff_jax.cli.box import default_layouts
from instdiff_jax.cli.redraw import is_picture
from instdiff_jax.coco import Coco
from instdiff_jax.copies import local_copy
from instdiff_jax.data.arrays import DAMAGED_ZIP
from instdiff_jax.errors import InputError
from instdiff_jax.files import json_files
from instdiff_jax.images import open_image, read_repaint_mask
from instdiff_jax.layout import Layout, WhenTooMany
from instdiff_jax.paths import read_file
from instdiff_jax.sampling.metadata import read_origin
from instdiff_jax.sampling.outputs import find_records, is_record


class LayoutFiles(Mapping[str, Layout]):
    """Layouts by name. Each is read when it is first asked for, and kept."""

    def __init__(self, readers: Mapping[str, Callable[[], Layout]]):
        self._readers = readers
        self._layouts: dict[str, Layout] = {}

    def __getitem__(self, name: str) -> Layout:
        if name not in self._layouts:
            self._layouts[name] = self._readers[name]()
        return self._layouts[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)


def find_layouts(args: argparse.Namespace) -> LayoutFiles:
    """The layouts asked for; InputError if there are none, or if two would be written to one place."""
    too_many = "largest" if args.keep_largest else "error"
    if args.coco is not None:
        if args.layout is not None:
            raise InputError("--layout: expected none beside --coco")
        if not args.image_id:
            raise InputError("--image_id: expected the ids of images of --coco")
        coco = Coco(args.coco, args.captions)
        found = [Layout.from_coco(coco, image_id, max_instances=too_many) for image_id in args.image_id]
        readers = [(layout.name, lambda layout=layout: layout) for layout in found]
    else:
        for name in ("image_id", "captions"):
            if getattr(args, name) is not None:
                raise InputError(f"--{name}: only means something with --coco")
        files = [file for path in args.layout or [default_layouts()] for file in _layout_files(path)]
        readers = [(file.stem, lambda file=file: _read_layout(file, too_many)) for file in files]
    twice = [name for name, times in Counter(name for name, _ in readers).items() if times > 1]
    if twice:
        raise InputError(f"--layout: two layouts would write to {args.output / twice[0]}; expected different names")
    return LayoutFiles(dict(readers))


def _read_layout(file: Path, too_many: WhenTooMany) -> Layout:
    return read_origin(file).layout if is_picture(file) else Layout.from_json(file, max_instances=too_many)


def _layout_files(path: Path) -> list[Path]:
    if is_bucket(path) and path.suffix.lower() not in (".json", ".png"):
        path = local_copy(path, lambda name: name.lower().endswith(".json"))
    if not os.path.isdir(path):  # Path.is_dir raises for what cannot be a name
        return [path]
    records = [file for file in find_records(path) if is_record(file)]
    files = [file for file in json_files(path) if file not in records]
    if not files:
        raise InputError(f"--layout: {path}: no .json file in this folder")
    return files


def read_arrays(args: argparse.Namespace) -> dict[str, np.ndarray]:
    """--init_image, --inpaint_mask and --noise as arrays."""
    arrays = {}
    if args.init_image is not None:
        arrays["init_image"] = _read_image("init_image", args.init_image)
    if args.inpaint_mask is not None:
        arrays["inpaint_mask"] = read_repaint_mask(args.inpaint_mask, "inpaint_mask")
    if args.noise is not None:
        arrays["noise"] = _read_noise(args.noise)
    return arrays


def _read_image(flag: str, path: Path) -> np.ndarray:
    try:
        return np.asarray(open_image(path))
    except ValueError as error:
        raise InputError(f"--{flag}: {path}: expected an image: {error}") from error


def _read_noise(path: Path) -> np.ndarray:
    try:
        noise = np.load(io.BytesIO(read_file(path)), allow_pickle=False)
    except DAMAGED_ZIP as error:
        raise InputError(f"--noise: {path}: expected a float32 .npy file ({error})") from error
    if not isinstance(noise, np.ndarray):
        raise InputError(f"--noise: {path}: expected a float32 .npy file, got several arrays")
    if noise.dtype != np.float32:
        raise InputError(f"--noise: {path}: expected float32, got {noise.dtype}")
    return noise
