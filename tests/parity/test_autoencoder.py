"""The KL autoencoder: parity with the official numbers and with diffusers, sampling, memory, bfloat16."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from common import make_array, model_config, parity, relative_error, state_dict
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.config import AutoencoderConfig, ModelConfig
from instdiff_jax.models.autoencoder import Autoencoder, sample_posterior

# diffusers' names of what the checkpoint calls otherwise, applied in order; {deepest} − i is the level of up block i.
DIFFUSERS_RENAMES = [
    (r"(down|up)_blocks\.(\d+)\.resnets\.", r"\1.\2.block."),
    (r"down_blocks\.(\d+)\.downsamplers\.0\.", r"down.\1.downsample."),
    (r"up_blocks\.(\d+)\.upsamplers\.0\.", r"up.\1.upsample."),
    (r"mid_block\.resnets\.0\.", "mid.block_1."),
    (r"mid_block\.resnets\.1\.", "mid.block_2."),
    (r"mid_block\.attentions\.0\.group_norm\.", "mid.attn_1.norm."),
    (r"mid_block\.attentions\.0\.to_([qkv])\.", r"mid.attn_1.\1."),
    (r"mid_block\.attentions\.0\.to_out\.0\.", "mid.attn_1.proj_out."),
    (r"conv_shortcut\.", "nin_shortcut."),
    (r"conv_norm_out\.", "norm_out."),
]


def jit_methods(config: AutoencoderConfig, dtype=jnp.float32):
    model = Autoencoder(config, dtype)
    return (jax.jit(functools.partial(model.apply, method=name)) for name in ("encode", "decode"))


def ours_from(weights: dict[str, np.ndarray], config: ModelConfig) -> dict:
    return {"params": from_state_dict("autoencoder", weights, config)["autoencoder"]}


def with_autoencoder(sizes: AutoencoderConfig) -> ModelConfig:
    return dataclasses.replace(model_config("small"), autoencoder=sizes)


def channels_last(x) -> np.ndarray:
    return np.moveaxis(np.asarray(x), 1, -1)


@pytest.mark.parametrize("size", ["small", "full"])
def test_official_numbers(size):
    data, config = parity(f"autoencoder_{size}"), model_config(size)
    params = ours_from(state_dict(f"autoencoder_{size}", int(data["seed"])), config)
    encode, decode = jit_methods(config.autoencoder)
    moments = np.concatenate(encode(params, channels_last(data["image"])), axis=-1)
    assert relative_error(moments, channels_last(data["moments"])) < 2e-5
    assert relative_error(decode(params, channels_last(data["z"])), channels_last(data["decoded"])) < 2e-5


def diffusers_weights(theirs: AutoencoderKL, levels: int) -> dict[str, np.ndarray]:
    """Their state dict under the checkpoint's keys."""
    weights = {}
    for key, value in theirs.state_dict().items():
        for pattern, name in DIFFUSERS_RENAMES:
            key = re.sub(pattern, name, key)
        key = re.sub(r"up\.(\d+)", lambda match: f"up.{levels - 1 - int(match[1])}", key)
        is_pointwise = value.ndim == 2  # attention, which the checkpoint stores as 1×1 convolutions
        weights[key] = value.numpy()[..., None, None] if is_pointwise else value.numpy()
    return weights


@pytest.mark.parametrize(
    ("ch", "ch_mult", "num_res_blocks", "height", "width"), [(32, (1, 2, 4, 4), 1, 96, 40), (64, (1, 2), 2, 18, 34)]
)
def test_equals_diffusers(ch, ch_mult, num_res_blocks, height, width):
    sizes = AutoencoderConfig(ch=ch, ch_mult=ch_mult, num_res_blocks=num_res_blocks, z_channels=4, scale_factor=0.18215)
    config = with_autoencoder(sizes)
    torch.manual_seed(0)
    levels = len(ch_mult)
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=tuple(ch * mult for mult in ch_mult),
        layers_per_block=num_res_blocks,
        latent_channels=4,
        norm_num_groups=32,
    ).eval()
    # Their fresh norms are all ones and zeros, which would hide a swapped one.
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    params = ours_from(diffusers_weights(theirs, levels), config)
    image = torch.rand(2, 3, height, width) * 2 - 1
    latents = torch.randn(2, 4, height // 2 ** (levels - 1), width // 2 ** (levels - 1))
    with torch.no_grad():
        moments = theirs.encode(image).latent_dist.parameters
        mean, log_variance = moments.chunk(2, dim=1)
        decoded = theirs.decode(latents / sizes.scale_factor).sample
    encode, decode = jit_methods(sizes)
    ours = encode(params, channels_last(image))
    assert ours[0].shape == channels_last(latents).shape
    assert relative_error(ours[0], channels_last(mean)) < 2e-5
    # diffusers clamps what it stores.
    assert relative_error(np.clip(ours[1], -30, 20), channels_last(log_variance)) < 2e-5
    assert relative_error(decode(params, channels_last(latents)), channels_last(decoded)) < 2e-5


def test_sampling_clamps_the_log_variance_and_scales():
    mean = jnp.full((1, 1, 1, 4), 3.0)
    log_variance = jnp.asarray([[[[-1e4, 0.0, 1.0, 1e4]]]])
    noise = jnp.full((1, 1, 1, 4), 2.0)
    sample = sample_posterior(mean.astype(jnp.bfloat16), log_variance, noise, 0.5)
    expected = 0.5 * (3 + 2 * np.exp(0.5 * np.array([-30.0, 0.0, 1.0, 20.0])))
    np.testing.assert_allclose(sample[0, 0, 0], expected, rtol=1e-6)
    assert sample.dtype == jnp.float32


def test_sampled_latents_decode_through_the_scale():
    config = AutoencoderConfig(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, scale_factor=0.18215)
    weights = {
        key: make_array(key, entry.torch_shape)
        for key, entry in rename_table("autoencoder", with_autoencoder(config)).items()
    }
    params = ours_from(weights, with_autoencoder(config))
    encode, decode = jit_methods(config)
    image = jax.random.uniform(jax.random.key(1), (1, 16, 24, 3), minval=-1.0)
    mean, log_variance = encode(params, image)
    decoded = decode(params, sample_posterior(mean, log_variance, jnp.zeros_like(mean), config.scale_factor))
    reconstruct = jax.jit(functools.partial(Autoencoder(config).apply, method="reconstruct"))
    assert decoded.shape == image.shape
    assert relative_error(reconstruct(params, image), decoded) < 1e-5


def test_bfloat16_stays_close_to_float32():
    data, config = parity("autoencoder_small"), model_config("small")
    params = ours_from(state_dict("autoencoder_small"), config)
    encode, decode = jit_methods(config.autoencoder, jnp.bfloat16)
    mean, log_variance = encode(params, channels_last(data["image"]))
    decoded = decode(params, channels_last(data["z"]))
    assert mean.dtype == log_variance.dtype == decoded.dtype == jnp.bfloat16
    moments = jnp.concatenate([mean, log_variance], axis=-1).astype(jnp.float32)
    assert relative_error(moments, channels_last(data["moments"])) < 0.03
    assert relative_error(decoded.astype(jnp.float32), channels_last(data["decoded"])) < 0.03


def test_parameter_count_and_dtype_of_the_released_autoencoder():
    model = Autoencoder(model_config("full").autoencoder)
    init = functools.partial(model.init, method="reconstruct")
    leaves = jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3))))
    assert sum(leaf.size for leaf in leaves) == 83_653_863
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_decoding_a_large_picture_holds_no_array_of_all_logits():
    model = Autoencoder(model_config("full").autoencoder)
    init = functools.partial(model.init, method="reconstruct")
    params = jax.eval_shape(init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)))
    decode = jax.jit(functools.partial(model.apply, method="decode"))
    program = decode.lower(params, jax.ShapeDtypeStruct((1, 128, 128, 4), jnp.float32)).as_text()
    assert "16384x512x" in program
    assert "16384x16384x" not in program
