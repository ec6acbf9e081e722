"""UniFusion against the official code's tokens."""

import jax
import numpy as np
import pytest
from parity_checks import grounding_tokens, params_of

import common
from instdiff_jax.models.unifusion import UniFusion


@pytest.fixture(scope="module")
def inputs():
    return common.parity("unifusion_mask")


@pytest.mark.parametrize("check", params_of("unifusion_box", "unifusion_mask", "unifusion_point", "unifusion_scribble"))
def test_tokens_equal_the_official_ones(check):
    assert check.measure() <= check.tolerance


def test_trunk_is_not_in_the_program_without_maps(inputs):
    model = UniFusion(common.model_config("small").unifusion)
    params = {"params": common.model_params("small", "unifusion")}
    grounding = common.grounding_arrays(inputs)
    programs = (jax.make_jaxpr(lambda g: model.apply(params, g, use))(grounding) for use in (True, False))
    with_trunk, without = map(str, programs)
    assert "conv_general_dilated" in with_trunk
    assert "conv_general_dilated" not in without


def test_every_slot_keeps_its_own_formats(inputs):
    """A slot's tokens depend on its own has_* alone."""
    grounding = common.grounding_arrays(inputs, common.DROPPED["box"])
    full = grounding_tokens(grounding, "small")
    mixed = {key: value.copy() for key, value in grounding.items()}
    mixed["has_box"][0, 1] = 0
    changed = np.abs(grounding_tokens(mixed, "small") - full).max(-1)[0] > 0
    assert changed[1] and changed.sum() == 1


@pytest.mark.parametrize("slots", (2, 7, 29))
def test_slots_that_are_left_out_are_empty(inputs, slots):
    """Tokens and gradients from the first slots alone are those of all 30, where the others hold nothing."""
    full = common.grounding_arrays(inputs)
    short = {key: value if key in ("maps", "has_map") else value[:, :slots] for key, value in full.items()}
    for key, value in full.items():
        if key not in ("maps", "has_map"):
            value[:, slots:] = 0
    model, params = UniFusion(common.model_config("small").unifusion), common.model_params("small", "unifusion")
    weights = np.random.default_rng(0).standard_normal((1, 184, 768), np.float32)

    def run(params, grounding):
        tokens = model.apply({"params": params}, grounding, False)
        return (tokens * weights).sum(), tokens

    (_, expected), expected_grads = jax.value_and_grad(run, has_aux=True)(params, full)
    (_, tokens), grads = jax.value_and_grad(run, has_aux=True)(params, short)
    assert common.relative_error(tokens, expected) <= 1e-6
    for got, wanted in zip(jax.tree.leaves(grads), jax.tree.leaves(expected_grads), strict=True):
        assert np.abs(got - wanted).max() <= 1e-5 * np.abs(wanted).max()


def test_small_map_sizes():
    """64 map tokens whatever the side of the maps is."""
    import dataclasses

    config = dataclasses.replace(
        common.model_config("small").unifusion, trunk_depths=(1, 1, 1, 1), trunk_dims=(8, 16, 32, 64), map_size=128
    )
    null = common.null_grounding_arrays(common.grounding_arrays(common.parity("unifusion_mask")))
    null["maps"] = np.ones((1, 128, 128), np.uint32)
    null["has_map"] = np.ones(1, np.float32)
    model = UniFusion(config)
    assert model.init_with_output(jax.random.key(0), null)[0].shape == (1, 184, 768)
