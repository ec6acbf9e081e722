"""What a run checks between steps: the validation loss, and images of a few layouts."""

import logging
from pathlib import Path

import jax
import numpy as np
from jaxtyping import UInt8

from instdiff_jax.copies import local_copy
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.errors import InputError, NotFiniteError
from instdiff_jax.files import json_files
from instdiff_jax.layout import Layout
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.parallel.mesh import REPLICATED
from instdiff_jax.sampling.outputs import write_image
from instdiff_jax.sampling.pipeline import Pipeline
from instdiff_jax.sampling.visualize import contact_sheet, draw_layout, enlarge
from instdiff_jax.training.inputs import Inputs, on_one_device
from instdiff_jax.training.settings import RunSettings
from instdiff_jax.training.state import Params, ShardingPlan, TrainState, merge_params
from instdiff_jax.training.step import make_validation_step

_logger = logging.getLogger(__name__)


def check_validation(run: RunSettings) -> None:
    """Raises InputError if the validation split or the sample layouts are missing. Call before any long work."""
    if validates(run):
        InstanceDataset(run.data.dir, run.data.validation_split)
    if run.train.sample_every:
        read_sample_layouts(run)


def validates(run: RunSettings) -> bool:
    """Whether the run has a validation loss."""
    return bool(run.train.validate_every and run.data.validation_split)


class Validation:
    """The mean loss over the validation split's first batches, always with the same noise and timesteps."""

    def __init__(self, inputs: Inputs):
        """Loads the batches."""
        run, self._plan = inputs.run, inputs.plan
        self._step = jax.jit(make_validation_step(run.model, run.train, self._plan))
        self._batches, self._put = inputs.validation_batches(), inputs.put

    def loss(self, state: TrainState, frozen: Params) -> float:
        replicated = jax.NamedSharding(self._plan.mesh, REPLICATED)
        losses = [
            self._step(state.params, frozen, self._put(batch), jax.device_put(np.int32(i), replicated))
            for i, batch in enumerate(self._batches)
        ]
        return float(np.mean(jax.device_get(losses)))


def read_sample_layouts(run: RunSettings) -> list[Layout]:
    """The layouts of the sample grids. Raises InputError if there are none, or the run cannot sample them."""
    if run.train.task != "diffusion" or not run.train.grounding:
        raise InputError("config.train.sample_every: only runs with grounding draw samples; expected 0")
    folder = local_copy(run.train.sample_layouts, lambda name: name.endswith(".json"))
    files = json_files(folder)[: run.train.sample_count]
    if not files:
        raise InputError(f"config.train.sample_layouts: {folder}: expected a folder of layouts")
    return [Layout.from_json(file) for file in files]


class SampleGrid:
    """Generates images of a few layouts with the averaged parameters; writes them to WORKDIR/samples/STEP.png."""

    def __init__(self, run: RunSettings, plan: ShardingPlan, workdir: Path, tokenizer: Tokenizer):
        """Reads the layouts."""
        self._run, self._plan, self._folder, self._tokenizer = run, plan, workdir / "samples", tokenizer
        self._layouts = read_sample_layouts(run)

    def draw(self, step: int, state: TrainState, frozen: Params) -> UInt8[np.ndarray, "H W 3"] | None:
        """Returns the grid on process 0; None on the others, or if the images are not finite.

        Every process must call it, because it gathers parameters.
        """
        params = on_one_device(merge_params(state.optimizer.ema, frozen), self._plan)
        if jax.process_index() != 0:
            return None
        run, size = self._run, self._run.data.examples.image_size
        pipeline = Pipeline(run.model, run.sampling, params, self._tokenizer, run.train.dtype)
        try:
            results = pipeline(self._layouts, seeds=[0], width=size, height=size)
        except NotFiniteError as error:  # does not end the run
            _logger.warning("no samples of step %d: %s", step, error)
            return None
        pairs = [(result.layout, enlarge(result.array)) for result in results]
        sheet = contact_sheet([image for pair in pairs for image in (draw_layout(*pair), pair[1])])
        write_image(self._folder / f"{step:08d}.png", sheet)
        return sheet
