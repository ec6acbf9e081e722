"""Where the small model and the layouts that come with the project are: in a clone, or in the installed wheel."""

from pathlib import Path

_CLONE = Path(__file__).resolve().parent.parent.parent
_WHEEL = Path(__file__).resolve().parent.parent / "box"


def default_checkpoint() -> Path:
    """The checkpoint folder of the small model."""
    return _find("checkpoints/shapes")


def default_layouts() -> Path:
    """The folder of layouts for the small model."""
    return _find("examples/shapes")


def _find(name: str) -> Path:
    return next((root / name for root in (_CLONE, _WHEEL) if (root / name).is_dir()), _CLONE / name)
