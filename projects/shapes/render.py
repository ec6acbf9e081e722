"""Renders random scenes of shapes into a folder in COCO's format.

    python -m projects.shapes.render --output shapes --split train --count 20000 --seed 0 --size 128
    python -m projects.shapes.render --output shapes --split val --count 1000 --seed 1 --size 128
    python -m instdiff_jax build-coco --coco_dir shapes --data_dir datasets/shapes \
        --instance_captions shapes/annotations/instance_captions.json

The folder contains
    SPLIT/                                      the images (PNG)
    annotations/instances_SPLIT.json            COCO's instances; each also has `caption`, `attributes`
                                                {colour, texture}, `z` (position from back to front) and `inside`
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
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.files import read_json, replace_folder, write_json
from instdiff_jax.geometry.masks import encode_mask
from projects.shapes.drawing import SHAPES
from projects.shapes.scenes import check_scene, render_scene
from projects.shapes.worlds import WORLDS, SceneSettings

# Ids count scenes within a seed, and instances and captions within a scene.
_SCENES_PER_SEED = 10**6
_INSTANCES_PER_SCENE = 100
_CAPTIONS_PER_SCENE = 100


def write_coco(
    directory: str | Path,
    split: str,
    count: int,
    seed: int,
    size: int = 128,
    settings: SceneSettings = SceneSettings(),
    workers: int = 1,
    overwrite: bool = False,
) -> bool:
    """Writes scenes 0 to count - 1 of a seed as one split. An incomplete split is rendered again.

    Args:
        directory: the COCO folder; other splits in it stay.
        split: name of the split.
        count: number of scenes.
        seed: of the scenes; each split needs its own, as equal seeds give equal scenes.
        size: side of the images in pixels.
        settings: what scenes look like.
        workers: number of processes; they do not change the result.
        overwrite: replace a split that was made with other settings.

    Returns:
        Whether anything was rendered: False if the split already exists.

    Raises:
        InputError: for bad arguments, a split made with other settings, or a folder that cannot be written.
    """
    directory = Path(directory)
    if not split or not split.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"split: expected a name of letters, digits, - and _, got {split!r}")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _SCENES_PER_SEED:
        raise InputError(f"count: expected a whole number from 1 to {_SCENES_PER_SEED}, got {count!r}")
    check_scene(seed, 0, size, settings)
    info = {"description": "shapes", "seed": seed, "count": count, "size": size, "scene": dataclasses.asdict(settings)}
    finished = _is_finished(directory, split, info, overwrite)
    if not finished:
        _write_split(directory, split, info, settings, workers)
    # In any case: an earlier run may have ended between a split and this file.
    merged: dict[str, str] = {}
    for path in sorted((directory / "annotations").glob("instance_captions_*.json")):
        merged.update(_read_object(path))
    _write_json(directory / "annotations" / "instance_captions.json", merged)
    return not finished


def _is_finished(directory: Path, split: str, info: dict[str, Any], overwrite: bool) -> bool:
    """Whether the split exists with these settings; InputError if something else is in its place."""
    notes = directory / "annotations"
    for path in sorted(notes.glob("info_*.json")):
        other, there = path.stem.removeprefix("info_"), _read_object(path)
        # Settings that an older file lacks have their defaults.
        there["scene"] = dataclasses.asdict(SceneSettings()) | there.get("scene", {})
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


def _write_split(directory: Path, split: str, info: dict[str, Any], settings: SceneSettings, workers: int) -> None:
    notes = directory / "annotations"
    images, annotations, captions = [], [], []
    with replace_folder(directory / split, sync=False) as folder:
        render = functools.partial(
            _render_to_file, seed=info["seed"], size=info["size"], settings=settings, folder=str(folder)
        )
        for image, instances, texts in tqdm(_map(render, info["count"], workers), split, info["count"], unit="scene"):
            images.append(image)
            annotations += instances
            captions += texts
        # A split without its instances file is incomplete, so that file goes before anything else is replaced.
        (notes / f"instances_{split}.json").unlink(missing_ok=True)
        _write_json(notes / f"info_{split}.json", info)
    categories = [{"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES, 1)]
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
    index: int, *, seed: int, size: int, settings: SceneSettings, folder: str
) -> tuple[dict, list[dict], list[dict]]:
    """Renders a scene and saves its image; returns its rows of COCO's images, instances and captions."""
    scene = render_scene(seed, index, size, settings)
    # Ids differ between all splits of a folder, because their seeds do.
    number = seed * _SCENES_PER_SEED + index + 1
    name = f"{number:012d}.png"
    Image.fromarray(scene.image).save(os.path.join(folder, name), compress_level=4)
    image = {"id": number, "file_name": name, "width": size, "height": size, "background": scene.background}
    first = number * _INSTANCES_PER_SCENE
    rows = [
        {
            "id": first + item.z,
            "image_id": number,
            "category_id": SHAPES.index(item.shape) + 1,
            "bbox": list(item.box),
            "area": int(item.mask.sum()),
            "segmentation": encode_mask(item.mask),
            "iscrowd": 0,
            "caption": item.caption,
            "attributes": {"colour": item.colour, "texture": item.texture},
            "z": item.z,
            "inside": None if item.inside is None else first + item.inside,
        }
        for item in scene.instances
    ]
    captions = [
        {"id": number * _CAPTIONS_PER_SCENE + k, "image_id": number, "caption": text}
        for k, text in enumerate(scene.captions)
    ]
    return image, rows, captions


def _read_object(path: Path) -> dict[str, Any]:
    data = read_json(path)
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, as this program writes it")
    return data


def _write_json(path: Path, data: Any) -> None:
    write_json(path, data, indent=None, sync=False)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = ArgumentParser(
        prog="python -m projects.shapes.render", description="Render scenes of shapes as a COCO folder"
    )
    parser.add_argument("--output", type=Path, required=True, help="the COCO folder")
    parser.add_argument("--split", default="train", help="name of the split")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="seed of the scenes; each split needs its own")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    parser.add_argument("--overwrite", action="store_true", help="replace a split made with other settings")
    parser.add_argument("--world", choices=WORLDS, default="varied", help="defaults of the settings below")
    for field in dataclasses.fields(SceneSettings):
        if field.default is False:
            parser.add_argument(f"--{field.name}", action="store_true", default=None, help="off by default")
        else:
            defaults = ", ".join(f"{getattr(world, field.name) or 'none'} ({name})" for name, world in WORLDS.items())
            parser.add_argument(f"--{field.name}", type=type(field.default), help=defaults)
    args = vars(parser.parse_args(argv))
    given = {field.name: args[field.name] for field in dataclasses.fields(SceneSettings)}
    settings = dataclasses.replace(
        WORLDS[args["world"]], **{name: value for name, value in given.items() if value is not None}
    )
    made = write_coco(
        args["output"],
        args["split"],
        args["count"],
        args["seed"],
        args["size"],
        settings,
        workers=args["workers"] if args["count"] >= 500 else 1,
        overwrite=args["overwrite"],
    )
    print(f"{'written' if made else 'already there'}: {args['output']}, split {args['split']}, {args['count']} scenes")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
