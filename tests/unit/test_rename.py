"""Rename tables: every key and shape of the released layout, both ways, and pointed errors."""

import dataclasses
import json

import numpy as np
import pytest

from common import PARITY, state_dict
from instdiff_jax.checkpoint import rename
from instdiff_jax.checkpoint.shapes import ADAPTERS, parameter_shapes
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten

SPECS = {
    ("small", "model"): "unet_small",
    ("small", "autoencoder"): "autoencoder_small",
    ("small", "text_encoder"): "text_encoder_small",
    ("alt", "model"): "unet_alt",
    ("full", "model"): "unet_full",
    ("full", "autoencoder"): "autoencoder_full",
    ("full", "text_encoder"): "text_encoder_full",
}


def model_config(size: str) -> ModelConfig:
    """The sizes of the parity data: full is the released model."""
    config = ModelConfig()
    if size == "full":
        return config
    small = dict(
        unet=dict(model_channels=64, num_heads=4),
        unifusion=dict(mid_dim=256),
        autoencoder=dict(ch=32, num_res_blocks=1),
        text_encoder=dict(vocab_size=1024, intermediate_size=512, num_layers=2),
    )
    if size == "alt":
        small["unet"] = dict(model_channels=96, channel_mult=(1, 2, 2), num_res_blocks=1, num_heads=6)
        small["unifusion"] = dict(mid_dim=128)
    groups = {name: dataclasses.replace(getattr(config, name), **values) for name, values in small.items()}
    return dataclasses.replace(config, **groups)


@pytest.mark.parametrize(("size", "part"), SPECS)
def test_tables_hold_every_key_and_shape(size, part):
    spec = json.loads((PARITY / f"spec_{SPECS[size, part]}.json").read_text())
    table = rename_table(part, model_config(size))
    assert {key: list(entry.torch_shape) for key, entry in table.items()} == spec
    assert len({entry.path for entry in table.values()}) == len(spec)


def test_parameter_counts_of_the_released_model():
    table = rename_table("model", model_config("full"))
    counts = dict.fromkeys(("base", *ADAPTERS), 0)
    for entry in table.values():
        counts[entry.group] += int(np.prod(entry.torch_shape, dtype=np.int64))
    assert sum(counts.values()) == 1_228_333_437
    assert counts["fusers"] == 208_018_272
    assert counts["unifusion"] + counts["trunk"] == 160_782_669
    assert counts["scaleu"] == 11_532


@pytest.mark.parametrize("part", PARTS)
def test_round_trip_is_exact_and_makes_no_copies(part):
    config = model_config("small")
    original = state_dict(SPECS["small", part])
    params = rename.from_state_dict(part, original, config)
    back = rename.to_state_dict(part, params, config)
    assert set(back) == set(original)
    for key, value in original.items():
        assert back[key].dtype == value.dtype and np.array_equal(back[key], value), key
        assert value.ndim == 0 or np.shares_memory(back[key], value), key
    table = rename_table(part, config)
    shapes = {path: leaf.shape for path, leaf in flatten(params).items()}
    assert shapes == {entry.path: entry.shape for entry in table.values()}


def test_turns_of_the_kinds():
    config = model_config("small")
    original = state_dict("unet_small")
    params = rename.from_state_dict("model", original, config)
    conv = original["input_blocks.0.0.weight"]
    assert params["unet"]["conv_in"]["kernel"][2, 1, 3, 7] == conv[7, 3, 2, 1]
    linear = original["time_embed.0.weight"]
    assert params["unet"]["time_in"]["kernel"][3, 5] == linear[5, 3]
    pointwise = original["middle_block.1.proj_in.weight"]
    assert params["unet"]["mid_attn"]["proj_in"]["kernel"][3, 5] == pointwise[5, 3, 0, 0]
    depthwise = original["position_net.convnext_tiny_backbone.stages.1.2.dwconv.weight"]
    kernel = params["unifusion"]["trunk"]["stage_1_block_2"]["dwconv"]["kernel"]
    assert kernel.shape == (7, 7, 1, 192) and kernel[1, 2, 0, 9] == depthwise[9, 0, 1, 2]
    assert params["unifusion"]["pos_embedding"].shape == (64, 3072)


def test_missing_extra_and_misshaped_keys_are_named_in_one_error():
    original = state_dict("unet_small")
    del original["time_embed.0.bias"], original["out.2.bias"]
    original["surprise.weight"] = np.zeros(3, np.float32)
    original["scaleu_b_0"] = np.zeros(7, np.float32)
    with pytest.raises(InputError) as error:
        rename.from_state_dict("model", original, model_config("small"), source="x.pth")
    message = str(error.value)
    for text in (
        "x.pth",
        "2 missing",
        "time_embed.0.bias",
        "out.2.bias",
        "1 extra",
        "surprise.weight",
        "scaleu_b_0 (file [7], config [256])",
    ):
        assert text in message
    assert "\n" not in message


def test_sizes_of_another_model_name_the_key_and_both_shapes():
    with pytest.raises(InputError, match=r"time_embed\.0\.weight \(file \[256, 64\], config \[1280, 320\]\)"):
        rename.from_state_dict("model", state_dict("unet_small"), model_config("full"))


def test_known_buffers_are_ignored_and_others_are_not():
    config = model_config("small")
    original = state_dict("text_encoder_small")
    original["transformer.text_model.embeddings.position_ids"] = np.arange(77)[None]
    rename.from_state_dict("text_encoder", original, config)
    original["transformer.text_model.embeddings.position_ids2"] = np.arange(77)[None]
    with pytest.raises(InputError, match="position_ids2"):
        rename.from_state_dict("text_encoder", original, config)


def test_a_base_without_adapters():
    config = model_config("small")
    table = rename_table("model", config, absent=ADAPTERS)
    base = {key: value for key, value in state_dict("unet_small").items() if key in table}
    params = rename.from_state_dict("model", base, config, absent=ADAPTERS)
    assert "unifusion" not in params and "fuser" not in params["unet"]["mid_attn"]
    assert set(rename.to_state_dict("model", params, config, absent=ADAPTERS)) == set(base)
    with pytest.raises(InputError, match="missing"):
        rename.from_state_dict("model", base, config)


def test_a_tree_that_lacks_a_parameter_is_not_written():
    config = model_config("small")
    params = rename.from_state_dict("autoencoder", state_dict("autoencoder_small"), config)
    del params["autoencoder"]["decoder"]["conv_in"]["bias"]
    with pytest.raises(InputError, match="1 missing: autoencoder/decoder/conv_in/bias"):
        rename.to_state_dict("autoencoder", params, config)


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("size", ["small", "alt", "full"])
def test_tables_name_every_parameter_of_the_modules(size, positions):
    config = model_config(size)
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, positions=positions))
    named = [entry.path for part in PARTS for entry in rename_table(part, config).values()]
    assert len(set(named)) == len(named) and set(named) == set(flatten(parameter_shapes(config)))


@pytest.mark.parametrize("dims", [(8, 16), (8, 16, 32), (8, 16, 32, 64, 128)])
def test_map_tokens_of_a_trunk_with_any_number_of_stages(dims):
    config = model_config("small")
    unifusion = dataclasses.replace(config.unifusion, trunk_depths=(1,) * len(dims), trunk_dims=dims)
    config = dataclasses.replace(config, unifusion=unifusion)
    config.validate()
    side = 512 // 2 ** (len(dims) + 1)
    width = dims[-1] * side**2 // 64
    assert parameter_shapes(config, parts=("unifusion",))["unifusion"]["pos_embedding"] == (64, width)
