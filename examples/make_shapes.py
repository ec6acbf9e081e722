"""Writes examples/shapes/: layouts for the small model (checkpoints/shapes), on its canvas of 64x64 pixels.

    python examples/make_shapes.py

Most boxes are written by hand. The other layouts come from rendered scenes (`projects.common.layouts`) that the model
has not seen.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "shapes"
sys.path.insert(0, str(FOLDER.parents[1]))

from projects.common import layouts  # noqa: E402
from projects.common.layouts import Described, Named, boxes, write_layouts  # noqa: E402
from projects.shapes.render import WORLD  # noqa: E402
from projects.shapes.worlds import WORLDS  # noqa: E402

SIDE = 64
GREY = "on a grey background"


def scene(index: int, formats: str, **settings: Any) -> Described:
    """A rendered scene; `settings` change those of the world that the model has seen."""
    return layouts.scene(WORLD, index, SIDE, dataclasses.replace(WORLDS["calm"], **settings), formats)


def box_layouts() -> Named:
    """Layouts of boxes."""
    colours = ("black", "white", "red", "green", "yellow", "blue", "pink", "purple")
    shapes = ("circle", "star", "heart", "square", "triangle", "ring", "hexagon", "cross")
    eight = [
        (f"a {colour} {shape}", 1 + 16 * (i % 4), 9 + 26 * (i // 4), 14, 18)
        for i, (colour, shape) in enumerate(zip(colours, shapes, strict=True))
    ]
    named = " and ".join([", ".join(name for name, *_ in eight[:-1]), eight[-1][0]])
    return {
        "boxes_eight_colours": (f"{named} {GREY}", boxes(*eight)),
        "boxes_pair": (
            "a red striped heart and a blue dotted star on a beige background",
            boxes(("a red striped heart", 4, 18, 26, 26), ("a blue dotted star", 35, 20, 25, 25)),
        ),
        "boxes_same_shape": (
            f"a red striped circle, a blue plain circle, a red plain circle and a blue striped circle {GREY}",
            boxes(
                ("a red striped circle", 6, 6, 22, 22),
                ("a blue circle", 36, 6, 22, 22),
                ("a red circle", 6, 36, 22, 22),
                ("a blue striped circle", 36, 36, 22, 22),
            ),
        ),
        "parts": (
            f"a large white circle with a red heart inside and a yellow square with a black star inside {GREY}",
            boxes(
                ("a white circle", 2, 4, 34, 34),
                ("a red heart", 12, 14, 14, 14),
                ("a yellow square", 34, 32, 28, 28),
                ("a black star", 41, 39, 14, 14),
            ),
        ),
    }


def scene_layouts() -> Named:
    """Layouts of rendered scenes, in every format."""
    return {
        "boxes_dense": scene(1, "b", min_instances=10, max_instances=10),
        "masks": scene(2, "m", min_instances=4, max_instances=4, max_hidden=0.0),
        "masks_large": scene(3, "m", min_instances=2, max_instances=2, min_side=0.35),
        "scribbles": scene(4, "s", min_instances=3, max_instances=3, max_hidden=0.0),
        "points": scene(8, "p", min_instances=4, max_instances=4, max_hidden=0.0),
        "mixed": scene(6, "bmsp", min_instances=4, max_instances=4, max_hidden=0.0),
    }


def series_layouts() -> Named:
    """A series in which each layout changes one thing of the one before."""
    star, large = ("a yellow star", 5, 5, 20, 20), ("a yellow star", 2, 2, 32, 32)
    heart, moved = ("a red heart", 40, 17, 22, 20), ("a red heart", 37, 1, 22, 20)
    square, replaced = ("a blue striped square", 8, 36, 20, 20), ("a purple dotted circle", 8, 36, 20, 20)
    ring = ("a green ring", 38, 38, 20, 20)
    four = f"a yellow star, a red heart, a blue striped square and a green ring {GREY}"
    with_circle = f"yellow star, a red heart, a purple dotted circle and a green ring {GREY}"
    return {
        "series_1_two": (f"a yellow star and a red heart {GREY}", boxes(star, heart)),
        "series_2_add": (four, boxes(star, heart, square, ring)),
        "series_3_move": (four, boxes(star, moved, square, ring)),
        "series_4_replace": (f"a {with_circle}", boxes(star, moved, replaced, ring)),
        "series_5_resize": (f"a large {with_circle}", boxes(large, moved, replaced, ring)),
    }


def main() -> None:
    write_layouts(FOLDER, SIDE, box_layouts() | scene_layouts() | series_layouts())


if __name__ == "__main__":
    main()
