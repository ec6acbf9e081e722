"""Making an evaluation's pictures: layouts' own seeds, what the formats give, and what a run that was cut off leaves."""

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from common import relative_error
from instdiff_jax import Pipeline
from instdiff_jax.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """The programs here run for milliseconds and compile for seconds."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.fixture(scope="module")
def pipeline(checkpoint):
    return Pipeline.from_checkpoint(checkpoint)


# ---------------------------------------------------------------- layouts' own seeds


def test_layouts_with_seeds_of_their_own(pipeline):
    layouts = [make_layout(2, "a"), make_layout(3, "b", seed=1)]
    together = pipeline(layouts, layout_seeds=[8, 5])
    assert [(result.layout.name, result.seed) for result in together] == [("a", 8), ("b", 5)]
    for layout, seed, result in zip(layouts, [8, 5], together, strict=True):
        alone = pipeline([layout], seeds=[seed])[0]
        assert relative_error(result.latents, alone.latents) <= 1e-4
        assert np.abs(result.image.astype(int) - alone.image).max() <= 1
    other = pipeline(layouts[:1], layout_seeds=[5])[0]
    assert relative_error(other.latents, together[0].latents) > 1e-2


def test_wrong_seeds_of_layouts(pipeline):
    with pytest.raises(InputError, match="layout_seeds: expected one for each of 1 layouts, got 2"):
        pipeline([make_layout(1)], layout_seeds=[1, 2])
    with pytest.raises(InputError, match="seed: expected a whole number"):
        pipeline([make_layout(1)], layout_seeds=[-1])
