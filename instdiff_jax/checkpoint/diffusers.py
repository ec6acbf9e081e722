"""Reads the folders that diffusers' `save_pretrained` writes: Stable Diffusion 1.5, and InstanceDiffusion's port.

A folder holds unet/, vae/, text_encoder/, tokenizer/ and scheduler/. Weights are .safetensors or .bin, whole or in
several files with an index, in full or half precision. The port keeps the adapters in the UNet, under their released
names: `position_net.*`, `….fuser.*`, `scaleu_b_N` and `scaleu_s_N`.

The scheduler's betas are not read: Stable Diffusion's are "scaled_linear", whatever the port's file says.
"""

import functools
import logging
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from instdiff_jax.checkpoint.others import PREDICTIONS, refuse_other_folder
from instdiff_jax.checkpoint.rename import first_few
from instdiff_jax.checkpoint.tables import Entry, rename_table
from instdiff_jax.checkpoint.torch_file import read_file
from instdiff_jax.config import ModelConfig
from instdiff_jax.errors import InputError, short
from instdiff_jax.files import read_json

_logger = logging.getLogger(__name__)

# Our part -> its folder, and the name of its files.
FOLDERS = {
    "model": ("unet", "diffusion_pytorch_model"),
    "autoencoder": ("vae", "diffusion_pytorch_model"),
    "text_encoder": ("text_encoder", "model"),
}
ADAPTERS_FILE = "instancediffusion/adapters.safetensors"  # beside the parts, in folders that we write

# Patterns of our paths, without the network's name -> diffusers' modules. {last} minus a level counts from the bottom.
_UNET = (
    (r"time_in", "time_embedding.linear_1"),
    (r"time_out", "time_embedding.linear_2"),
    (r"norm_out", "conv_norm_out"),
    (r"down_(\d+)_(res|attn)_(\d+)", "down_blocks.{0}.{1}.{2}"),
    (r"down_(\d+)_downsample", "down_blocks.{0}.downsamplers.0.conv"),
    (r"mid_res_(\d+)", "mid_block.resnets.{0}"),
    (r"mid_attn", "mid_block.attentions.0"),
    (r"up_(\d+)_(res|attn)_(\d+)", "up_blocks.{0}.{1}.{2}"),
    (r"up_(\d+)_upsample", "up_blocks.{0}.upsamplers.0.conv"),
)
_VAE = (
    (r"norm_out", "conv_norm_out"),
    (r"down_(\d+)_block_(\d+)", "down_blocks.{0}.resnets.{1}"),
    (r"down_(\d+)_downsample", "down_blocks.{0}.downsamplers.0.conv"),
    (r"mid_block_(\d+)", "mid_block.resnets.{0}"),
    (r"mid_attn", "mid_block.attentions.0"),
    (r"up_(\d+)_block_(\d+)", "up_blocks.{0}.resnets.{1}"),
    (r"up_(\d+)_upsample", "up_blocks.{0}.upsamplers.0.conv"),
)
_KINDS = {"res": "resnets", "attn": "attentions"}
_RES_BLOCK = {"time_proj": "time_emb_proj", "skip": "conv_shortcut"}
_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "out": "to_out.0"}
# Names of the VAE's attention before diffusers 0.18.
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def _module(name: str, patterns: Iterable[tuple[str, str]], last: int) -> str:
    """diffusers' name of one of our modules."""
    for pattern, theirs in patterns:
        if found := re.fullmatch(pattern, name):
            groups = [_KINDS.get(group, group) for group in found.groups()]
            if name.startswith("up_"):
                groups[0] = str(last - int(groups[0]))
            if name.startswith("mid_block_"):  # ours count from 1, as the released ones do
                groups[0] = str(int(groups[0]) - 1)
            return theirs.format(*groups)
    return name


def _unet_key(key: str, path: tuple[str, ...], last: int) -> str:
    block, leaf = path[1], key.rsplit(".", 1)[-1]
    if block.startswith("scaleu_"):
        return key
    module = _module(block, _UNET, last)
    if "attn" in block:  # inside a transformer the names are the released ones
        return f"{module}.{key.split('.', 2 if key.startswith('middle_block') else 3)[-1]}"
    inside = [_RES_BLOCK.get(name, name) for name in path[2:-1]]
    return ".".join([module, *inside, leaf])


def _vae_key(key: str, path: tuple[str, ...], last: int) -> str:
    half, leaf = path[1], key.rsplit(".", 1)[-1]
    if half not in ("encoder", "decoder"):
        return key
    names = _VAE_ATTENTION if path[2] == "mid_attn" else _RES_BLOCK
    inside = [names.get(name, name) for name in path[3:-1]]
    return ".".join([half, _module(path[2], _VAE, last), *inside, leaf])


@functools.lru_cache(maxsize=16)
def diffusers_table(part: str, config: ModelConfig) -> dict[str, tuple[str, Entry]]:
    """Every key of a part in diffusers' layout, with its released key and its entry.

    Args:
        part: one of `tables.PARTS`; "model" has UniFusion and the other adapters as the port has them.
        config: the model's sizes.
    """
    found = {}
    for key, entry in rename_table(part, config).items():
        if part == "text_encoder":
            theirs = key.removeprefix("transformer.")
        elif part == "autoencoder":
            theirs = _vae_key(key, entry.path, len(config.autoencoder.ch_mult) - 1)
        elif entry.path[0] == "unet":
            theirs = _unet_key(key, entry.path, len(config.unet.channel_mult) - 1)
        else:
            theirs = key
        found[theirs] = key, entry
    return found


def released_names(part: str, tensors: Mapping[str, Any], config: ModelConfig) -> dict[str, Any]:
    """A part's tensors under their released names, and of their shapes; unknown ones keep their names."""
    table = diffusers_table(part, config)
    renamed = {}
    for name, value in tensors.items():
        theirs = name
        if part == "autoencoder":
            pattern = r"(?<=mid_block\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)"
            theirs = re.sub(pattern, lambda found: _OLD_ATTENTION[found[1]], name)
        elif part == "text_encoder" and not name.startswith("text_model."):
            theirs = f"text_model.{name}"
        key, entry = table.get(theirs, (name, None))
        if entry is None and part == "text_encoder":
            key = f"transformer.{theirs}"
        if key in renamed:
            raise InputError(f"{name}: one tensor under two names, expected it once")
        renamed[key] = value if entry is None else _with_shape(value, entry.torch_shape)
    return renamed


def _with_shape(value: Any, shape: tuple[int, ...]) -> Any:
    """A linear layer's kernel as a 1x1 convolution's, or the other way, where `shape` wants it."""
    found = getattr(value, "shape", shape)
    same = found != shape and found[:2] == shape[:2] and {*found[2:], *shape[2:]} == {1}
    return value.reshape(shape) if same else value


def is_diffusers(folder: Path) -> bool:
    """Whether a folder is one that diffusers wrote."""
    return (folder / "model_index.json").is_file() or (folder / "unet").is_dir()


def cached_folder(name: Path) -> Path:
    """The folder of a hub name in the hub's local cache; the network is not used.

    Raises:
        InputError: if it is not there.
    """
    from huggingface_hub import try_to_load_from_cache

    for file in ("model_index.json", "unet/config.json"):
        try:
            found = try_to_load_from_cache(name.as_posix(), file)
        except ValueError:  # not a possible name on the hub
            break
        if isinstance(found, str):
            return Path(found).parents[file.count("/")]
    raise InputError(f"{name}: no such file or folder, and no such name in the hub's local cache")


def read_folder(path: Path, config: ModelConfig, verify: bool = True) -> tuple[str, dict[str, dict[str, Any]]]:
    """Reads a diffusers folder.

    Returns:
        Its kind, "released" if it has adapters and "base" otherwise, and its tensors by part under their released
        names.

    Raises:
        InputError: for another model, missing or damaged files, and settings that the model's sizes do not have.
    """
    settings = {"": _settings(path / "model_index.json"), "scheduler": _settings(path / "scheduler", "scheduler_")}
    settings |= {name: _settings(path / name) for name, _ in FOLDERS.values()}
    refuse_other_folder(path, config, settings)
    _check_settings(path, config, settings)
    state = {}
    for part, (name, stem) in FOLDERS.items():
        state[part] = _read_part(path / name, stem, part, config, verify)
    if (path / ADAPTERS_FILE).is_file():
        state["model"] |= read_file(path / ADAPTERS_FILE, verify)
    adapters = any(key.startswith("position_net.") or ".fuser." in key for key in state["model"])
    return "released" if adapters else "base", state


def read_vae(path: Path, config: ModelConfig, verify: bool = True) -> dict[str, Any]:
    """The autoencoder of a diffusers folder, or of the folder of an AutoencoderKL, under its released names."""
    path = path / "vae" if (path / "vae").is_dir() else path
    _check_vae(path, config, _settings(path))
    return _read_part(path, FOLDERS["autoencoder"][1], "autoencoder", config, verify)


def _settings(path: Path, prefix: str = "") -> dict[str, Any]:
    """The settings of a part, from its config.json; {} if it has none."""
    file = path if path.suffix == ".json" else path / f"{prefix}config.json"
    values = read_json(file) if file.is_file() else {}
    if not isinstance(values, dict):
        raise InputError(f"{file}: expected settings by name, got {short(values)}")
    return values


def _check_settings(path: Path, config: ModelConfig, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """What no tensor's shape shows."""
    unet, text = settings["unet"], settings["text_encoder"]
    # As its name does not say, attention_head_dim is the number of heads; one for all levels or one for each.
    heads = unet.get("num_attention_heads") or unet.get("attention_head_dim", 8)
    checks = [
        ("unet", "attention_head_dim", heads if not isinstance(heads, list) else set(heads),
         config.unet.num_heads if not isinstance(heads, list) else {config.unet.num_heads}),
        ("text_encoder", "num_attention_heads", text.get("num_attention_heads", config.text_encoder.num_heads),
         config.text_encoder.num_heads),
        ("text_encoder", "hidden_act", text.get("hidden_act", "quick_gelu"), "quick_gelu"),
    ]  # fmt: skip
    for part, name, found, expected in checks:
        if found != expected:
            raise InputError(f"{path / part}: {name}: expected {short(expected)}, got {short(found)}")
    _check_vae(path / "vae", config, settings["vae"])
    betas = settings["scheduler"].get("beta_schedule", "scaled_linear")
    if betas != "scaled_linear":
        _logger.warning("%s: scheduler: beta_schedule %s is not used: scaled_linear is", path, short(betas))
    for name, ours in (("beta_start", config.schedule.linear_start), ("beta_end", config.schedule.linear_end)):
        found = settings["scheduler"].get(name, ours)
        if betas == "scaled_linear" and found != ours:
            raise InputError(f"{path}: scheduler: {name}: expected config.model.schedule's {ours}, got {short(found)}")


def _check_vae(path: Path, config: ModelConfig, settings: Mapping[str, Any]) -> None:
    expected = config.autoencoder.scale_factor
    if (found := settings.get("scaling_factor", expected)) != expected:
        raise InputError(f"{path}: scaling_factor: expected {expected}, got {short(found)}; it is another model's VAE")


def _read_part(folder: Path, stem: str, part: str, config: ModelConfig, verify: bool) -> dict[str, Any]:
    tensors: dict[str, Any] = {}
    for file in weight_files(folder, stem):
        content = read_file(file, verify)
        if twice := tensors.keys() & content.keys():
            raise InputError(f"{file}: {first_few(sorted(twice))}: already given by another file of {folder}")
        tensors |= content
    try:
        return released_names(part, tensors, config)
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error


def weight_files(folder: Path, stem: str) -> list[Path]:
    """The files of a part's weights: .safetensors before .bin, whole before several, full before half precision."""
    names = [(stem, "safetensors"), ("pytorch_model" if stem == "model" else stem, "bin")]
    for name, end in names:
        for variant in ("", ".fp16"):
            if (file := folder / f"{name}{variant}.{end}").is_file():
                return [file]
            # diffusers moved the variant to the end of the index's name in 0.32.
            for index in (f"{name}{variant}.{end}.index.json", f"{name}.{end}.index{variant}.json"):
                if (folder / index).is_file():
                    return _indexed(folder / index)
    wanted = " or ".join(f"{name}.{end}" for name, end in names)
    found = ", ".join(sorted(os.listdir(folder))[:5]) if folder.is_dir() else "no such folder"
    raise InputError(f"{folder}: expected {wanted}, found {found or 'nothing'}")


def _indexed(index: Path) -> list[Path]:
    values = read_json(index)
    names = values.get("weight_map") if isinstance(values, dict) else None
    if not isinstance(names, dict) or not all(
        isinstance(name, str) and re.fullmatch(r"[\w.-]+", name) for name in names.values()
    ):
        raise InputError(f"{index}: weight_map: expected the names of files in this folder")
    files = [index.parent / name for name in sorted(set(names.values()))]
    for file in files:
        if not file.is_file():
            raise InputError(f"{file}: missing; {index.name} lists it")
    return files


def prediction_of(path: Path) -> str | None:
    """What a diffusers folder says that its UNet predicts, as in `ScheduleConfig`; None if it says nothing we know."""
    if not os.path.exists(path):
        try:
            path = cached_folder(path)
        except InputError:
            return None
    found = _settings(path / "scheduler", "scheduler_").get("prediction_type") if os.path.isdir(path) else None
    return PREDICTIONS.get(found) if isinstance(found, str) else None


def tokenizer_of(path: Path) -> Path | None:
    """The tokenizer's folder of a diffusers folder (perhaps a cached one) or a checkpoint folder, if there is one."""
    if not os.path.exists(path):
        try:
            path = cached_folder(path)
        except InputError:
            return None
    return path / "tokenizer" if os.path.isdir(path / "tokenizer") else None
