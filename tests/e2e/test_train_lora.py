"""examples/train_lora.py: a folder of PEFT that holds what was trained; it changes the style and not the places."""

import importlib.util

import jax
import numpy as np
import pytest

from common import ROOT
from instdiff_jax import Pipeline
from instdiff_jax.checkpoint.lora import Lora, merge_loras
from instdiff_jax.tree import flatten


@pytest.fixture(scope="module")
def example():
    spec = importlib.util.spec_from_file_location("train_lora", ROOT / "examples" / "train_lora.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_folder_holds_what_was_trained(example, tmp_path):
    peft = pytest.importorskip("peft")
    pipeline = Pipeline.from_checkpoint(ROOT / "checkpoints" / "shapes")
    layers = example.attention_layers(pipeline)
    assert len(layers) == 8 * 7  # transformer blocks: two down, four up, one in the middle
    factors = example.init_factors(pipeline, layers)
    for a, b in zip(
        jax.tree.leaves(example.merged(pipeline.params, factors, layers)),
        jax.tree.leaves(pipeline.params),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)
    rng = np.random.default_rng(1)
    for pair in factors.values():
        pair["B"] = rng.standard_normal(pair["B"].shape, dtype=np.float32)
    example.save(factors, tmp_path / "lora")
    expected = flatten(example.merged(pipeline.params, factors, layers))
    found = flatten(merge_loras(pipeline.params, [Lora(tmp_path / "lora")], pipeline.config))
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-5, atol=1e-5, err_msg="/".join(path))
    config = peft.PeftConfig.from_pretrained(tmp_path / "lora")
    assert (config.r, config.lora_alpha) == (8, 8) and set(config.target_modules) == set(layers)


@pytest.mark.slow
def test_the_style_changes_and_the_places_stay(example, tmp_path):
    numbers = example.main(["--output", str(tmp_path / "lora"), "--count", "32"])
    assert numbers["distance with"] < 0.5 * numbers["distance without"]
    assert numbers["AP50 with"] > numbers["AP50 without"] - 10
