"""The Python API: keywords, results, the docstring's example, and that it changes nothing in the process."""

import doctest
import inspect
import json
import subprocess
import sys
import typing

import numpy as np
import PIL.Image
import pytest
from tiny_checkpoint import make_layout, make_tiny_checkpoint

import instdiff_jax
from common import PYTHONPATH, ROOT
from instdiff_jax import Pipeline, Result
from instdiff_jax.config import SamplingConfig
from instdiff_jax.sampling import pipeline as module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint")


@pytest.mark.parametrize("method", [Pipeline.__call__, Pipeline.stream])
def test_every_sampling_setting_is_a_typed_keyword(method):
    keywords, hints = inspect.signature(method).parameters, typing.get_type_hints(method)
    for name, hint in typing.get_type_hints(SamplingConfig).items():
        expected = float | hint if name == "alpha" else hint  # one fraction means itself, 0, the rest
        assert hints[name] == expected | None, name
        assert keywords[name].default is None and keywords[name].kind is inspect.Parameter.KEYWORD_ONLY


def test_call_and_stream_take_the_same_keywords():
    call, stream = (inspect.signature(method).parameters for method in (Pipeline.__call__, Pipeline.stream))
    assert list(map(str, call.values())) == list(map(str, stream.values()))
    documented = inspect.getdoc(Pipeline.__call__)
    assert all(name in documented for name in call if name != "self")


def test_one_layout_and_one_seed(checkpoint):
    pipeline, layout = Pipeline.from_checkpoint(checkpoint), make_layout(1)
    (one,) = pipeline(layout, seeds=3, steps=1, mis=0.0)
    (other,) = pipeline.stream([layout], [3], steps=1, mis=0.0)
    assert isinstance(one, Result) and isinstance(one.image, PIL.Image.Image)
    assert one.array.dtype == np.uint8 and one.array.shape == (32, 32, 3) and one.latents.dtype == np.float32
    assert (one.seed, one.layout) == (3, layout)
    assert np.array_equal(np.asarray(one.image), one.array) and np.array_equal(one.array, other.array)


def test_the_docstrings_example_runs(monkeypatch):
    monkeypatch.chdir(ROOT)
    (example,) = [
        test for test in doctest.DocTestFinder(recurse=False).find(module.Pipeline, globs={}) if test.examples
    ]
    assert doctest.DocTestRunner().run(example).failed == 0


def test_public_names():
    assert {"InputError", "Instance", "Layout", "Pipeline", "Result"} <= set(instdiff_jax.__all__)
    assert all(getattr(instdiff_jax, name) is not None for name in instdiff_jax.__all__)
    assert (ROOT / "instdiff_jax" / "py.typed").exists()


UNCHANGED = """
import json, os, sys
import jax
from jax import monitoring
registered = []
for name in dir(monitoring):
    if name.startswith("register_"):
        setattr(monitoring, name, lambda listener, name=name: registered.append(name))
environment, settings = dict(os.environ), dict(jax.config.values)
from instdiff_jax import Pipeline
Pipeline.from_checkpoint(sys.argv[1])
changed = [name for name, value in jax.config.values.items() if settings.get(name) != value]
print(json.dumps([dict(os.environ) == environment, changed, registered]))
"""


def test_making_a_pipeline_changes_nothing_in_the_process(checkpoint, tmp_path):
    command = [sys.executable, "-c", UNCHANGED, str(checkpoint)]
    env = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH, "HOME": str(tmp_path), "PATH": "/usr/bin:/bin"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [True, [], []]
    assert not list(tmp_path.iterdir()), "no cache folder"
