"""TAESD's decoder against diffusers' AutoencoderTiny with random weights, from every file that holds it."""

import re

import jax
import numpy as np
import pytest
from tiny_checkpoint import tiny_config

from common import channels_first, channels_last, make_array, model_config, relative_error
from instdiff_jax.checkpoint.taesd import read_taesd
from instdiff_jax.checkpoint.torch_file import write_safetensors
from instdiff_jax.errors import InputError
from instdiff_jax.models.tiny_decoder import TinyDecoder

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def theirs():
    model = diffusers.AutoencoderTiny().eval()
    state = {key: torch.from_numpy(make_array(key, value.shape)) for key, value in model.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return model


@pytest.fixture(scope="module")
def files(theirs, tmp_path_factory):
    """diffusers' folder, its file, and the released decoder."""
    folder = tmp_path_factory.mktemp("taesd")
    theirs.save_pretrained(folder / "tiny")
    released = {}
    for key, value in theirs.decoder.state_dict().items():
        place, rest = re.fullmatch(r"layers\.(\d+)\.(.*)", key).groups()
        released[f"{int(place) + 1}.{rest}"] = value.numpy()
    write_safetensors(folder / "taesd_decoder.safetensors", released)
    return [folder / "tiny", folder / "tiny/diffusion_pytorch_model.safetensors", folder / "taesd_decoder.safetensors"]


@pytest.fixture(scope="module")
def decode(files):
    params = read_taesd(files[0], model_config())
    return jax.jit(lambda latents: TinyDecoder().apply({"params": params}, latents, method="decode"))


def test_images_equal_those_of_diffusers(theirs, files, decode):
    latents = np.random.default_rng(0).standard_normal((2, 4, 6, 8), dtype=np.float32) * 2
    with torch.no_grad():
        expected = theirs.decode(torch.from_numpy(latents)).sample.numpy()
    assert relative_error(channels_first(decode(channels_last(latents))), expected) <= 2e-5
    first = jax.tree.leaves(read_taesd(files[0], model_config()))
    for file in files[1:]:
        for a, b in zip(first, jax.tree.leaves(read_taesd(file, model_config())), strict=True):
            np.testing.assert_array_equal(a, b)


def test_what_is_no_taesd_is_named(files, tmp_path):
    with pytest.raises(
        InputError, match="TAESD decodes 4 channels of 8×8 pixels, and this model's latents have 4 of 2×2"
    ):
        read_taesd(files[0], tiny_config())
    with pytest.raises(InputError, match="expected diffusion_pytorch_model.safetensors"):
        read_taesd(tmp_path, model_config())
    write_safetensors(tmp_path / "other.safetensors", {"1.weight": np.zeros((3, 4, 3, 3), np.float32)})
    with pytest.raises(InputError, match="other.safetensors: keys do not match"):
        read_taesd(tmp_path / "other.safetensors", model_config())
