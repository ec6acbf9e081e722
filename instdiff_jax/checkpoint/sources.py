"""Reads one source of weights, and says what it is: its tensors by part, under the released checkpoint's names.

The keys of a file determine its kind:

- the released checkpoint, {"model", "autoencoder", "text_encoder", "diffusion"[, "ema", …]}; EMA weights
  are taken when present;
- the same as flat keys with the prefixes `model.`, `autoencoder.`, `text_encoder.`, `diffusion.`: our own
  .safetensors export;
- Stable Diffusion 1.5 and models fine-tuned from it, plain or under "state_dict", with the prefixes
  `model.diffusion_model.`, `cond_stage_model.`, `first_stage_model.`: a base without adapters;
- the adapter files of the ComfyUI port. fusers: {"input_blocks": {index: {"params", "state"}},
  "middle_block": …, "output_blocks": …}, one entry per attention block in the network's order;
  positionnet: UniFusion's state dict without a prefix; scaleu: {index: {"scaleu_b", "scaleu_s"}};
- a flat state dict of adapters under their released names.

A folder is diffusers' (`diffusers.py`) or a checkpoint folder of ours.
"""

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.checkpoint import diffusers, folder
from instdiff_jax.checkpoint.buffers import schedule_buffers
from instdiff_jax.checkpoint.others import V_KEY, refuse_others
from instdiff_jax.checkpoint.rename import to_state_dict
from instdiff_jax.checkpoint.shapes import ADAPTERS
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.checkpoint.torch_file import read_file
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError, short

# Stable Diffusion's prefix of each part, and the keys of its files that are not used.
SD_PREFIXES = {
    "model.diffusion_model.": "model",
    "first_stage_model.": "autoencoder",
    "cond_stage_model.": "text_encoder",
}
SD_IGNORED = (
    V_KEY,
    r"model_ema\..*",
    r"logvar",
    r"lvlb_weights",
    r"cond_stage_model\.logit_scale",
    r"cond_stage_model\.text_projection",
    r"cond_stage_model\.transformer\.text_projection\.weight",
)
ADAPTER_KEYS = r"position_net\..*|scaleu_[bs]_\d+|.*\.fuser\..*"
CONVNEXT_IGNORED = r"head\..*|norm\..*"  # ImageNet's classifier and the norm before it
TRUNK_PREFIX = "position_net.convnext_tiny_backbone."

State = dict[str, dict[str, Any]]  # part -> key -> array; parts are PARTS and "diffusion"


def open_source(path: Path, config: ModelConfig, verify: bool = True, ignore_extra: bool = False) -> tuple[str, State]:
    """Reads one source of weights: a PyTorch file, a diffusers folder or a checkpoint folder.

    Args:
        path: the file or folder, or a name on the hub that is in its local cache.
        config: the model's sizes.
        verify: compare with the checksums in it.
        ignore_extra: text encoders given under two names are taken once.

    Returns:
        The kind, "released", "base" or "adapter", and the tensors by part under their released names; under "extra"
        those that no part of Stable Diffusion 1.5 has.

    Raises:
        InputError: for what is not there, cannot be read, or is another model, which it names.
    """
    if not os.path.exists(path):
        path = diffusers.cached_folder(path)
    if not os.path.isdir(path):
        return split_file(path, read_file(path, verify), config, ignore_extra)
    if os.path.isdir(path / "checkpoints"):
        raise InputError(f"{path}: a training run; instdiff export makes a checkpoint folder of it")
    if diffusers.is_diffusers(path):
        return diffusers.read_folder(path, config, verify)
    return _read_checkpoint(path, config, verify)


def _read_checkpoint(path: Path, config: ModelConfig, verify: bool) -> tuple[str, State]:
    """A checkpoint folder's tensors under their released names."""
    if not (path / "config.json").is_file():
        raise InputError(f"{path}: neither a diffusers folder (model_index.json, unet/) nor a checkpoint folder")
    sizes, _, absent = folder.read_config(path)
    # Positions may be added to a base, and its canvas decides no parameter.
    given = {name: getattr(config.unet, name) for name in config.unet.NEWER}
    if (found := dataclasses.replace(sizes.unet, **given)) != config.unet:
        raise InputError(f"{path}: config.model.unet: expected {short(config.unet)}, got {short(found)}")
    params = folder.restore_params(path, dtype=None, as_numpy=True, verify=verify)
    state = {part: dict(to_state_dict(part, params, sizes, absent)) for part in PARTS}
    return "base" if set(absent) == set(ADAPTERS) else "released", state


def split_file(
    path: Path, content: dict[str, Any], config: ModelConfig, ignore_extra: bool = False
) -> tuple[str, State]:
    """As `open_source`, for the content of a PyTorch file."""
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if all(isinstance(content.get(part), dict) for part in PARTS):
        ema = content.get("ema")
        model = ema if isinstance(ema, dict) and ema else content["model"]
        diffusion = content.get("diffusion")
        return "released", {
            "model": rename_keys(path, model),
            "autoencoder": rename_keys(path, content["autoencoder"]),
            "text_encoder": rename_keys(path, content["text_encoder"], clip_key),
            "diffusion": rename_keys(path, diffusion) if isinstance(diffusion, dict) else {},
        }
    if {"input_blocks", "middle_block", "output_blocks"} <= content.keys():
        return "adapter", {"model": _port_fusers(path, content, config)}
    keys = [str(key) for key in content]
    refuse_others(path, content, config)
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return "base", _split_base(path, content, config, ignore_extra)
    prefixes = tuple(f"{part}." for part in (*PARTS, "diffusion"))
    if keys and all(key.startswith(prefixes) for key in keys):
        state: State = {}
        for key, value in rename_keys(path, content).items():
            part, name = key.split(".", 1)
            state.setdefault(part, {})[name] = value
        return "released", state
    if keys and all(isinstance(value, dict) and {"scaleu_b", "scaleu_s"} == value.keys() for value in content.values()):
        tensors = {(name, index): value for index, group in content.items() for name, value in group.items()}
        tensors = rename_keys(path, tensors, lambda key: f"{key[0]}_{key[1]}")
        return "adapter", {"model": tensors}
    if "null_positive_feature" in keys:
        return "adapter", {"model": rename_keys(path, content, lambda key: f"position_net.{key}")}
    if keys and all(re.fullmatch(ADAPTER_KEYS, key) for key in keys):
        return "adapter", {"model": rename_keys(path, content)}
    raise InputError(
        f"{path}: neither an InstanceDiffusion checkpoint, a Stable Diffusion 1.5 model nor an adapter file; "
        f"its keys begin with {first_keys(keys)}"
    )


def rename_keys(path: Path, tensors: Mapping[Any, Any], rename: Callable[[Any], str] = str) -> dict[str, Any]:
    """Renames tensors. Two keys with the same new name are an error."""
    renamed, origin = {}, {}
    for key, value in tensors.items():
        name = rename(key)
        if name in origin:
            first, second = (repr(spelling)[:120] for spelling in (origin[name], key))
            raise InputError(f"{path}: {first} and {second} are one tensor, expected it once")
        renamed[name], origin[name] = value, key
    return renamed


def first_keys(keys: Iterable[Any]) -> str:
    """The first few keys of a file, for an error."""
    return ", ".join(short(str(key)).strip("'") for key in list(keys)[:5]) or "nothing"


def clip_key(key: Any) -> str:
    """Adds `text_model.`, which newer versions of transformers omit."""
    pattern = r"transformer\.(?=(embeddings|encoder|final_layer_norm)\.)"
    return re.sub(pattern, "transformer.text_model.", str(key), count=1)


def _split_base(path: Path, content: Mapping[Any, Any], config: ModelConfig, ignore_extra: bool) -> State:
    state: State = {part: {} for part in (*PARTS, "diffusion", "extra")}
    buffers = schedule_buffers(config.schedule)
    twice = [key for key in content if ignore_extra and clip_key(key) != key and clip_key(key) in content]
    for key in twice:
        if not np.array_equal(content[key], content[clip_key(key)]):
            raise InputError(f"{path}: {key} and {clip_key(key)} differ: two text encoders, expected one")
    for key, value in rename_keys(path, {k: v for k, v in content.items() if k not in twice}, clip_key).items():
        prefix = next((prefix for prefix in SD_PREFIXES if key.startswith(prefix)), None)
        if any(re.fullmatch(pattern, key) for pattern in SD_IGNORED):
            continue
        if prefix is not None:
            state[SD_PREFIXES[prefix]][key.removeprefix(prefix)] = value
        else:
            state["diffusion" if key in buffers else "extra"][key] = value
    state["extra"].update({key: content[key] for key in twice})
    return state


def _port_fusers(path: Path, content: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """Fusers of the ComfyUI port, in the order of the file: input, middle, output blocks."""
    gate = ".transformer_blocks.0.fuser.alpha_attn"
    tensors = {}
    for group in ("input_blocks", "middle_block", "output_blocks"):
        blocks = content[group]
        keys = [key for key in rename_table("model", config) if key.startswith(f"{group}.") and key.endswith(gate)]
        if not isinstance(blocks, dict) or len(blocks) != len(keys):
            count = len(blocks) if isinstance(blocks, dict) else 0
            raise InputError(f"{path}: {group}: {count} fusers, expected {len(keys)} from the config's sizes")
        for (index, block), key in zip(blocks.items(), keys, strict=True):
            if not isinstance(block, dict) or not isinstance(block.get("state"), dict):
                raise InputError(f"{path}: {group}.{index}: expected a dict with the entry state")
            sizes = block.get("params")
            heads = sizes.get("n_heads") if isinstance(sizes, dict) else None
            if heads is not None and heads != config.unet.num_heads:
                raise InputError(f"{path}: {group}.{index}: {heads} heads, config {config.unet.num_heads}")
            prefix = key.removesuffix("alpha_attn")
            tensors.update(rename_keys(path, block["state"], lambda name, prefix=prefix: f"{prefix}{name}"))
    return tensors


def split_convnext(path: Path, verify: bool) -> State:
    content = read_file(path, verify)
    if isinstance(content.get("model"), dict):
        content = content["model"]
    tensors = {
        key: value for key, value in rename_keys(path, content).items() if not re.fullmatch(CONVNEXT_IGNORED, key)
    }
    if "downsample_layers.0.0.weight" not in tensors:
        raise InputError(f"{path}: not ConvNeXt weights in their official layout: no downsample_layers.0.0.weight")
    return {"model": {f"{TRUNK_PREFIX}{key}": value for key, value in tensors.items()}}


def read_vae(path: Path, config: ModelConfig, verify: bool = True) -> State:
    """An autoencoder: a file in the released or in diffusers' layout, or a folder of diffusers' AutoencoderKL.

    Raises:
        InputError: if there is none.
    """
    if os.path.isdir(path):
        return {"autoencoder": diffusers.read_vae(path, config, verify)}
    content = read_file(path, verify)
    content = content["state_dict"] if isinstance(content.get("state_dict"), dict) else content
    tensors = rename_keys(path, content)
    prefix = "first_stage_model."
    if any(key.startswith(prefix) for key in tensors):
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    if any(key.startswith("decoder.up_blocks.") for key in tensors):
        tensors = diffusers.released_names("autoencoder", tensors, config)
    if "decoder.conv_in.weight" not in tensors:
        raise InputError(f"{path}: not a VAE: no decoder.conv_in.weight; its keys begin with {first_keys(tensors)}")
    return {"autoencoder": tensors}
