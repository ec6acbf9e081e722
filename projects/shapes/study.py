"""The paper's tables at small scale, on scenes of shapes; writes docs/results.md, its plots and results.json.

    python -m projects.shapes.study
    python -m projects.shapes.study --sections solvers --small_count 64 --into docs

The second command puts one table into the complete page. projects/common/study has the study itself.
"""

from collections.abc import Sequence

from projects.common.study.command import Defaults, study_parser
from projects.common.study.command import main as run
from projects.common.study.rows import Goals, Subject
from projects.shapes.render import WORLD
from projects.shapes.worlds import WORLDS

# The world in which the model was trained (configs/shapes.py).
SUBJECT = Subject(
    WORLD,
    WORLDS["calm"],
    attributes=("colour", "texture"),
    most=10,
    confusable="Neighbours have the same shape and swapped colours and textures.",
    goals=Goals(box_AP50=0.8, colour=0.9, found=None, point=0.85, scribble=0.85, mask_IoU=0.6),
)
DEFAULTS = Defaults("checkpoints/shapes", "checkpoints/shapes_segmenter", "runs/study", 64)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    run(study_parser("projects.shapes.study", DEFAULTS), argv, lambda args: SUBJECT)


if __name__ == "__main__":
    main()
