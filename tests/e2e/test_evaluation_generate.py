"""Making an evaluation's pictures: layouts' own seeds, what the formats give, and parts switched off."""

import dataclasses

import numpy as np
import pytest
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from common import relative_error
from instdiff_jax import Pipeline
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation import layouts
from instdiff_jax.evaluation.split import read_split
from projects.shapes.render import write_coco
from projects.shapes.worlds import SceneSettings

pytestmark = pytest.mark.usefixtures("quick_compilation")


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
        assert np.abs(result.array.astype(int) - alone.array).max() <= 1
    other = pipeline(layouts[:1], layout_seeds=[5])[0]
    assert relative_error(other.latents, together[0].latents) > 1e-2


def test_wrong_seeds_of_layouts(pipeline):
    with pytest.raises(InputError, match="layout_seeds: expected one for each of 1 layouts, got 2"):
        pipeline([make_layout(1)], layout_seeds=[1, 2])
    with pytest.raises(InputError, match="seed: expected a whole number"):
        pipeline([make_layout(1)], layout_seeds=[-1])


# ---------------------------------------------------------------- what layouts hold


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    folder = tmp_path_factory.mktemp("scenes")
    write_coco(folder, "val", 1, 55, 64, SceneSettings(min_instances=6, max_instances=6))
    return read_split(folder, "val").scenes[0]


def places(instance):
    names = ("box", "mask", "scribble", "point")
    return tuple(name for name in names if getattr(instance, name) is not None)


@pytest.mark.parametrize(
    "format, held",
    [
        ("box", ("box",)),
        ("mask", ("box", "mask")),
        ("scribble", ("scribble",)),
        ("point", ("point",)),
        ("auto", ("box", "mask", "scribble")),
    ],
)
def test_layouts_hold_one_format(scene, format, held):
    layout = layouts.make_layout(scene, format)
    assert [places(instance) for instance in layout.instances] == [held] * len(scene.asked)
    assert [instance.caption for instance in layout.instances] == [target.caption for target in scene.asked]


def test_mixed_layouts_give_each_format_in_turn(scene):
    """Another one first in every image, so that what stands behind is not always a box."""
    order = [("box",), ("box", "mask"), ("scribble",), ("point",)]
    for image_id in range(4):
        layout = layouts.make_layout(dataclasses.replace(scene, image_id=image_id), "mixed")
        expected = [order[(i + image_id) % 4] for i in range(len(scene.asked))]
        assert [places(instance) for instance in layout.instances] == expected
    with pytest.raises(InputError, match="format: expected one of auto, box, "):
        layouts.make_layout(scene, "boxes")


# ---------------------------------------------------------------- parts switched off


def test_parts_switched_off(pipeline):
    """Each part changes the picture, and the pipeline that was asked is as before."""
    layouts = [make_layout(2)]
    whole = pipeline(layouts)[0]
    for other in (pipeline.without_scaleu()(layouts)[0], pipeline(layouts, drop=("box",))[0]):
        assert relative_error(other.latents, whole.latents) > 1e-4
    # Twice off is off; and a box layout has no scribble to lose.
    off = pipeline.without_scaleu()
    assert np.array_equal(off(layouts)[0].latents, off.without_scaleu()(layouts)[0].latents)
    assert np.array_equal(pipeline(layouts, drop=("scribble",))[0].latents, whole.latents)
