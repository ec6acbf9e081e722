"""Renders random scenes of things into a folder in COCO's format.

    npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz
    python -m projects.stickers.render --assets package/assets --output stickers --split train --count 30000 --seed 0
    python -m projects.stickers.render --assets package/assets --output stickers --split val --count 500 --seed 1
    python -m instdiff_jax build-coco --coco_dir stickers --data_dir datasets/stickers \
        --instance_captions stickers/annotations/instance_captions.json

The first line gets Microsoft's Fluent emoji (MIT licence) as pictures of 256 pixels. The attributes of things that can
be recoloured are {colour}; those of others are empty. `projects/common/coco_folder.py` describes the folder. Captions
say left and right, so train without flips (`flip=0`).
"""

import functools
from collections.abc import Sequence
from pathlib import Path

from instdiff_jax.errors import exit_on_input_error
from projects.common.coco_folder import Picture, Row, World, chosen_settings, render_parser, write_split
from projects.stickers.pictures import Pictures
from projects.stickers.scenes import check_scene, render_scene
from projects.stickers.things import NAMES
from projects.stickers.worlds import WORLDS, SceneSettings


def write_coco(
    assets: str | Path,
    directory: str | Path,
    split: str,
    scenes: tuple[int, int, int],
    settings: SceneSettings = SceneSettings(),
    workers: int = 1,
    overwrite: bool = False,
) -> bool:
    """Writes scenes as one split; see `write_split`, which has its arguments and errors. `assets` has the pictures."""
    check_scene(scenes[1], 0, scenes[2], settings)
    return write_split(directory, split, find_world(assets), scenes, settings, workers, overwrite)


def find_world(assets: str | Path) -> World:
    """The world of the pictures in a folder; InputError if one is missing or cannot be read."""
    Pictures.from_folder(assets)
    return World("stickers", "thing", NAMES, functools.partial(_render, str(assets)))


@functools.cache
def _pictures(assets: str) -> Pictures:
    """Opened once by each process that renders."""
    return Pictures.from_folder(assets)


def _render(assets: str, seed: int, index: int, size: int, settings: SceneSettings) -> Picture:
    scene = render_scene(_pictures(assets), seed, index, size, settings)
    rows = [
        Row(item.name, item.caption, item.box, item.mask, {} if item.colour is None else {"colour": item.colour})
        for item in scene.instances
    ]
    return Picture(scene.image, scene.background, rows, scene.captions)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = render_parser(
        "python -m projects.stickers.render", "Render scenes of things as a COCO folder", WORLDS, 128
    )
    parser.add_argument("--assets", type=Path, required=True, help="folder with the pictures of Fluent emoji")
    args = vars(parser.parse_args(argv))
    made = write_coco(
        args["assets"],
        args["output"],
        args["split"],
        (args["count"], args["seed"], args["size"]),
        chosen_settings(args, WORLDS),
        workers=args["workers"] if args["count"] >= 500 else 1,
        overwrite=args["overwrite"],
    )
    print(f"{'written' if made else 'already there'}: {args['output']}, split {args['split']}, {args['count']} scenes")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
