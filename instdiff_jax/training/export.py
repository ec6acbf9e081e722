"""Makes a checkpoint folder from a training run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint import run
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
    model, sampling, params, step = run.load_run(workdir, step)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)
    save_folder(output, params, model, sampling, tokenizer, run.absent_groups(params), overwrite)
    return step
