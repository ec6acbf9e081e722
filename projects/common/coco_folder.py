"""Writes rendered scenes as a folder in COCO's format, and reads the flags of the programs that do.

The folder contains
    SPLIT/                                      the images (PNG)
    annotations/instances_SPLIT.json            COCO's instances; each also has `caption`, `attributes`,
                                                `z` (position from back to front) and `inside`
                                                (annotation id of the instance it is a part of, or null)
    annotations/captions_SPLIT.json             COCO's image captions; each image's first one lists everything
    annotations/instance_captions_SPLIT.json    {annotation id: caption}
    annotations/instance_captions.json          the same for all splits, for build-coco
    annotations/info_SPLIT.json                 the settings of the split

A split appears only when it is complete. Captions may say left and right, so train without flips (`flip=0`).
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8
from PIL import Image
from tqdm import tqdm

from instdiff_jax.config import Settings
from instdiff_jax.errors import ArgumentParser, InputError
from instdiff_jax.files import read_json, replace_folder, write_json
from instdiff_jax.geometry.masks import encode_mask

# Ids count scenes within a seed, and instances and captions within a scene.
_SCENES_PER_SEED = 10**6
_INSTANCES_PER_SCENE = 100
_CAPTIONS_PER_SCENE = 100


class Row(NamedTuple):
    """One instance of a picture.

    Attributes:
        box: x, y, width, height in pixels, of the visible part.
        mask: True where the instance is visible.
        attributes: such as {"colour": "red"}.
        inside: index of the instance that it is a part of.
    """

    category: str
    caption: str
    box: tuple[int, int, int, int]
    mask: Bool[np.ndarray, "H W"]
    attributes: dict[str, str]
    inside: int | None = None


class Picture(NamedTuple):
    """One scene: its image, background in words, instances from back to front, and captions."""

    image: UInt8[np.ndarray, "H W 3"]
    background: str
    rows: Sequence[Row]
    captions: Sequence[str]


class World(NamedTuple):
    """Where pictures come from.

    Attributes:
        description: one word for COCO's info.
        supercategory: of all categories.
        categories: their names.
        render: (seed, index, size, settings) → a picture. A function of a module, so that other processes find it.
    """

    description: str
    supercategory: str
    categories: tuple[str, ...]
    render: Callable[[int, int, int, Any], Picture]


def write_split(
    directory: str | Path,
    split: str,
    world: World,
    scenes: tuple[int, int, int],
    settings: Settings,
    workers: int = 1,
    overwrite: bool = False,
) -> bool:
    """Writes the first scenes of a seed as one split. An incomplete split is rendered again.

    Args:
        directory: the COCO folder; other splits in it stay.
        split: name of the split.
        world: renders the scenes.
        scenes: how many, their seed, and the side of the images in pixels. Each split needs its own seed, as equal
            seeds give equal scenes.
        settings: what scenes look like; checked by the caller.
        workers: number of processes; they do not change the result.
        overwrite: replace a split that was made with other settings.

    Returns:
        Whether anything was rendered: False if the split already exists.

    Raises:
        InputError: for bad arguments, a split made with other settings, or a folder that cannot be written.
    """
    directory, (count, seed, size) = Path(directory), scenes
    if not split or not split.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"split: expected a name of letters, digits, - and _, got {split!r}")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _SCENES_PER_SEED:
        raise InputError(f"count: expected a whole number from 1 to {_SCENES_PER_SEED}, got {count!r}")
    scene = dataclasses.asdict(settings)
    info = {"description": world.description, "seed": seed, "count": count, "size": size, "scene": scene}
    finished = _is_finished(directory, split, info, dataclasses.asdict(type(settings)()), overwrite)
    if not finished:
        _write_split(directory, split, world, info, settings, workers)
    # In any case: an earlier run may have ended between a split and this file.
    merged: dict[str, str] = {}
    for path in sorted((directory / "annotations").glob("instance_captions_*.json")):
        merged.update(_read_object(path))
    _write_json(directory / "annotations" / "instance_captions.json", merged)
    return not finished


def _is_finished(directory: Path, split: str, info: dict[str, Any], defaults: dict[str, Any], overwrite: bool) -> bool:
    """Whether the split exists with these settings; InputError if something else is in its place."""
    notes = directory / "annotations"
    for path in sorted(notes.glob("info_*.json")):
        other, there = path.stem.removeprefix("info_"), _read_object(path)
        # Settings that an older file lacks have their defaults.
        there["scene"] = defaults | there.get("scene", {})
        if other == split and there == info and (notes / f"instances_{split}.json").exists():
            return True
        if other == split and there != info and not overwrite:
            raise InputError(f"{path}: split {split} was made with other settings; pass --overwrite to replace it")
        if other != split and there.get("seed") == info["seed"]:
            raise InputError(f"seed: expected another one than {info['seed']}, which split {other} has")
    # Without this file, the images are not ours.
    if not (notes / f"info_{split}.json").exists():
        for path in (directory / split, notes / f"instances_{split}.json"):
            if path.exists():
                raise InputError(f"{path}: expected nothing there, found files that this program did not make")
    return False


def _write_split(
    directory: Path, split: str, world: World, info: dict[str, Any], settings: Settings, workers: int
) -> None:
    notes = directory / "annotations"
    images, annotations, captions = [], [], []
    with replace_folder(directory / split, sync=False) as folder:
        render = functools.partial(_render_to_file, world, info["seed"], info["size"], settings, str(folder))
        for image, instances, texts in tqdm(_map(render, info["count"], workers), split, info["count"], unit="scene"):
            images.append(image)
            annotations += instances
            captions += texts
        # A split without its instances file is incomplete, so that file goes before anything else is replaced.
        (notes / f"instances_{split}.json").unlink(missing_ok=True)
        _write_json(notes / f"info_{split}.json", info)
    categories = [
        {"id": k, "name": name, "supercategory": world.supercategory} for k, name in enumerate(world.categories, 1)
    ]
    instances = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    _write_json(notes / f"captions_{split}.json", {"info": info, "images": images, "annotations": captions})
    _write_json(notes / f"instance_captions_{split}.json", {str(row["id"]): row["caption"] for row in annotations})
    _write_json(notes / f"instances_{split}.json", instances)


def _map(render: functools.partial, count: int, workers: int) -> Iterator[tuple[dict, list[dict], list[dict]]]:
    """Calls `render` with every index, in order."""
    if workers <= 1:
        yield from map(render, range(count))
        return
    # Spawned: the caller may have started jax, whose threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(render, range(count), chunksize=64)


def _render_to_file(
    world: World, seed: int, size: int, settings: Settings, folder: str, index: int
) -> tuple[dict, list[dict], list[dict]]:
    """Renders a scene and saves its image; returns its rows of COCO's images, instances and captions."""
    picture = world.render(seed, index, size, settings)
    # Ids differ between all splits of a folder, because their seeds do.
    number = seed * _SCENES_PER_SEED + index + 1
    name = f"{number:012d}.png"
    Image.fromarray(picture.image).save(os.path.join(folder, name), compress_level=4)
    image = {"id": number, "file_name": name, "width": size, "height": size, "background": picture.background}
    first = number * _INSTANCES_PER_SCENE
    rows = [
        {
            "id": first + z,
            "image_id": number,
            "category_id": world.categories.index(row.category) + 1,
            "bbox": list(row.box),
            "area": int(row.mask.sum()),
            "segmentation": encode_mask(row.mask),
            "iscrowd": 0,
            "caption": row.caption,
            "attributes": row.attributes,
            "z": z,
            "inside": None if row.inside is None else first + row.inside,
        }
        for z, row in enumerate(picture.rows)
    ]
    captions = [
        {"id": number * _CAPTIONS_PER_SCENE + k, "image_id": number, "caption": text}
        for k, text in enumerate(picture.captions)
    ]
    return image, rows, captions


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, as this program writes it")
    return data


def _write_json(path: Path, data: Any) -> None:
    write_json(path, data, indent=None, sync=False)


def render_parser(prog: str, description: str, worlds: Mapping[str, Settings], size: int) -> ArgumentParser:
    """The flags of a renderer: output, split, count, seed, size, workers, overwrite, world, and the scenes' settings.

    Args:
        prog: the command.
        description: one sentence.
        worlds: named settings of scenes; the first one is the default of --world.
        size: default side of the images in pixels.
    """
    parser = ArgumentParser(prog=prog, description=description)
    parser.add_argument("--output", type=Path, required=True, help="the COCO folder")
    parser.add_argument("--split", default="train", help="name of the split")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes; each split needs its own")
    parser.add_argument("--size", type=int, default=size, help="side of the images in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace a split made with other settings")
    default = next(iter(worlds))
    parser.add_argument("--world", choices=worlds, default=default, help="defaults of the settings below")
    for field in dataclasses.fields(worlds[default]):
        if field.default is False:
            parser.add_argument(f"--{field.name}", action="store_true", default=None, help="off by default")
        else:
            defaults = ", ".join(f"{getattr(world, field.name) or 'none'} ({name})" for name, world in worlds.items())
            parser.add_argument(f"--{field.name}", type=type(field.default), help=defaults)
    return parser


def chosen_settings(args: Mapping[str, Any], worlds: Mapping[str, Settings]) -> Any:
    """The settings that the flags of `render_parser` name: the world's, but for those given."""
    world = worlds[args["world"]]
    given = {field.name: args[field.name] for field in dataclasses.fields(world)}
    return dataclasses.replace(world, **{name: value for name, value in given.items() if value is not None})
