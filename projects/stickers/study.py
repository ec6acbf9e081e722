"""The paper's tables at small scale, on scenes of things; writes docs/results_stickers.md, its plots and its JSON.

    python -m projects.stickers.study --assets package/assets --checkpoint runs/stickers_4 \
        --segmenter runs/stickers_segmenter

projects/common/study has the study itself, and projects/stickers/README.md says how to get the pictures.
"""

from collections.abc import Sequence
from pathlib import Path

from projects.common.study.command import Defaults, study_parser
from projects.common.study.command import main as run
from projects.common.study.rows import Goals, Subject
from projects.stickers.render import find_world
from projects.stickers.worlds import WORLDS

DEFAULTS = Defaults("checkpoints/stickers", "checkpoints/stickers_segmenter", "runs/stickers_study", 128)


def find_subject(assets: Path) -> Subject:
    """The study of the things whose pictures are in a folder; InputError if one is missing or cannot be read."""
    return Subject(
        find_world(assets),
        WORLDS["book"],
        attributes=("colour",),
        most=8,
        confusable="Neighbours are the same thing in different colours.",
        goals=Goals(box_AP50=0.8, colour=0.85, found=0.85, point=0.75, scribble=0.75, mask_IoU=0.6),
        page="results_stickers",
    )


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = study_parser("projects.stickers.study", DEFAULTS)
    parser.add_argument("--assets", type=Path, required=True, help="folder with the pictures of Fluent emoji")
    run(parser, argv, lambda args: find_subject(args.assets))


if __name__ == "__main__":
    main()
