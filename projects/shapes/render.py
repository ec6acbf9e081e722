"""A world to learn: scenes of coloured, textured shapes as a folder in COCO's own format.

    python -m projects.shapes.render --output shapes --split train --count 20000 --seed 0 --size 128
    python -m projects.shapes.render --output shapes --split val --count 1000 --seed 1 --size 128
    python -m instdiff_jax build-coco --coco_dir shapes --data_dir datasets/shapes \
        --instance_captions shapes/annotations/instance_captions.json

A folder holds
    SPLIT/                                      the images, PNG
    annotations/instances_SPLIT.json            COCO's instances; each also has `caption`, `attributes`
                                                {colour, texture}, `z` (place from back to front) and `inside`
                                                (annotation id of the instance it is a part of, or null)
    annotations/captions_SPLIT.json             COCO's captions of images; each image's first one lists everything
    annotations/instance_captions_SPLIT.json    {annotation id: caption}
    annotations/instance_captions.json          the same of all splits, as the dataset builder takes it

A split is written beside its place and moved there when complete. Captions say left and right, so training on them
should not flip the images (`flip=0`).
"""

import dataclasses
import functools
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm import tqdm

from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.geometry.masks import encode_mask
from projects.shapes.drawing import COLOURS, TEXTURES
from projects.shapes.scenes import (
    SHAPES,
    WORLDS,
    Scene,
    SceneInstance,
    SceneSettings,
    check_scene,
    render_scene,
)

__all__ = [
    "COLOURS",
    "SHAPES",
    "TEXTURES",
    "WORLDS",
    "Scene",
    "SceneInstance",
    "SceneSettings",
    "render_scene",
    "write_coco",
]

_SCENES_A_SEED = 10**6
_INSTANCES_A_SCENE = 100
_CAPTIONS_A_SCENE = 100


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
    """Writes scenes 0 to count - 1 of a seed as one split; what was half-written before is replaced.

    Args:
        directory: the COCO folder; other splits in it stay.
        split: name of the split.
        count: how many scenes.
        seed: of the scenes; not that of another split, whose scenes would be the same.
        size: side of the images in pixels.
        settings: what scenes look like.
        workers: processes that render; they change nothing but the time.
        overwrite: replace a split that was made from something else.

    Returns:
        Whether anything was rendered: False for a split that was there already.

    Raises:
        InputError: for bad arguments, a split made from something else, or a folder that cannot be written.
    """
    directory = Path(directory)
    if not split or not split.replace("_", "").replace("-", "").isalnum():
        raise InputError(f"split: expected a name of letters, digits, - and _, got {split!r}")
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= _SCENES_A_SEED:
        raise InputError(f"count: expected a whole number from 1 to {_SCENES_A_SEED}, got {count!r}")
    check_scene(seed, 0, size, settings)
    info = {"description": "shapes", "seed": seed, "count": count, "size": size, "scene": dataclasses.asdict(settings)}
    notes = directory / "annotations"
    try:
        notes.mkdir(parents=True, exist_ok=True)
        finished = _is_finished(directory, split, info, overwrite)
        if not finished:
            _write_split(directory, split, info, settings, workers)
        # Also after a run that ended between a split and this file.
        merged: dict[str, str] = {}
        for path in sorted(notes.glob("instance_captions_*.json")):
            merged.update(_read_json(path))
        _write_json(notes / "instance_captions.json", merged)
    except OSError as error:
        raise InputError(f"{directory}: cannot be written: {error.strerror or error}") from error
    return not finished


def _is_finished(directory: Path, split: str, info: dict[str, Any], overwrite: bool) -> bool:
    """Whether the split is there as asked for; InputError where something else stands in its place."""
    notes = directory / "annotations"
    for path in sorted(notes.glob("info_*.json")):
        other, there = path.stem.removeprefix("info_"), _read_json(path)
        # One from before a setting was there has its default.
        there["scene"] = dataclasses.asdict(SceneSettings()) | there.get("scene", {})
        if other == split and there == info and (notes / f"instances_{split}.json").exists():
            return True
        if other == split and there != info and not overwrite:
            raise InputError(f"{path}: split {split} was made from other settings; pass --overwrite to replace it")
        if other != split and there.get("seed") == info["seed"]:
            raise InputError(f"seed: expected another one than {info['seed']}, of which split {other} is made")
    # Not ours without this file: images of somebody else.
    if not (notes / f"info_{split}.json").exists():
        for path in (directory / split, notes / f"instances_{split}.json"):
            if path.exists():
                raise InputError(f"{path}: expected nothing there, found files that this program did not make")
    return False


def _write_split(directory: Path, split: str, info: dict[str, Any], settings: SceneSettings, workers: int) -> None:
    notes, partial = directory / "annotations", directory / f"{split}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    render = functools.partial(
        _render_to_file, seed=info["seed"], size=info["size"], settings=settings, folder=str(partial)
    )
    images, annotations, captions = [], [], []
    for image, instances, texts in tqdm(_map(render, info["count"], workers), split, info["count"], unit="scene"):
        images.append(image)
        annotations += instances
        captions += texts
    categories = [{"id": k, "name": name, "supercategory": "shape"} for k, name in enumerate(SHAPES, 1)]
    instances = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": categories}
    # From here on the split is being replaced; without its instances file it counts as half-written.
    (notes / f"instances_{split}.json").unlink(missing_ok=True)
    _write_json(notes / f"info_{split}.json", info)
    shutil.rmtree(directory / split, ignore_errors=True)
    partial.rename(directory / split)
    _write_json(notes / f"captions_{split}.json", {"info": info, "images": images, "annotations": captions})
    _write_json(notes / f"instance_captions_{split}.json", {str(row["id"]): row["caption"] for row in annotations})
    _write_json(notes / f"instances_{split}.json", instances)


def _map(render: functools.partial, count: int, workers: int) -> Iterator[tuple[dict, list[dict], list[dict]]]:
    """`render` of every index, in order."""
    if workers <= 1:
        yield from map(render, range(count))
        return
    # Spawned: a caller may have started jax, whose threads do not survive a fork.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from pool.map(render, range(count), chunksize=64)


def _render_to_file(
    index: int, *, seed: int, size: int, settings: SceneSettings, folder: str
) -> tuple[dict, list[dict], list[dict]]:
    """Renders a scene and saves its image: its rows in COCO's images, instances and captions."""
    scene = render_scene(seed, index, size, settings)
    # Ids differ between all splits of a folder, because their seeds do.
    number = seed * _SCENES_A_SEED + index + 1
    name = f"{number:012d}.png"
    Image.fromarray(scene.image).save(os.path.join(folder, name), compress_level=4)
    image = {"id": number, "file_name": name, "width": size, "height": size, "background": scene.background}
    first = number * _INSTANCES_A_SCENE
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
        {"id": number * _CAPTIONS_A_SCENE + k, "image_id": number, "caption": text}
        for k, text in enumerate(scene.captions)
    ]
    return image, rows, captions


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path}: expected a JSON file: {error}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, as this program writes it")
    return data


def _write_json(path: Path, data: Any) -> None:
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(data))
    os.replace(partial, path)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line: see the top of this file."""
    parser = ArgumentParser(prog="python -m projects.shapes.render", description="Scenes of shapes as COCO")
    parser.add_argument("--output", type=Path, required=True, help="the COCO folder")
    parser.add_argument("--split", default="train", help="name of the split")
    parser.add_argument("--count", type=int, required=True, help="number of scenes")
    parser.add_argument("--seed", type=int, default=0, help="each split needs its own")
    parser.add_argument("--size", type=int, default=128, help="side of the images in pixels")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that render")
    parser.add_argument("--overwrite", action="store_true", help="replace a split made from other settings")
    parser.add_argument("--world", choices=WORLDS, default="varied", help="what the settings below are when not given")
    for field in dataclasses.fields(SceneSettings):
        if field.default is False:
            parser.add_argument(f"--{field.name}", action="store_true", default=None, help="see SceneSettings")
        else:
            defaults = ", ".join(f"{getattr(world, field.name)} ({name})" for name, world in WORLDS.items())
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
