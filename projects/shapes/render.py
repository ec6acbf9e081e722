"""Renders random scenes of shapes into a folder in COCO's format.

    python -m projects.shapes.render --output shapes --split train --count 20000 --seed 0 --size 128
    python -m projects.shapes.render --output shapes --split val --count 1000 --seed 1 --size 128
    python -m instdiff_jax build-coco --coco_dir shapes --data_dir datasets/shapes \
        --instance_captions shapes/annotations/instance_captions.json

Each instance's `attributes` are {colour, texture}; `inside` is the host of a part. `projects/common/coco_folder.py`
describes the folder. Captions may say left and right, so train without flips (`flip=0`).
"""

from collections.abc import Sequence
from pathlib import Path

from instdiff_jax.errors import exit_on_input_error
from projects.common.coco_folder import Picture, Row, World, chosen_settings, render_parser, write_split
from projects.shapes.drawing import SHAPES
from projects.shapes.scenes import check_scene, render_scene
from projects.shapes.worlds import WORLDS, SceneSettings


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
    """Writes scenes 0 to count - 1 of a seed as one split; see `write_split`, which has its arguments and errors."""
    check_scene(seed, 0, size, settings)
    return write_split(directory, split, WORLD, (count, seed, size), settings, workers, overwrite)


def _render(seed: int, index: int, size: int, settings: SceneSettings) -> Picture:
    scene = render_scene(seed, index, size, settings)
    rows = [
        Row(
            item.shape, item.caption, item.box, item.mask, {"colour": item.colour, "texture": item.texture}, item.inside
        )
        for item in scene.instances
    ]
    return Picture(scene.image, scene.background, rows, scene.captions)


WORLD = World("shapes", "shape", SHAPES, _render)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = render_parser("python -m projects.shapes.render", "Render scenes of shapes as a COCO folder", WORLDS, 128)
    args = vars(parser.parse_args(argv))
    made = write_coco(
        args["output"],
        args["split"],
        args["count"],
        args["seed"],
        args["size"],
        chosen_settings(args, WORLDS),
        workers=args["workers"] if args["count"] >= 500 else 1,
        overwrite=args["overwrite"],
    )
    print(f"{'written' if made else 'already there'}: {args['output']}, split {args['split']}, {args['count']} scenes")


if __name__ == "__main__":
    with exit_on_input_error():
        main()
