"""Reads the released refiner: one .safetensors file, sd_xl_refiner_1.0."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.checkpoint.rename import check_keys
from instdiff_jax.checkpoint.tables import Entry, Names, attention_names, autoencoder_names, ff_names, res_block_names
from instdiff_jax.checkpoint.torch_file import read_file
from instdiff_jax.errors import InputError
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.refiner import NUMBERS, RefinerConfig, RefinerText, RefinerUNet
from instdiff_jax.tree import flatten, unflatten

_UNET, _VAE, _TEXT = "model.diffusion_model.", "first_stage_model.", "conditioner.embedders.0.model."
_IGNORED = re.compile(
    r"model_ema\..*|denoiser\..*|first_stage_model\.loss\..*|conditioner\.embedders\.0\.model\.(logit_scale|attn_mask)"
)


def read_refiner(path: Path, config: RefinerConfig = RefinerConfig(), verify: bool = True) -> dict[str, Any]:
    """The refiner's parameters: trees of unet, autoencoder and text_encoder. Leaves are views of the file.

    Raises:
        InputError: for a file that is no refiner, with the keys that are missing, extra or of another shape.
    """
    tensors = read_file(path, verify)
    if isinstance(tensors.get("state_dict"), dict):
        tensors = tensors["state_dict"]
    if not any(str(key).startswith(_TEXT) for key in tensors):
        raise InputError(f"{path}: expected the SDXL refiner (sd_xl_refiner_1.0.safetensors), with keys {_TEXT}…")
    found = split_heads({key: value for key, value in tensors.items() if not _IGNORED.fullmatch(key)})
    table = refiner_table(config)
    shapes = {key: tuple(np.shape(value)) for key, value in found.items()}
    check_keys(shapes, {key: entry.torch_shape for key, entry in table.items()}, str(path))
    return unflatten({entry.path: entry.to_ours(found[key]) for key, entry in table.items()})


def split_heads(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """OpenCLIP has q, k and v in one tensor: here each has a key of its own, `attn.q.weight` and so on."""
    found: dict[str, Any] = {}
    for key, value in tensors.items():
        match = re.fullmatch(r"(.*\.attn)\.in_proj_(weight|bias)", key)
        if match is None:
            found[key] = value
        elif np.ndim(value) == 0 or np.shape(value)[0] % 3:
            raise InputError(f"{key}: expected three tensors in one, got shape {np.shape(value)}")
        else:
            parts = np.split(np.asarray(value), 3)
            found |= {f"{match[1]}.{name}.{match[2]}": part for name, part in zip("qkv", parts, strict=True)}
    return found


def refiner_table(config: RefinerConfig) -> dict[str, Entry]:
    """Every key of the file, after `split_heads`."""
    names = Names()
    _unet(names, config)
    _text_encoder(names, config)
    vae = Names()
    autoencoder_names(vae, config.autoencoder)
    names.found |= {f"{_VAE}{key}": value for key, value in vae.found.items()}
    shapes = {path: leaf.shape for path, leaf in flatten(refiner_shapes(config)).items()}
    return {key: Entry(path, kind, shapes[path]) for key, (path, kind) in names.found.items() if path in shapes}


def refiner_shapes(config: RefinerConfig) -> dict[str, Any]:
    """The shapes of the refiner's parameters; no memory is used."""
    key, width = jax.random.key(0), config.text_encoder.hidden_size
    side = 2 ** (len(config.channel_mult) - 1)
    latents = jnp.zeros((1, side, side, config.autoencoder.z_channels))

    def denoise(unet: RefinerUNet):
        conditions = unet.condition(jnp.zeros((1, 1, width)), jnp.zeros((1, width)), jnp.zeros((1, NUMBERS)))
        return unet(latents, jnp.zeros((1,), jnp.int32), conditions)

    pixels = jnp.zeros((1, 2 * config.canvas_stride, 2 * config.canvas_stride, 3))

    def init() -> dict[str, Any]:
        vae, text = Autoencoder(config.autoencoder), RefinerText(config.text_encoder)
        return {
            "unet": RefinerUNet(config).init(key, method=denoise)["params"],
            "autoencoder": vae.init(key, pixels, method="reconstruct")["params"],
            "text_encoder": text.init(key, jnp.zeros((1, 1), jnp.int32))["params"],
        }

    return jax.eval_shape(init)


def _transformer(names: Names, key: str, path: str, depth: int) -> None:
    names.norm(f"{key}.norm", f"{path}/norm")
    names.linear(f"{key}.proj_in", f"{path}/proj_in")
    names.linear(f"{key}.proj_out", f"{path}/proj_out")
    for i in range(depth):
        block, layer = f"{key}.transformer_blocks.{i}", f"{path}/layers_{i}"
        for j in (1, 2, 3):
            names.norm(f"{block}.norm{j}", f"{layer}/norm{j}")
        attention_names(names, f"{block}.attn1", f"{layer}/self_attn")
        attention_names(names, f"{block}.attn2", f"{layer}/cross_attn")
        ff_names(names, f"{block}.ff", f"{layer}/ff")


def _unet(names: Names, config: RefinerConfig) -> None:
    for theirs, ours in (("time_embed.", "time"), ("label_emb.0.", "label")):
        names.linear(f"{_UNET}{theirs}0", f"unet/{ours}_in")
        names.linear(f"{_UNET}{theirs}2", f"unet/{ours}_out")
    names.conv(f"{_UNET}input_blocks.0.0", "unet/conv_in")
    last, index = len(config.channel_mult) - 1, 1
    for level in range(last + 1):
        for i in range(config.num_res_blocks):
            key = f"{_UNET}input_blocks.{index}"
            res_block_names(names, f"{key}.0", f"unet/down_{level}_res_{i}")
            if level in config.attention_levels:
                _transformer(names, f"{key}.1", f"unet/down_{level}_attn_{i}", config.depth)
            index += 1
        if level < last:
            names.conv(f"{_UNET}input_blocks.{index}.0.op", f"unet/downsample_{level}")
            index += 1
    res_block_names(names, f"{_UNET}middle_block.0", "unet/mid_res_0")
    _transformer(names, f"{_UNET}middle_block.1", "unet/mid_attn", config.depth)
    res_block_names(names, f"{_UNET}middle_block.2", "unet/mid_res_1")
    index = 0
    for level in range(last, -1, -1):
        attends = level in config.attention_levels
        for i in range(config.num_res_blocks + 1):
            key = f"{_UNET}output_blocks.{index}"
            res_block_names(names, f"{key}.0", f"unet/up_{level}_res_{i}")
            if attends:
                _transformer(names, f"{key}.1", f"unet/up_{level}_attn_{i}", config.depth)
            if level > 0 and i == config.num_res_blocks:
                names.conv(f"{key}.{1 + attends}.conv", f"unet/upsample_{level - 1}")
            index += 1
    names.norm(f"{_UNET}out.0", "unet/norm_out")
    names.conv(f"{_UNET}out.2", "unet/conv_out")


def _text_encoder(names: Names, config: RefinerConfig) -> None:
    path = "text_encoder"
    names.add(f"{_TEXT}token_embedding.weight", f"{path}/token_embedding/embedding")
    names.add(f"{_TEXT}positional_embedding", f"{path}/position_embedding/embedding")
    names.add(f"{_TEXT}text_projection", f"{path}/projection/kernel")  # [in, out] in the file too
    names.norm(f"{_TEXT}ln_final", f"{path}/final_norm")
    for i in range(config.text_encoder.num_layers):
        key, layer = f"{_TEXT}transformer.resblocks.{i}", f"{path}/layer_{i}"
        for j in (1, 2):
            names.norm(f"{key}.ln_{j}", f"{layer}/norm{j}")
        for name in "qkv":
            names.linear(f"{key}.attn.{name}", f"{layer}/attn/{name}")
        names.linear(f"{key}.attn.out_proj", f"{layer}/attn/out")
        names.linear(f"{key}.mlp.c_fc", f"{layer}/mlp/in")
        names.linear(f"{key}.mlp.c_proj", f"{layer}/mlp/out")
