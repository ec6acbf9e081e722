"""Writes a model as a folder that diffusers' StableDiffusionPipeline loads.

The folder is the base: diffusers has no InstanceDiffusion. The adapters are beside it in one file under their released
names, which `instdiff convert` reads again.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from instdiff_jax.checkpoint.diffusers import ADAPTERS_FILE, FOLDERS, diffusers_table
from instdiff_jax.checkpoint.tokenizer_files import TOKENIZER_FILES
from instdiff_jax.checkpoint.torch_file import write_safetensors
from instdiff_jax.config import GROUPS, ModelConfig
from instdiff_jax.errors import InputError
from instdiff_jax.files import replace_folder, write_json
from instdiff_jax.tree import flatten

_INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "PNDMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def check_diffusers_output(path: Path, config: ModelConfig) -> None:
    """Raises InputError if `save_diffusers` must not write there, or diffusers has no such model."""
    if path.is_symlink() or (path.exists() and (not path.is_dir() or any(path.iterdir()))):
        raise InputError(f"{path}: expected a new or empty folder")
    if config.unet.positions:
        raise InputError(f"{path}: diffusers has no UNet that knows positions (config.model.unet.positions)")


def save_diffusers(path: Path, params: Mapping[str, Any], config: ModelConfig, tokenizer: Path) -> None:
    """Writes a model as a diffusers folder; it appears whole or not at all.

    Args:
        path: a new or empty folder.
        params: the parameter tree as numpy arrays, with or without adapters.
        config: the model's sizes.
        tokenizer: the folder of its tokenizer.

    Raises:
        InputError: if it must not write there, or for sizes that diffusers does not have.
    """
    check_diffusers_output(path, config)
    flat = flatten(params)
    with replace_folder(path.absolute()) as beside:
        adapters = {}
        for part, (name, stem) in FOLDERS.items():
            tensors = {}
            for theirs, (key, entry) in diffusers_table(part, config).items():
                if entry.group != "base":
                    if entry.path in flat:
                        adapters[key] = entry.to_torch(np.asarray(flat[entry.path]))
                    continue
                array = entry.to_torch(np.asarray(flat[entry.path]))
                in_attention = part == "autoencoder" and ".attentions." in theirs and array.ndim == 4
                tensors[theirs] = array[:, :, 0, 0] if in_attention else array
            (beside / name).mkdir()
            write_safetensors(beside / name / f"{stem}.safetensors", tensors)
        if adapters:
            (beside / ADAPTERS_FILE).parent.mkdir()
            write_safetensors(beside / ADAPTERS_FILE, adapters)
        (beside / "tokenizer").mkdir()
        for name in TOKENIZER_FILES:
            if (tokenizer / name).is_file():
                shutil.copyfile(tokenizer / name, beside / "tokenizer" / name)
        for name, settings in _settings(config, tokenizer).items():
            write_json(beside / name, settings, indent=2)


def _settings(config: ModelConfig, tokenizer: Path) -> dict[str, dict[str, Any]]:
    """The content of every .json file, by its name."""
    unet, vae, schedule = config.unet, config.autoencoder, config.schedule
    attends = [2**level in unet.attention_resolutions for level in range(len(unet.channel_mult))]
    scheduler = {
        "_class_name": "PNDMScheduler",
        "beta_start": schedule.linear_start,
        "beta_end": schedule.linear_end,
        "beta_schedule": "scaled_linear",
        "num_train_timesteps": schedule.timesteps,
        "prediction_type": "epsilon" if schedule.prediction == "epsilon" else "v_prediction",
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
    }
    return {
        "model_index.json": _INDEX,
        "scheduler/scheduler_config.json": scheduler,
        "unet/config.json": {
            "_class_name": "UNet2DConditionModel",
            "attention_head_dim": unet.num_heads,  # as its name does not say: the number of heads
            "block_out_channels": [mult * unet.model_channels for mult in unet.channel_mult],
            "cross_attention_dim": unet.context_dim,
            "down_block_types": ["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
            "in_channels": unet.in_channels,
            "layers_per_block": unet.num_res_blocks,
            "out_channels": unet.out_channels,
            "up_block_types": ["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        },
        "vae/config.json": {
            "_class_name": "AutoencoderKL",
            "block_out_channels": [mult * vae.ch for mult in vae.ch_mult],
            "down_block_types": ["DownEncoderBlock2D"] * len(vae.ch_mult),
            "latent_channels": vae.z_channels,
            "layers_per_block": vae.num_res_blocks,
            "norm_num_groups": GROUPS,
            "scaling_factor": vae.scale_factor,
            "up_block_types": ["UpDecoderBlock2D"] * len(vae.ch_mult),
        },
        "text_encoder/config.json": _text_settings(config, tokenizer),
    }


def _text_settings(config: ModelConfig, tokenizer: Path) -> dict[str, Any]:
    text = config.text_encoder
    vocabulary = tokenizer / "vocab.json"
    if vocabulary.is_file():
        ids = json.loads(vocabulary.read_text(encoding="utf-8"))
    else:
        ids = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["model"]["vocab"]
    return {
        "architectures": ["CLIPTextModel"],
        "bos_token_id": ids.get("<|startoftext|>"),
        "eos_token_id": ids.get("<|endoftext|>"),
        "hidden_act": "quick_gelu",
        "hidden_size": text.hidden_size,
        "intermediate_size": text.intermediate_size,
        "max_position_embeddings": text.max_length,
        "model_type": "clip_text_model",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.num_layers,
        "pad_token_id": 1,
        "projection_dim": text.hidden_size,
        "vocab_size": text.vocab_size,
    }
