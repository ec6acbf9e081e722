"""Imports PyTorch checkpoints as our parameter tree and writes them back.

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

A base and several adapter files form one model. With a base, only the adapters of the released checkpoint are used.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from instdiff_jax.checkpoint.rename import from_state_dict, is_ignored, to_state_dict
from instdiff_jax.checkpoint.shapes import ADAPTERS
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.checkpoint.torch_file import read_file, write_safetensors, write_torch
from instdiff_jax.config import ModelConfig, ScheduleConfig
from instdiff_jax.errors import InputError

# Stable Diffusion's prefix of each part, and the keys of its files that are not used.
SD_PREFIXES = {
    "model.diffusion_model.": "model",
    "first_stage_model.": "autoencoder",
    "cond_stage_model.": "text_encoder",
}
SD_IGNORED = (
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
FLOATS = tuple(np.dtype(d) for d in (np.float16, ml_dtypes.bfloat16, np.float32, np.float64))

State = dict[str, dict[str, Any]]  # part -> key -> array; parts are PARTS and "diffusion"


def load_pytorch(
    paths: Sequence[str | Path], config: ModelConfig, convnext: str | Path | None = None, verify: bool = True
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Reads PyTorch files as one model. Leaves are read-only views of the memory-mapped files, in their dtype.

    Args:
        paths: the released checkpoint, or a base and any adapter files, in any order.
        config: the model's sizes.
        convnext: ImageNet weights of ConvNeXt in their official layout, for UniFusion's trunk.
        verify: compare the files with the checksums in them.

    Returns:
        The parameter tree, and which of ADAPTERS it lacks.

    Raises:
        InputError: for unreadable or unknown files, for a key that is missing, extra, of another shape,
            given twice, not finite or not a float tensor, and for buffers of another noise schedule.
    """
    files = [(Path(path), *_split_file(Path(path), read_file(path, verify), config)) for path in paths]
    has_base = any(kind == "base" for _, kind, _ in files)
    if convnext is not None:
        files.append((Path(convnext), "adapter", _split_convnext(Path(convnext), verify)))
    merged: State = {part: {} for part in (*PARTS, "diffusion")}
    origin: dict[tuple[str, str], Path] = {}
    for path, kind, state in files:
        if kind == "released" and has_base:
            kept = {key: value for key, value in state["model"].items() if re.fullmatch(ADAPTER_KEYS, key)}
            state = {"model": kept}
        for part, tensors in state.items():
            for key, value in tensors.items():
                if part != "diffusion" and is_ignored(part, key):
                    continue
                if (part, key) in origin:
                    raise InputError(f"{path}: {key}: already given by {origin[part, key]}")
                if not isinstance(value, np.ndarray) or value.dtype not in FLOATS:
                    found = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
                    raise InputError(f"{path}: {part}: {key}: expected a tensor of floats, got {found}")
                if not _is_finite(value):
                    raise InputError(f"{path}: {part}: {key}: holds NaN or infinity, expected finite numbers")
                origin[part, key] = path
                merged[part][key] = value
    source = ", ".join(str(path) for path, _, _ in files)
    _check_schedule(merged["diffusion"], config.schedule, source)
    table = rename_table("model", config)
    present = {table[key].group for key in merged["model"] if key in table}
    absent = tuple(group for group in ADAPTERS if group not in present)
    params: dict[str, Any] = {}
    for part in PARTS:
        params.update(from_state_dict(part, merged[part], config, absent, source))
    return params, absent


def _is_finite(value: np.ndarray) -> bool:
    # Minimum and maximum propagate NaN, and allocate no array of the tensor's size.
    with np.errstate(invalid="ignore"):
        return not value.size or bool(np.isfinite(value.min()) and np.isfinite(value.max()))


def _split_file(path: Path, content: dict[str, Any], config: ModelConfig) -> tuple[str, State]:
    """The kind of a file ("released", "base" or "adapter"), and its tensors by part under their released names."""
    if isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if all(isinstance(content.get(part), dict) for part in PARTS):
        ema = content.get("ema")
        model = ema if isinstance(ema, dict) and ema else content["model"]
        diffusion = content.get("diffusion")
        return "released", {
            "model": _rename(path, model),
            "autoencoder": _rename(path, content["autoencoder"]),
            "text_encoder": _rename(path, content["text_encoder"], _clip_key),
            "diffusion": _rename(path, diffusion) if isinstance(diffusion, dict) else {},
        }
    if {"input_blocks", "middle_block", "output_blocks"} <= content.keys():
        return "adapter", {"model": _port_fusers(path, content, config)}
    keys = [str(key) for key in content]
    if any(key.startswith("model.diffusion_model.") for key in keys):
        return "base", _split_base(path, content, config)
    prefixes = tuple(f"{part}." for part in (*PARTS, "diffusion"))
    if keys and all(key.startswith(prefixes) for key in keys):
        state: State = {}
        for key, value in _rename(path, content).items():
            part, name = key.split(".", 1)
            state.setdefault(part, {})[name] = value
        return "released", state
    if keys and all(isinstance(value, dict) and {"scaleu_b", "scaleu_s"} == value.keys() for value in content.values()):
        tensors = {(name, index): value for index, group in content.items() for name, value in group.items()}
        tensors = _rename(path, tensors, lambda key: f"{key[0]}_{key[1]}")
        return "adapter", {"model": tensors}
    if "null_positive_feature" in keys:
        return "adapter", {"model": _rename(path, content, lambda key: f"position_net.{key}")}
    if keys and all(re.fullmatch(ADAPTER_KEYS, key) for key in keys):
        return "adapter", {"model": _rename(path, content)}
    raise InputError(
        f"{path}: neither an InstanceDiffusion checkpoint, a Stable Diffusion 1.5 model nor an adapter file; "
        f"its keys begin with {', '.join(keys[:5]) or 'nothing'}"
    )


def _rename(path: Path, tensors: Mapping[Any, Any], rename: Callable[[Any], str] = str) -> dict[str, Any]:
    """Renames tensors. Two keys with the same new name are an error."""
    renamed, origin = {}, {}
    for key, value in tensors.items():
        name = rename(key)
        if name in origin:
            first, second = (repr(spelling)[:120] for spelling in (origin[name], key))
            raise InputError(f"{path}: {first} and {second} are one tensor, expected it once")
        renamed[name], origin[name] = value, key
    return renamed


def _clip_key(key: Any) -> str:
    """Adds `text_model.`, which newer versions of transformers omit."""
    pattern = r"transformer\.(?=(embeddings|encoder|final_layer_norm)\.)"
    return re.sub(pattern, "transformer.text_model.", str(key), count=1)


def _split_base(path: Path, content: Mapping[Any, Any], config: ModelConfig) -> State:
    state: State = {part: {} for part in (*PARTS, "diffusion")}
    buffers = schedule_buffers(config.schedule)
    for key, value in _rename(path, content, _clip_key).items():
        prefix = next((prefix for prefix in SD_PREFIXES if key.startswith(prefix)), None)
        if any(re.fullmatch(pattern, key) for pattern in SD_IGNORED):
            continue
        if prefix is not None:
            state[SD_PREFIXES[prefix]][key.removeprefix(prefix)] = value
        elif key in buffers:
            state["diffusion"][key] = value
        else:
            raise InputError(f"{path}: {key}: not a key of Stable Diffusion 1.5")
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
            tensors.update(_rename(path, block["state"], lambda name, prefix=prefix: f"{prefix}{name}"))
    return tensors


def _split_convnext(path: Path, verify: bool) -> State:
    content = read_file(path, verify)
    if isinstance(content.get("model"), dict):
        content = content["model"]
    tensors = {key: value for key, value in _rename(path, content).items() if not re.fullmatch(CONVNEXT_IGNORED, key)}
    if "downsample_layers.0.0.weight" not in tensors:
        raise InputError(f"{path}: not ConvNeXt weights in their official layout: no downsample_layers.0.0.weight")
    return {"model": {f"{TRUNK_PREFIX}{key}": value for key, value in tensors.items()}}


def schedule_buffers(schedule: ScheduleConfig) -> dict[str, np.ndarray]:
    """The released checkpoint's "diffusion" entry: float32 [timesteps] each, computed in float64 (DDPM, eqs. 4-7)."""
    betas = np.linspace(schedule.linear_start**0.5, schedule.linear_end**0.5, schedule.timesteps, dtype=np.float64) ** 2
    bar = np.cumprod(1 - betas)
    before = np.append(1.0, bar[:-1])
    variance = betas * (1 - before) / (1 - bar)
    buffers = {
        "betas": betas,
        "alphas_cumprod": bar,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": np.sqrt(bar),
        "sqrt_one_minus_alphas_cumprod": np.sqrt(1 - bar),
        "log_one_minus_alphas_cumprod": np.log(1 - bar),
        "sqrt_recip_alphas_cumprod": np.sqrt(1 / bar),
        "sqrt_recipm1_alphas_cumprod": np.sqrt(1 / bar - 1),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": np.log(np.maximum(variance, 1e-20)),
        "posterior_mean_coef1": betas * np.sqrt(before) / (1 - bar),
        "posterior_mean_coef2": (1 - before) * np.sqrt(1 - betas) / (1 - bar),
    }
    return {name: value.astype(np.float32) for name, value in buffers.items()}


def _check_schedule(found: Mapping[str, np.ndarray], schedule: ScheduleConfig, source: str) -> None:
    """Checks that a file's buffers match the config. They are computed, never loaded."""
    expected = schedule_buffers(schedule)
    for name, value in found.items():
        if name not in expected:
            raise InputError(f"{source}: diffusion: {name}: not a buffer of the noise schedule")
        if value.shape != expected[name].shape:
            sizes = f"file {list(value.shape)}, config {list(expected[name].shape)}"
            raise InputError(f"{source}: diffusion: {name} ({sizes}): config.model.schedule does not match")
        # Half-precision files round to about 1e-3; other schedules differ by far more.
        if name in ("betas", "alphas_cumprod"):
            error = np.abs(value.astype(np.float64) - expected[name]).max() / expected[name].max()
            if not error < 2e-3:
                raise InputError(f"{source}: diffusion: {name}: differs from config.model.schedule by {error:.1e}")


def save_pytorch(path: str | Path, params: dict[str, Any], config: ModelConfig) -> None:
    """Writes a checkpoint in the released layout, which the official code loads with strict=True.

    Empties `params` while writing, to avoid a second copy of the model.

    Args:
        path: .pth (a dict of model, autoencoder, text_encoder and diffusion; needs torch) or .safetensors
            (the same as flat keys with these prefixes; needs no torch).
        params: the whole parameter tree as numpy arrays; empty afterwards.
        config: the model's sizes.

    Raises:
        InputError: for another file ending, an incomplete tree, or a .pth without torch installed.
    """
    path = Path(path)
    check_export_path(path)
    content: State = {part: to_state_dict(part, params, config) for part in PARTS}
    params.clear()
    content["diffusion"] = dict(schedule_buffers(config.schedule))
    if path.suffix == ".pth":
        write_torch(path, content)
    else:
        write_safetensors(path, {f"{part}.{key}": x for part, group in content.items() for key, x in group.items()})


def check_export_path(path: Path) -> None:
    """Raises InputError if `save_pytorch` could not write to this path."""
    if path.suffix not in (".pth", ".safetensors"):
        raise InputError(f"{path}: expected a name ending in .pth or .safetensors")
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist")
    if path.suffix == ".pth" and importlib.util.find_spec("torch") is None:
        raise InputError(f"{path}: writing .pth needs torch; write .safetensors, or install torch")
