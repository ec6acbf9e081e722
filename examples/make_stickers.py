"""Writes examples/stickers/: layouts of things, on a canvas of 128x128 pixels.

    python examples/make_stickers.py --assets package/assets

Most boxes are written by hand. The other layouts come from rendered scenes (`projects.common.layouts`) that no
training has seen; projects/stickers/README.md says how to get their pictures.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "stickers"
sys.path.insert(0, str(FOLDER.parents[1]))

from instdiff_jax.errors import ArgumentParser, exit_on_input_error  # noqa: E402
from projects.common import layouts  # noqa: E402
from projects.common.coco_folder import World  # noqa: E402
from projects.common.layouts import Described, Named, boxes, write_layouts  # noqa: E402
from projects.stickers.render import find_world  # noqa: E402
from projects.stickers.worlds import WORLDS  # noqa: E402

SIDE = 128


def box_layouts() -> Named:
    """Layouts of boxes."""
    return {
        "boxes_pair": (
            "a penguin and a slice of pizza on a light table",
            boxes(("a penguin", 10, 40, 50, 52), ("a slice of pizza", 68, 46, 48, 52)),
        ),
        "boxes_sofa": (
            "a cactus and a blue sofa in a room with a lilac wall",
            boxes(("a blue sofa", 8, 48, 64, 62), ("a cactus", 80, 44, 42, 46)),
        ),
        "boxes_road": (
            "a red car, a yellow bus and a tree on grass under a blue sky",
            boxes(
                ("a red car facing left", 6, 78, 56, 40),
                ("a yellow bus facing right", 68, 76, 54, 44),
                ("a tree", 46, 16, 42, 50),
            ),
        ),
        "boxes_same_thing": (
            "a red balloon, a blue balloon, a yellow balloon and a green balloon on a cream background",
            boxes(
                ("a red balloon", 14, 8, 38, 53),
                ("a blue balloon", 76, 8, 38, 53),
                ("a yellow balloon", 14, 68, 38, 53),
                ("a green balloon", 76, 68, 38, 53),
            ),
        ),
        "boxes_snack": (
            "an owl, a hamburger, an ice cream and a bunch of grapes on a mint background",
            boxes(
                ("an owl", 44, 6, 38, 48),
                ("a hamburger", 6, 70, 50, 42),
                ("an ice cream", 92, 20, 32, 44),
                ("a bunch of grapes", 68, 74, 44, 48),
            ),
        ),
    }


def scene_layouts(world: World) -> Named:
    """Layouts of rendered scenes, in every format."""

    def scene(index: int, formats: str, count: int, **settings: Any) -> Described:
        changes = dict(min_instances=count, max_instances=count, **settings)
        return layouts.scene(world, index, SIDE, dataclasses.replace(WORLDS["book"], **changes), formats)

    return {
        "boxes_dense": scene(1, "b", 8),
        "masks": scene(2, "m", 4, max_hidden=0.0),
        "masks_large": scene(3, "m", 2, min_side=0.4),
        "scribbles": scene(4, "s", 3, max_hidden=0.0),
        "points": scene(5, "p", 3, max_hidden=0.0),
        "mixed": scene(6, "bmsp", 4, max_hidden=0.0),
    }


def series_layouts() -> Named:
    """A series in which each layout changes one thing of the one before."""
    dog, large = ("a dog", 12, 70, 42, 39), ("a dog", 6, 54, 60, 56)
    balloon, moved = ("a red balloon", 78, 10, 34, 47), ("a red balloon", 8, 5, 34, 47)
    cake, replaced = ("a cake", 76, 70, 42, 42), ("a blue teapot", 76, 74, 42, 38)
    apple = ("a green apple", 45, 14, 30, 29)
    place = "on the grass, under a blue sky"
    with_cake = f"a dog, a red balloon, a cake and a green apple {place}"
    with_teapot = f"a dog, a red balloon, a blue teapot and a green apple {place}"
    return {
        "series_1_two": (f"a dog and a red balloon {place}", boxes(dog, balloon)),
        "series_2_add": (with_cake, boxes(dog, balloon, cake, apple)),
        "series_3_move": (with_cake, boxes(dog, moved, cake, apple)),
        "series_4_replace": (with_teapot, boxes(dog, moved, replaced, apple)),
        "series_5_resize": (with_teapot, boxes(large, moved, replaced, apple)),
    }


def main() -> None:
    parser = ArgumentParser(
        prog="python examples/make_stickers.py", description="Write layouts of things", allow_abbrev=False
    )
    parser.add_argument("--assets", type=Path, required=True, help="folder with the pictures of Fluent emoji")
    with exit_on_input_error():
        world = find_world(parser.parse_args().assets)
        write_layouts(FOLDER, SIDE, box_layouts() | scene_layouts(world) | series_layouts())


if __name__ == "__main__":
    main()
