"""diffusers' UNet with gated (GLIGEN) attention and ours, with the same weights.

diffusers has no ScaleU: ours has zeros there, which is a factor of 1.
"""

import re

import numpy as np
import pytest

from common import make_array
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.config import ModelConfig, UNetConfig
from instdiff_jax.tree import unflatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONTEXT = 96
ONE_LEVEL = UNetConfig(
    in_channels=4,
    out_channels=4,
    model_channels=64,  # two a group: a norm over one channel has no gradient to the time embedding
    channel_mult=(1,),
    num_res_blocks=1,
    attention_resolutions=(1,),
    num_heads=4,
    context_dim=CONTEXT,
)

RES_BLOCK = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip


def official_key(key: str, config: UNetConfig) -> str:
    """diffusers' name of a parameter as the released checkpoint's."""
    for theirs, name in OUTSIDE.items():
        if key.startswith(f"{theirs}."):
            return name + key.removeprefix(theirs)
    side, *rest = re.fullmatch(r"(down|mid|up)_blocks?\.(?:(\d+)\.)?(\w+)\.(\d+)\.(.*)", key).groups()
    level, kind, i, leaf = rest[0], rest[1], int(rest[2]), rest[3]
    blocks = config.num_res_blocks
    if kind == "resnets":
        name, parameter = leaf.rsplit(".", 1)
        leaf = f"{RES_BLOCK[name]}.{parameter}"
    if side == "mid":
        return f"middle_block.{1 if kind == 'attentions' else 2 * i}.{leaf}"
    inside = {"resnets": 0, "attentions": 1}
    if side == "down":
        index = 1 + int(level) * (blocks + 1) + (blocks if kind == "downsamplers" else i)
        return (
            f"input_blocks.{index}.0.op.{leaf.removeprefix('conv.')}"
            if kind == "downsamplers"
            else f"input_blocks.{index}.{inside[kind]}.{leaf}"
        )
    index = int(level) * (blocks + 1) + (blocks if kind == "upsamplers" else i)
    if kind == "upsamplers":
        attends = 2 ** (len(config.channel_mult) - 1 - int(level)) in config.attention_resolutions
        return f"output_blocks.{index}.{1 + attends}.{leaf}"
    return f"output_blocks.{index}.{inside[kind]}.{leaf}"


class Given(torch.nn.Module):
    """In place of GLIGEN's own tokens: those it is given."""

    def forward(self, objs):
        return objs


def scaled(name: str, array: np.ndarray, scales: dict[str, float]) -> np.ndarray:
    """The array times the scale of the first pattern that is found in the parameter's name."""
    factor = next((scale for pattern, scale in scales.items() if re.search(pattern, name)), 1.0)
    return np.asarray(np.float32(factor) * array)


def their_unet(config: UNetConfig, scales: dict[str, float] = {}):
    attends = [2**level in config.attention_resolutions for level in range(len(config.channel_mult))]
    unet = diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        block_out_channels=[mult * config.model_channels for mult in config.channel_mult],
        layers_per_block=config.num_res_blocks,
        down_block_types=["CrossAttnDownBlock2D" if attend else "DownBlock2D" for attend in attends],
        up_block_types=["CrossAttnUpBlock2D" if attend else "UpBlock2D" for attend in reversed(attends)],
        cross_attention_dim=config.context_dim,
        attention_head_dim=config.num_heads,  # as its name does not say: the number of heads
        attention_type="gated",
    ).eval()
    unet.position_net = Given()
    names = {key: official_key(key, config) for key in unet.state_dict()}
    shapes = {key: value.shape for key, value in unet.state_dict().items()}
    state = {key: scaled(name, make_array(name, shapes[key]), scales) for key, name in names.items()}
    unet.load_state_dict({key: torch.from_numpy(value) for key, value in state.items()}, strict=True)
    return unet


def our_params(config: ModelConfig, scales: dict[str, float] = {}) -> tuple[dict, set[str]]:
    """Our tree with the same weights, and the keys it was made of, ScaleU's aside."""
    table = {key: entry for key, entry in rename_table("model", config).items() if entry.path[0] == "unet"}
    leaves = {}
    for key, entry in table.items():
        array = scaled(key, make_array(key, entry.torch_shape), scales)
        leaves[entry.path[1:]] = entry.to_ours(0 * array if entry.group == "scaleu" else array)
    return unflatten(leaves), {key for key, entry in table.items() if entry.group != "scaleu"}
