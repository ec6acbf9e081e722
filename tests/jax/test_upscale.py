"""The second pass equals img2img of the enlarged image with the same layout; tiles and TAESD leave latents alone."""

import numpy as np
import pytest
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from instdiff_jax import Pipeline
from instdiff_jax.errors import InputError
from instdiff_jax.sampling.upscale import enlarge

FAST = dict(steps=2, sampler="ddim", mis=0.0, alpha=1.0, guidance_scale=1.0)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    return Pipeline.from_checkpoint(make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint"), max_rows=1)


def test_the_second_pass_is_img2img_of_the_enlarged_image(pipeline):
    layouts, seen = [make_layout(1, "a"), make_layout(2, "b")], []
    options = dict(upscale=2, upscale_strength=0.5, progress=lambda done, total: seen.append((done, total)))
    large = pipeline(layouts, seeds=[5, 6], **FAST, **options)
    small = pipeline(layouts, seeds=[5, 6], **FAST)
    assert [(result.seed, result.layout.name) for result in large] == [(5, "a"), (6, "a"), (5, "b"), (6, "b")]
    for one, result in zip(small, large, strict=True):
        start = enlarge(one.array, 64, 64)
        (expected,) = pipeline(one.layout, seeds=one.seed, width=64, height=64, init_image=start, strength=0.5, **FAST)
        np.testing.assert_array_equal(result.array, expected.array)
        assert result.array.shape == (64, 64, 3)
    assert seen[-1] == (12, 12) and {total for _, total in seen} == {12}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_bad_second_passes_are_named(pipeline):
    layout = make_layout(1)
    image, mask = np.zeros((32, 32, 3), np.uint8), np.ones((32, 32), bool)
    for options, message in (
        (dict(upscale=1), "upscale: expected a number above 1 and at most 4, got 1"),
        (dict(upscale=5.0), "upscale: expected a number above 1"),
        (dict(upscale=2, upscale_strength=0), "upscale_strength: expected a fraction above 0"),
        (dict(upscale=2, init_image=image, inpaint_mask=mask), "upscale: expected no inpaint_mask"),
    ):
        with pytest.raises(InputError, match=message):
            pipeline(layout, **FAST, **options)


def test_tiles_change_pixels_only(pipeline):
    (whole,) = pipeline(make_layout(1), width=64, height=64, **FAST)
    (tiled,) = pipeline.with_decoder(tile=32)(make_layout(1), width=64, height=64, **FAST)
    np.testing.assert_array_equal(tiled.latents, whole.latents)
    assert tiled.array.shape == whole.array.shape and (tiled.array != whole.array).any()
    (same,) = pipeline.with_decoder(tile=64)(make_layout(1), width=64, height=64, **FAST)
    np.testing.assert_array_equal(same.array, whole.array)
