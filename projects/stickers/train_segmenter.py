"""Trains the detector of things and their colours (`projects/common/train_segmenter.py`) on rendered scenes.

    python -m projects.stickers.train_segmenter --assets package/assets --output runs/stickers_segmenter \
        --scenes 10000 --steps 6000 --dtype bfloat16

The evaluation reads it with `--detector segmenter:runs/stickers_segmenter`.
"""

from collections.abc import Sequence
from pathlib import Path

from projects.common.segmentation_network import Classes, SegmenterConfig
from projects.common.train_segmenter import run, training_parser
from projects.stickers.pictures import COLOURS
from projects.stickers.render import find_world
from projects.stickers.things import NAMES
from projects.stickers.worlds import WORLDS

CLASSES: Classes = (("thing", NAMES), ("colour", tuple(COLOURS)))
# One level more than for the shapes: things of 77 of 128 pixels. The maps have 64 pixels a side, as the shapes'.
CONFIG = SegmenterConfig(CLASSES, (24, 32, 48, 96, 128), outlines=False)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = training_parser("projects.stickers.train_segmenter", WORLDS, 128)
    parser.add_argument("--assets", type=Path, required=True, help="folder with the pictures of Fluent emoji")
    run(parser, argv, WORLDS, CONFIG, lambda args: find_world(args.assets))


if __name__ == "__main__":
    main()
