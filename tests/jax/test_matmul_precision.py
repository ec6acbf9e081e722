"""Float32 stays float32 on devices that would shorten a product's operands: the setting in force where programs run.

All other tests run with full precision (conftest.py), so none of them would see it missing.
"""

import jax
import numpy as np
import pytest
from tiny_checkpoint import make_tiny_checkpoint

from instdiff_jax import Pipeline
from instdiff_jax.sampling import programs, refiner
from instdiff_jax.training import inputs
from projects.common import segmenter
from projects.common.segmentation_network import SegmenterConfig, init_params


@pytest.fixture(autouse=True)
def devices_default():
    with jax.default_matmul_precision("default"):
        yield


@pytest.fixture
def seen(monkeypatch):
    """The precision at every call of the functions given to `watch`; they return what is given with them."""
    found = []

    def watch(module, name, result):
        def call(*_, **__):
            found.append(jax.config.jax_default_matmul_precision)
            return result

        monkeypatch.setattr(module, name, call)
        return found

    return watch


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.mark.parametrize("dtype, expected", [("float32", "highest"), ("bfloat16", "default")])
def test_of_a_pipeline(checkpoint, seen, dtype, expected):
    pipeline = Pipeline.from_checkpoint(checkpoint, dtype=dtype)
    found = seen(programs, "encode", None)
    seen(programs, "decode", [(np.zeros((1, 32, 32, 3), np.uint8), np.ones(1, bool))])
    pipeline.encode(np.zeros((32, 32, 3), np.uint8))
    pipeline.decode(np.zeros((1, 16, 16, 4), np.float32))
    assert found == [expected] * 2


def test_of_the_refiner(seen, monkeypatch):
    found = seen(programs, "decode", [(np.zeros((1, 32, 32, 3), np.uint8), np.ones(1, bool))])
    one = object.__new__(refiner.Refiner)
    one.params, one._autoencoder, one.dtype = {"autoencoder": None}, None, "float32"
    monkeypatch.setattr(one, "refine", lambda *_: None)
    one(np.zeros((32, 32, 3), np.uint8), "a cat")
    assert found == ["highest"]


def test_of_phrases_and_of_the_detector(seen):
    class Tokens:
        encode_phrases = list

    found = seen(segmenter, "_describe", np.zeros((32, 8)))
    inputs._embed(lambda *_: found.append(jax.config.jax_default_matmul_precision) or np.zeros(1), {}, Tokens(), ["a"])
    config = SegmenterConfig((("thing", ("cat",)),), (8, 8, 8))
    segmenter.Segmenter(config, init_params(config, jax.random.key(0))).features(np.zeros((1, 32, 32, 3), np.uint8))
    assert found == ["highest"] * 2
