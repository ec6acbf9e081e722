"""Weights & Biases beside TensorBoard: the same numbers and images, in a run that goes on where it was resumed."""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from instdiff_jax.errors import InputError
from instdiff_jax.files import write_text

_ID = "wandb_id"


def load_wandb() -> Any:
    """The wandb package.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import wandb
    except ImportError as error:
        message = "config.train.wandb: Weights & Biases needs its package; pip install 'instdiff_jax[wandb]'"
        raise InputError(message) from error
    return wandb


def check_wandb(project: str) -> None:
    """Raises InputError if there is a project to log to and the package is not installed."""
    if project:
        load_wandb()


class WandbRun:
    """A run on Weights & Biases, or in files where the environment has WANDB_MODE=offline.

    Args:
        project: its name there.
        workdir: the run's folder; the file `wandb_id` in it ties the two together.
        config: the run's settings.
    """

    def __init__(self, project: str, workdir: Path, config: Mapping[str, Any]):
        self._wandb = load_wandb()
        path = workdir / _ID
        if not path.exists():
            write_text(path, uuid.uuid4().hex[:8])
        folder = None if "://" in str(workdir) else str(workdir)
        name = path.read_text(encoding="utf-8").strip()
        self._run = self._wandb.init(
            project=project, id=name, name=workdir.name, resume="allow", dir=folder, config=dict(config)
        )
        # Steps that a resumed run does again come a second time, which wandb's own step counter would refuse.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Logs a step's numbers."""
        self._run.log({"step": step} | dict(numbers))

    def image(self, step: int, name: str, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Logs an image."""
        self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        """Ends the run once all is sent."""
        self._run.finish()
