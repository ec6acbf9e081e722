"""The official code from a user's clone: its classes and networks.

    git clone https://github.com/frank-xwang/InstanceDiffusion

Importing its modules here needs no window toolkit, GPU, timm or torchvision, and downloads nothing.
"""

import contextlib
import importlib
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch

# Imported before the stubs below replace modules that transformers looks for.
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.cli import check_clone
from benchmarks.models import make_array
from instdiff_jax.config import AutoencoderConfig, ModelConfig, TextEncoderConfig

CLASSES = {
    "GroundingNetInput": "grounding_input.text_grounding_tokinzer_input",
    "AutoencoderKL": "ldm.models.autoencoder",
    "LatentDiffusion": "ldm.models.diffusion.ldm",
    "PLMSSampler": "ldm.models.diffusion.plms",
    "PLMSSamplerInst": "ldm.models.diffusion.plms_instance",
    "UNetModel": "ldm.modules.diffusionmodules.openaimodel",
    "get_trainable_params": "utils.optimizer",
    "update_ema": "utils.optimizer",
}
FORMATS = ("boxes", "points", "scribbles", "masks")


def _stub(name: str, **members: Any) -> types.ModuleType:
    module = types.ModuleType(name)
    module.__dict__.update(members)
    return module


@contextlib.contextmanager
def official_classes(clone: str | Path) -> Iterator[types.SimpleNamespace]:
    """The official classes and functions of CLASSES, for use inside the context.

    Raises:
        InputError: if the folder is not a clone of the official repository.
    """
    check_clone(clone)
    timm = [
        _stub("timm"),
        _stub("timm.models"),
        _stub("timm.models.layers", trunc_normal_=torch.nn.init.trunc_normal_, DropPath=torch.nn.Identity),
        _stub("timm.models.registry", register_model=lambda function: function),
    ]
    others = [_stub("tkinter"), _stub("tkinter.messagebox", NO="no"), _stub("torchvision")]
    missing = {module.__name__: module for module in timm + others if module.__name__ not in sys.modules}
    with (
        mock.patch.dict(sys.modules, missing),
        mock.patch.object(sys, "path", [str(clone), *sys.path]),
        mock.patch("torch.hub.load_state_dict_from_url", lambda **_: {"model": {}}),
    ):
        found = {name: getattr(importlib.import_module(module), name) for name, module in CLASSES.items()}
        yield types.SimpleNamespace(**found)


# Makes an array for a key and a shape.
MakeWeights = Callable[[str, tuple[int, ...]], np.ndarray]


def _load_made_up(network: torch.nn.Module, weights: MakeWeights) -> None:
    for key, value in network.state_dict().items():
        value.copy_(torch.from_numpy(weights(key, tuple(value.shape))))


def build_unet(
    official: types.SimpleNamespace,
    model: ModelConfig,
    kept: tuple[str, ...],
    weights: MakeWeights = make_array,
    **options: Any,
) -> torch.nn.Module:
    """The official UNet with deterministic weights.

    Args:
        official: the classes.
        model: sizes.
        kept: formats that are used; the others are dropped as in the official configs.
        weights: makes them.
        options: `use_checkpoint` and `efficient_attention`; off by default here, on in the released configs.
    """
    unet = model.unet
    tokenizer = dict(in_dim=768, out_dim=768, mid_dim=model.unifusion.mid_dim, use_seperate_tokenizer=True)
    tokenizer |= {f"test_drop_{name}": name not in kept for name in FORMATS}
    options = dict(use_checkpoint=False, efficient_attention=False) | options
    network = official.UNetModel(
        image_size=64,
        in_channels=unet.in_channels,
        out_channels=unet.out_channels,
        model_channels=unet.model_channels,
        attention_resolutions=list(unet.attention_resolutions),
        num_res_blocks=unet.num_res_blocks,
        channel_mult=list(unet.channel_mult),
        num_heads=unet.num_heads,
        transformer_depth=1,
        context_dim=unet.context_dim,
        fuser_type="gatedSA",
        sd_v1_5=True,
        grounding_tokenizer=dict(target="ldm.modules.diffusionmodules.text_grounding_net.UniFusion", params=tokenizer),
        **options,
    ).eval()
    _load_made_up(network, weights)
    network.grounding_tokenizer_input = official.GroundingNetInput()
    # It would read a file that is not in the repository, for a layer that is frozen.
    network.restore_first_conv_from_SD = lambda: None
    return network


def build_autoencoder(
    official: types.SimpleNamespace, sizes: AutoencoderConfig, weights: MakeWeights = make_array
) -> torch.nn.Module:
    """The official autoencoder with deterministic weights."""
    details = dict(
        double_z=True,
        z_channels=sizes.z_channels,
        resolution=256,
        in_channels=3,
        out_ch=3,
        ch=sizes.ch,
        ch_mult=list(sizes.ch_mult),
        num_res_blocks=sizes.num_res_blocks,
        attn_resolutions=[],
        dropout=0.0,
    )
    network = official.AutoencoderKL(ddconfig=details, embed_dim=sizes.z_channels, scale_factor=sizes.scale_factor)
    _load_made_up(network, weights)
    return network.eval()


def build_text_encoder(sizes: TextEncoderConfig) -> torch.nn.Module:
    """The text encoder of transformers that the official code uses, with random weights."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=sizes.vocab_size,
            hidden_size=sizes.hidden_size,
            intermediate_size=sizes.intermediate_size,
            num_hidden_layers=sizes.num_layers,
            num_attention_heads=sizes.num_heads,
            max_position_embeddings=sizes.max_length,
        )
    ).eval()


def set_alpha(network: torch.nn.Module, alpha: float) -> None:
    """Sets the fusers' scale."""
    for module in network.modules():
        if type(module).__name__ == "GatedSelfAttentionDense":
            module.scale = float(alpha)


def alphas(length: int, fractions: tuple[float, float, float]) -> list[float]:
    """Alpha of each step: ones, a linear decay, zeros; lengths are truncated."""
    ones, fall = int(fractions[0] * length), int(fractions[1] * length)
    return [1.0] * ones + [1 - (i + 1) / fall for i in range(fall)] + [0.0] * (length - ones - fall)
