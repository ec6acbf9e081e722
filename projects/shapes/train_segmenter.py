"""Trains the detector of shapes, textures and colours (`projects/common/train_segmenter.py`) on rendered scenes.

python -m projects.shapes.train_segmenter --output checkpoints/shapes_segmenter --world calm
"""

from collections.abc import Sequence

from projects.common.segmentation_network import Classes, SegmenterConfig
from projects.common.train_segmenter import run, training_parser
from projects.shapes.drawing import COLOURS, SHAPES, TEXTURES
from projects.shapes.render import WORLD
from projects.shapes.worlds import WORLDS

CLASSES: Classes = (("shape", SHAPES), ("colour", tuple(COLOURS)), ("texture", TEXTURES))


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = training_parser("projects.shapes.train_segmenter", WORLDS, 64)
    run(parser, argv, WORLDS, SegmenterConfig(CLASSES), lambda args: WORLD)


if __name__ == "__main__":
    main()
