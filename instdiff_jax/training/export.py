"""Makes a checkpoint folder from a training run."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint import run
from instdiff_jax.checkpoint.diffusers_write import check_diffusers_output, save_diffusers
from instdiff_jax.checkpoint.folder import check_output, save_folder
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.training.settings import TrainSettings


def read_run(workdir: Path) -> tuple[ModelConfig, SamplingConfig, TrainSettings]:
    """Reads the settings in a run's config.json.

    Raises:
        InputError: if the folder is not a run's.
    """
    found = run.read_run(workdir)
    return found.model, found.sampling, TrainSettings.from_dict(found.train, f"{workdir / 'config.json'}: train")


def export(
    workdir: Path, output: Path, step: int | None = None, overwrite: bool = False, dtype: str = "float32"
) -> int:
    """Writes a checkpoint folder with a run's averaged parameters.

    Args:
        workdir: the run's folder.
        output: the checkpoint folder.
        step: the checkpoint's step; None for the newest.
        overwrite: replace a checkpoint folder at `output`.
        dtype: of the stored parameters.

    Returns:
        The step.

    Raises:
        InputError: if there is no such run or step, or `output` cannot be written.
    """
    check_output(output, overwrite)
    tokenizer = run.run_tokenizer(workdir)
    model, sampling, params, step = _load(workdir, step, dtype)
    save_folder(output, params, model, sampling, tokenizer, run.absent_groups(params), overwrite)
    return step


def export_to_diffusers(workdir: Path, output: Path, step: int | None = None, dtype: str = "float32") -> int:
    """Writes a folder that diffusers loads, see `checkpoint.diffusers_write`; arguments and errors as `export`'s."""
    check_diffusers_output(output, run.read_run(workdir).model)
    tokenizer = run.run_tokenizer(workdir)
    model, _, params, step = _load(workdir, step, dtype)
    save_diffusers(output, params, model, tokenizer)
    return step


def _load(workdir: Path, step: int | None, dtype: str) -> tuple[ModelConfig, SamplingConfig, dict[str, Any], int]:
    model, sampling, params, step = run.load_run(workdir, step)
    return model, sampling, jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params), step
