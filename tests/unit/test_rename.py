"""Rename tables: every key and shape of the released layout, both ways, and pointed errors."""

import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

from common import PARITY, state_dict
from instdiff_jax.checkpoint import rename
from instdiff_jax.checkpoint.tables import ADAPTERS, PARTS, rename_table
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion
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
def test_tables_agree_with_the_modules(size, positions):
    config = model_config(size)
    config = dataclasses.replace(config, unet=dataclasses.replace(config.unet, positions=positions))
    f32 = functools.partial(jax.ShapeDtypeStruct, dtype=np.float32)
    s, context = config.unifusion.map_size, config.unet.context_dim
    grounding = dict(
        boxes=f32((1, 30, 4)),
        points=f32((1, 30, 2)),
        scribbles=f32((1, 30, 40)),
        mask_points=f32((1, 30, 512)),
        maps=jax.ShapeDtypeStruct((1, s, s), np.uint32),
        phrase_embeddings=f32((1, 30, context)),
        has_map=f32((1,)),
        **{name: f32((1, 30)) for name in ("valid", "has_box", "has_point", "has_scribble", "has_mask")},
    )

    def run_unet(unet, latents, timesteps, text, tokens):
        return unet(latents, timesteps, unet.condition(text, tokens), 1.0)

    def run_autoencoder(autoencoder, image, latents):
        return autoencoder.encode(image), autoencoder.decode(latents)

    z = config.autoencoder.z_channels
    calls = dict(
        unet=(
            UNet(config.unet),
            (f32((1, 16, 16, 4)), f32((1,)), f32((1, 77, context)), f32((1, 184, context))),
            run_unet,
        ),
        unifusion=(UniFusion(config.unifusion, context), (grounding,), None),
        autoencoder=(Autoencoder(config.autoencoder), (f32((1, 64, 64, 3)), f32((1, 8, 8, z))), run_autoencoder),
        text_encoder=(
            CLIPTextEncoder(config.text_encoder),
            (jax.ShapeDtypeStruct((1, 77), np.int32),),
            None,
        ),
    )
    for part, (module, inputs, method) in calls.items():
        init = functools.partial(module.init, method=method)
        params = jax.eval_shape(init, jax.random.key(0), *inputs)["params"]
        found = {path: leaf.shape for path, leaf in flatten(params).items()}
        assert found == flatten(rename.parameter_shapes(config)[part]), part
