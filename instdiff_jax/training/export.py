"""Makes a checkpoint folder, with the averaged parameters, from a training run.

python -m instdiff_jax export --workdir DIR --output DIR [--step N] [--dtype float16] [--overwrite]
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint.folder import check_output, find_tokenizer, read_config, save_folder
from instdiff_jax.config import ModelConfig, SamplingConfig
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.training.checkpoints import FOLDER, Checkpoints
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.start import base_fingerprint, start_params
from instdiff_jax.training.state import make_layout, merge_params
from instdiff_jax.tree import flatten


def read_run(workdir: Path) -> tuple[ModelConfig, SamplingConfig, TrainSettings]:
    """What a run's config.json says.

    Raises:
        InputError: for a folder that is no run's.
    """
    path = workdir / "config.json"
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        model, sampling, train = groups["model"], groups["sampling"], groups["train"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path}: expected the config of a training run ({type(error).__name__})") from error
    if not (workdir / FOLDER).is_dir():
        raise InputError(f"{workdir / FOLDER}: expected the checkpoints of a training run")
    return (
        ModelConfig.from_dict(model, f"{path}: model"),
        SamplingConfig.from_dict(sampling, f"{path}: sampling"),
        TrainSettings.from_dict(train, f"{path}: train"),
    )


def load_run(workdir: Path, step: int | None = None) -> tuple[ModelConfig, SamplingConfig, dict[str, Any], int]:
    """A run's model with the averaged parameters of one step (None: the newest), in float32 on one device.

    Returns:
        The model's sizes, the sampling defaults, the whole parameter tree and the step.

    Raises:
        InputError: for a folder that is no run's, a step that is not there, or a base checkpoint that has changed.
    """
    model, sampling, settings = read_run(workdir)
    # Frozen parameters as the base holds them, not as the run rounded them.
    settings = dataclasses.replace(settings, dtype="float32")
    alone = ParallelSettings(data=1, fsdp=1)
    layout = make_layout(model, settings, alone, make_mesh(alone, jax.local_devices()[:1]))
    checkpoints = Checkpoints(workdir, {}, read_only=True)
    step, state, facts = checkpoints.restore_at(step, layout.state_shapes())
    checkpoints.close()
    if facts["base_fingerprint"] != base_fingerprint(settings, model):
        raise InputError(f"{settings.start}: changed since the run in {workdir} started from it (fingerprint)")
    _, frozen = start_params(layout, model, settings, only_frozen=True)
    return model, sampling, merge_params(state.optimizer.ema, frozen), step


def run_tokenizer(workdir: Path) -> Path:
    """The folder of a run's tokenizer: its base's, else the one that its config names."""
    model, _, settings = read_run(workdir)
    text = read_config(settings.start)[0].text_encoder if settings.start else model.text_encoder
    return find_tokenizer(text.tokenizer, text.vocab_size)


def absent_groups(params: dict[str, Any]) -> tuple[str, ...]:
    """Which adapters a tree lacks: a run on captions alone has neither fusers nor UniFusion."""
    has_fusers = any("fuser" in path for path in flatten(params["unet"]))
    return (() if has_fusers else ("fusers",)) + (() if "unifusion" in params else ("unifusion", "trunk"))


def export(
    workdir: Path, output: Path, step: int | None = None, overwrite: bool = False, dtype: str = "float32"
) -> int:
    """Writes the checkpoint folder, its parameters stored as `dtype`; returns the step it is of."""
    check_output(output, overwrite)
    tokenizer = run_tokenizer(workdir)
    model, sampling, params, step = load_run(workdir, step)
    params = jax.tree.map(lambda leaf: np.asarray(leaf).astype(jnp.dtype(dtype)), params)
    save_folder(output, params, model, sampling, tokenizer, absent_groups(params), overwrite)
    return step


def main(argv: Sequence[str] | None = None) -> None:
    parser = ArgumentParser(
        prog="python -m instdiff_jax export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--workdir", type=Path, required=True, help="the run's folder")
    parser.add_argument("--output", type=Path, required=True, help="the checkpoint folder to write")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--overwrite", action="store_true", help="replace a checkpoint folder at --output")
    parser.add_argument(
        "--dtype",
        default="float32",
        choices=("float32", "float16", "bfloat16"),
        help="how parameters are stored; 16 bits make half the folder",
    )
    with exit_on_input_error():
        args = parser.parse_args(sys.argv[1:] if argv is None else argv)
        try:
            step = export(args.workdir, args.output, args.step, args.overwrite, args.dtype)
        except OSError as error:
            raise InputError(f"{error.filename or args.output}: {error.strerror or error}") from error
        print(f"wrote {args.output}: the averaged parameters of step {step}")
