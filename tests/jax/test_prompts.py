"""Weights, long captions and layouts' negative prompts in sampling; what is off or not in a caption changes nothing."""

import copy
import dataclasses

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from common import relative_error
from instdiff_jax import Pipeline
from instdiff_jax.sampling import programs

# One row at a time and the fusers always on: one program of the UNet does for nearly all of it.
FAST = dict(steps=1, sampler="ddim", mis=0.0, alpha=1.0, guidance_scale=3.0)
LONG = "a red bird and a small dog beside the old house " * 12  # two parts


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")
    return Pipeline.from_checkpoint(folder, max_rows=1)


def captioned(layout, caption, **changes):
    return dataclasses.replace(layout, caption=caption, **changes)


def latents(pipeline, layouts, **options):
    return [result.latents for result in pipeline(layouts, seeds=3, **FAST, **options)]


def test_weights_change_the_picture_and_none_does_not(pipeline):
    layout = make_layout(1)
    plain, marked = captioned(layout, "a red bird on a rock"), captioned(layout, "a (red bird:1.6) on a rock")
    (off,), (on,) = (latents(pipeline, plain, prompt_weights=value) for value in (False, True))
    np.testing.assert_array_equal(on, off)
    (weighted,) = latents(pipeline, marked, prompt_weights=True)
    assert relative_error(weighted, off) > 1e-3
    (one,) = latents(pipeline, captioned(layout, "a (red bird:1.0) on a rock"), prompt_weights=True)
    np.testing.assert_array_equal(one, off)


def test_a_weighted_text_keeps_its_mean():
    rng = np.random.default_rng(0)
    hidden, weights = rng.normal(0.1, 1, (4, 7, 5)).astype(np.float32), np.ones((3, 7), np.float32)
    weights[0, 2:4] = 1.5
    found = np.asarray(programs.weigh_texts(jax.numpy.asarray(hidden), weights, None))
    np.testing.assert_array_equal(found[1:], hidden[1:])
    product = hidden[0] * weights[0][:, None]
    np.testing.assert_allclose(found[0], product * (hidden[0].mean() / product.mean()), rtol=1e-5)
    assert abs(found[0].mean() / hidden[0].mean() - 1) < 1e-5


def test_long_captions_count_and_do_not_touch_others(pipeline):
    short, long = make_layout(1, "short"), captioned(make_layout(1, "long", seed=1), LONG)
    (alone,) = latents(pipeline, short)
    (same,) = latents(pipeline, short, long_prompts=True)
    np.testing.assert_array_equal(same, alone)
    pipeline = copy.copy(pipeline)
    pipeline.limits = dataclasses.replace(pipeline.limits, max_rows=2)
    beside, whole = latents(pipeline, [short, long], long_prompts=True)
    assert relative_error(beside, alone) <= 1e-5
    (cut,) = latents(pipeline, long)
    assert relative_error(whole, cut) > 1e-4
    # Only its end differs, which is in the second part.
    other = latents(pipeline, [short, captioned(long, LONG[:-40] + "yellow horse")], long_prompts=True)[1]
    assert relative_error(other, whole) > 1e-4


def test_each_layouts_own_negative_prompt(pipeline):
    layout = make_layout(1)
    own = captioned(layout, layout.caption, negative_prompt="a blue square")
    (given,) = latents(pipeline, layout, negative_prompt="a blue square")
    empty, first, second = latents(pipeline, [layout, own, captioned(own, own.caption, negative_prompt="")])
    assert relative_error(first, given) <= 1e-5 and relative_error(first, empty) > 1e-3
    assert relative_error(second, empty) <= 1e-5
    (over,) = latents(pipeline, own, negative_prompt="a cat")
    assert relative_error(over, given) <= 1e-5
