"""The CLIP text encoder: parity with the official numbers and with transformers, which state is pooled, bfloat16."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from common import model_config, parity, relative_error, state_dict
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.config import ModelConfig
from instdiff_jax.models.clip_text import CLIPTextEncoder


def encoder_and_params(config: ModelConfig, weights: dict[str, np.ndarray], dtype=jnp.float32):
    params = from_state_dict("text_encoder", weights, config)["text_encoder"]
    return jax.jit(CLIPTextEncoder(config.text_encoder, dtype).apply), {"params": params}


def small_encoder(dtype=jnp.float32):
    return encoder_and_params(model_config("small"), state_dict("text_encoder_small"), dtype)


@pytest.mark.parametrize("size", ["small", "full"])
def test_official_numbers(size):
    data = parity(f"clip_text_{size}")
    encode, params = encoder_and_params(model_config(size), state_dict(f"text_encoder_{size}", int(data["seed"])))
    hidden, pooled = encode(params, data["input_ids"].astype(np.int32))
    assert relative_error(hidden, data["last_hidden_state"]) < 2e-5
    assert relative_error(pooled, data["pooler_output"]) < 2e-5


@pytest.mark.parametrize("length", [77, 9])
def test_equals_transformers(length):
    config = model_config("small")
    sizes = dict(vocab_size=60, hidden_size=64, intermediate_size=96, num_layers=3, num_heads=4)
    config = dataclasses.replace(config, text_encoder=dataclasses.replace(config.text_encoder, **sizes))
    torch.manual_seed(0)
    theirs = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=60,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            hidden_act="quick_gelu",
            bos_token_id=58,
            eos_token_id=59,
            pad_token_id=59,
        )
    ).eval()
    # Their fresh biases and norms are all zeros and ones, which would hide a swapped one.
    for parameter in theirs.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    weights = {
        "transformer.text_model." + name.removeprefix("text_model."): value.numpy()
        for name, value in theirs.state_dict().items()
    }
    rng = np.random.default_rng(1)
    ids = rng.integers(0, 58, (3, length))
    ids[:, 0] = 58
    for row, end in zip(ids, (length - 1, length // 2, 2), strict=True):
        row[end:] = 59
    with torch.no_grad():
        expected = theirs(torch.from_numpy(ids))
    encode, params = encoder_and_params(config, weights)
    hidden, pooled = encode(params, ids.astype(np.int32))
    assert relative_error(hidden, expected.last_hidden_state) < 2e-5
    assert relative_error(pooled, expected.pooler_output) < 2e-5


def test_pooled_is_the_state_at_the_first_end_token():
    encode, params = small_encoder()
    ids = np.full((3, 12), 1023, np.int32)
    ids[:, 0] = 1022
    ends = [1, 5, 11]
    for row, end in zip(ids, ends, strict=True):
        row[1:end] = np.arange(end - 1) + 7
    hidden, pooled = encode(params, ids)
    np.testing.assert_array_equal(pooled, np.asarray(hidden)[np.arange(3), ends])


def test_no_token_sees_what_follows_it():
    encode, params = small_encoder()
    ids = np.arange(24, dtype=np.int32).reshape(2, 12)
    changed = ids.copy()
    changed[:, 7:] += 100
    before, after = encode(params, ids)[0], encode(params, changed)[0]
    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert relative_error(after[:, 7:], before[:, 7:]) > 0.1


def test_bfloat16_stays_close_to_float32():
    data = parity("clip_text_small")
    encode, params = small_encoder(jnp.bfloat16)
    hidden, pooled = encode(params, data["input_ids"].astype(np.int32))
    assert hidden.dtype == pooled.dtype == jnp.bfloat16
    assert relative_error(hidden.astype(jnp.float32), data["last_hidden_state"]) < 0.02
    assert relative_error(pooled.astype(jnp.float32), data["pooler_output"]) < 0.02


def test_parameter_count_and_dtype_of_the_released_encoder():
    encoder = CLIPTextEncoder(model_config("full").text_encoder)
    params = jax.eval_shape(encoder.init, jax.random.key(0), jnp.zeros((1, 77), jnp.int32))
    leaves = jax.tree.leaves(params)
    assert sum(leaf.size for leaf in leaves) == 123_060_480
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.float32)}


def test_too_many_tokens_are_refused():
    encode, params = small_encoder()
    with pytest.raises(ValueError, match="at most 77 tokens a row, got 78"):
        encode(params, np.zeros((1, 78), np.int32))
