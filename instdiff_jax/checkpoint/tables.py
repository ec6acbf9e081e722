"""Tables of every PyTorch key of the released checkpoint: its place in our tree, its turn and its shape.

They are computed from the model's sizes, block indices included. Axes of PyTorch arrays: Linear
[out, in], Conv2d [out, in, height, width]. Ours: kernel [in, out] and [height, width, in, out]. 1x1
convolutions that act as linear layers become [in, out].
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from instdiff_jax.config import NUM_MAP_TOKENS, AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig

PARTS = ("model", "autoencoder", "text_encoder")  # the state dicts of the released checkpoint
# What InstanceDiffusion adds to Stable Diffusion 1.5; "trunk" is the ConvNeXt inside UniFusion, "unifusion" the rest.
ADAPTERS = ("fusers", "scaleu", "unifusion", "trunk")

SLOTS = 30
FOURIER = 2 * 16  # sine and cosine of 16 frequencies, per coordinate
COORDINATES = {"box": 4, "point": 2, "scribble": 2 * 20, "mask_points": 2 * 256}

Kind = Literal["copy", "linear", "conv", "pointwise", "row"]
_TO_OURS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(2, 3, 1, 0),
    "pointwise": lambda x: x[:, :, 0, 0].T,
    "row": lambda x: x[0],
}
_TO_TORCH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "copy": lambda x: x,
    "linear": lambda x: x.T,
    "conv": lambda x: x.transpose(3, 2, 0, 1),
    "pointwise": lambda x: x.T[:, :, None, None],
    "row": lambda x: x[None],
}


@dataclass(frozen=True)
class Entry:
    """One parameter: its place in our tree, how it is turned, and its shape in the state dict."""

    path: tuple[str, ...]
    kind: Kind
    torch_shape: tuple[int, ...]
    group: str  # "base" or one of ADAPTERS

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """A view of a state dict's array in our order of axes."""
        return _TO_OURS[self.kind](array)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return _TO_TORCH[self.kind](array)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape in our tree."""
        return self.to_ours(np.broadcast_to(np.int8(0), self.torch_shape)).shape


class _Table:
    """Collects entries; every method takes a PyTorch module name and our module's path."""

    def __init__(self):
        self.entries: dict[str, Entry] = {}

    def add(self, key: str, path: str, kind: Kind, *shape: int) -> None:
        parts = tuple(path.split("/"))
        group = "base"
        if parts[0] == "unifusion":
            group = "trunk" if parts[1] == "trunk" else "unifusion"
        elif parts[0] == "unet" and "fuser" in parts:
            group = "fusers"
        elif parts[0] == "unet" and parts[1].startswith("scaleu_"):
            group = "scaleu"
        self.entries[key] = Entry(parts, kind, shape, group)

    def norm(self, key: str, path: str, channels: int) -> None:
        self.add(f"{key}.weight", f"{path}/scale", "copy", channels)
        self.add(f"{key}.bias", f"{path}/bias", "copy", channels)

    def linear(self, key: str, path: str, n_in: int, n_out: int, bias: bool = True) -> None:
        self.add(f"{key}.weight", f"{path}/kernel", "linear", n_out, n_in)
        if bias:
            self.add(f"{key}.bias", f"{path}/bias", "copy", n_out)

    def conv(self, key: str, path: str, n_in: int, n_out: int, size: int = 3) -> None:
        self.add(f"{key}.weight", f"{path}/kernel", "conv", n_out, n_in, size, size)
        self.add(f"{key}.bias", f"{path}/bias", "copy", n_out)

    def pointwise(self, key: str, path: str, n_in: int, n_out: int) -> None:
        self.add(f"{key}.weight", f"{path}/kernel", "pointwise", n_out, n_in, 1, 1)
        self.add(f"{key}.bias", f"{path}/bias", "copy", n_out)


def _attention(table: _Table, key: str, path: str, channels: int, context: int) -> None:
    table.linear(f"{key}.to_q", f"{path}/q", channels, channels, bias=False)
    table.linear(f"{key}.to_k", f"{path}/k", context, channels, bias=False)
    table.linear(f"{key}.to_v", f"{path}/v", context, channels, bias=False)
    table.linear(f"{key}.to_out.0", f"{path}/out", channels, channels)


def _feed_forward(table: _Table, key: str, path: str, channels: int) -> None:
    table.linear(f"{key}.net.0.proj", f"{path}/in", channels, 8 * channels)  # GEGLU: value and gate, 4x each
    table.linear(f"{key}.net.2", f"{path}/out", 4 * channels, channels)


def _fuser(table: _Table, key: str, path: str, channels: int, context: int) -> None:
    table.linear(f"{key}.linear", f"{path}/proj", context, channels)
    table.norm(f"{key}.norm1", f"{path}/norm1", channels)
    _attention(table, f"{key}.attn", f"{path}/attn", channels, channels)
    table.norm(f"{key}.norm2", f"{path}/norm2", channels)
    _feed_forward(table, f"{key}.ff", f"{path}/ff", channels)
    table.add(f"{key}.alpha_attn", f"{path}/gate_attn", "copy")
    table.add(f"{key}.alpha_dense", f"{path}/gate_ff", "copy")


def _transformer(table: _Table, key: str, path: str, channels: int, context: int) -> None:
    table.norm(f"{key}.norm", f"{path}/norm", channels)
    table.pointwise(f"{key}.proj_in", f"{path}/proj_in", channels, channels)
    block = f"{key}.transformer_blocks.0"
    for i in (1, 2, 3):
        table.norm(f"{block}.norm{i}", f"{path}/norm{i}", channels)
    _attention(table, f"{block}.attn1", f"{path}/self_attn", channels, channels)
    _fuser(table, f"{block}.fuser", f"{path}/fuser", channels, context)
    _attention(table, f"{block}.attn2", f"{path}/cross_attn", channels, context)
    _feed_forward(table, f"{block}.ff", f"{path}/ff", channels)
    table.pointwise(f"{key}.proj_out", f"{path}/proj_out", channels, channels)


def _unet_res_block(table: _Table, key: str, path: str, n_in: int, n_out: int, time_dim: int) -> None:
    table.norm(f"{key}.in_layers.0", f"{path}/norm1", n_in)
    table.conv(f"{key}.in_layers.2", f"{path}/conv1", n_in, n_out)
    table.linear(f"{key}.emb_layers.1", f"{path}/time_proj", time_dim, n_out)
    table.norm(f"{key}.out_layers.0", f"{path}/norm2", n_out)
    table.conv(f"{key}.out_layers.3", f"{path}/conv2", n_out, n_out)
    if n_in != n_out:
        table.pointwise(f"{key}.skip_connection", f"{path}/skip", n_in, n_out)


def _unet(table: _Table, config: UNetConfig) -> None:
    base, context = config.model_channels, config.context_dim
    time_dim, last = 4 * base, len(config.channel_mult) - 1
    table.linear("time_embed.0", "unet/time_in", base, time_dim)
    table.linear("time_embed.2", "unet/time_out", time_dim, time_dim)
    table.conv("input_blocks.0.0", "unet/conv_in", config.in_channels, base)
    if config.positions:
        # Not in the released layout: the official code has no such layer.
        table.linear("position_in", "unet/position_in", FOURIER * COORDINATES["point"], base, bias=False)
    channels, skips, index = base, [base], 1
    for level, mult in enumerate(config.channel_mult):
        for i in range(config.num_res_blocks):
            key = f"input_blocks.{index}"
            _unet_res_block(table, f"{key}.0", f"unet/down_{level}_res_{i}", channels, mult * base, time_dim)
            channels = mult * base
            if 2**level in config.attention_resolutions:
                _transformer(table, f"{key}.1", f"unet/down_{level}_attn_{i}", channels, context)
            skips.append(channels)
            index += 1
        if level != last:
            table.conv(f"input_blocks.{index}.0.op", f"unet/down_{level}_downsample", channels, channels)
            skips.append(channels)
            index += 1
    _unet_res_block(table, "middle_block.0", "unet/mid_res_0", channels, channels, time_dim)
    _transformer(table, "middle_block.1", "unet/mid_attn", channels, context)
    _unet_res_block(table, "middle_block.2", "unet/mid_res_1", channels, channels, time_dim)
    index = 0
    for level in range(last, -1, -1):
        for i in range(config.num_res_blocks + 1):
            key, name = f"output_blocks.{index}", f"unet/up_{level}"
            table.add(f"scaleu_b_{index}", f"unet/scaleu_{index}/b", "copy", channels)
            table.add(f"scaleu_s_{index}", f"unet/scaleu_{index}/s", "copy", 1)
            n_out = config.channel_mult[level] * base
            _unet_res_block(table, f"{key}.0", f"{name}_res_{i}", channels + skips.pop(), n_out, time_dim)
            channels = n_out
            has_attention = 2**level in config.attention_resolutions
            if has_attention:
                _transformer(table, f"{key}.1", f"{name}_attn_{i}", channels, context)
            if level > 0 and i == config.num_res_blocks:
                table.conv(f"{key}.{1 + has_attention}.conv", f"{name}_upsample", channels, channels)
            index += 1
    table.norm("out.0", "unet/norm_out", channels)
    table.conv("out.2", "unet/conv_out", channels, config.out_channels)


def _trunk(table: _Table, key: str, path: str, depths: tuple[int, ...], dims: tuple[int, ...]) -> None:
    for i, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        conv, norm = (0, 1) if i == 0 else (1, 0)  # only the stem normalises after its convolution
        n_in, size = (3, 4) if i == 0 else (dims[i - 1], 2)
        table.conv(f"{key}.downsample_layers.{i}.{conv}", f"{path}/downsample_{i}_conv", n_in, dim, size)
        table.norm(f"{key}.downsample_layers.{i}.{norm}", f"{path}/downsample_{i}_norm", dim if i == 0 else n_in)
        for j in range(depth):
            block, name = f"{key}.stages.{i}.{j}", f"{path}/stage_{i}_block_{j}"
            table.add(f"{block}.gamma", f"{name}/gamma", "copy", dim)
            table.conv(f"{block}.dwconv", f"{name}/dwconv", 1, dim, 7)
            table.norm(f"{block}.norm", f"{name}/norm", dim)
            table.linear(f"{block}.pwconv1", f"{name}/pw1", dim, 4 * dim)
            table.linear(f"{block}.pwconv2", f"{name}/pw2", 4 * dim, dim)


def _unifusion(table: _Table, config: ModelConfig) -> None:
    fusion, text = config.unifusion, config.unet.context_dim
    key, path = "position_net", "unifusion"
    trunk_stride = 4 * 2 ** (len(fusion.trunk_dims) - 1)
    map_features = fusion.trunk_dims[-1] * (fusion.map_size // trunk_stride) ** 2 // NUM_MAP_TOKENS
    widths = {name: FOURIER * count for name, count in COORDINATES.items()}
    table.add(f"{key}.null_positive_feature", f"{path}/null_text", "copy", text)
    for torch_name, name in (("position", "box"), ("point", "point"), ("scribble", "scribble")):
        table.add(f"{key}.null_{torch_name}_feature", f"{path}/null_{name}", "copy", widths[name])
    table.add(f"{key}.null_polygon_feature", f"{path}/null_mask_points", "copy", widths["mask_points"])
    table.add(f"{key}.null_seg_feature", f"{path}/null_map", "copy", map_features)
    table.add(f"{key}.pos_embedding", f"{path}/pos_embedding", "row", 1, NUM_MAP_TOKENS, map_features)
    table.conv(f"{key}.in_conv", f"{path}/map_conv", SLOTS, 3)
    _trunk(table, f"{key}.convnext_tiny_backbone", f"{path}/trunk", fusion.trunk_depths, fusion.trunk_dims)
    inputs = [(name, text + width) for name, width in widths.items()] + [("map", map_features)]
    for i, (name, n_in) in enumerate(inputs):
        for layer, leaf, a, b in ((0, "in", n_in, fusion.mid_dim), (2, "mid", fusion.mid_dim, fusion.mid_dim)):
            table.linear(f"{key}.linears_list.{i}.{layer}", f"{path}/mlp_{name}/{leaf}", a, b)
        table.linear(f"{key}.linears_list.{i}.4", f"{path}/mlp_{name}/out", fusion.mid_dim, text)


def _autoencoder_block(table: _Table, key: str, path: str, n_in: int, n_out: int) -> None:
    table.norm(f"{key}.norm1", f"{path}/norm1", n_in)
    table.conv(f"{key}.conv1", f"{path}/conv1", n_in, n_out)
    table.norm(f"{key}.norm2", f"{path}/norm2", n_out)
    table.conv(f"{key}.conv2", f"{path}/conv2", n_out, n_out)
    if n_in != n_out:
        table.pointwise(f"{key}.nin_shortcut", f"{path}/skip", n_in, n_out)


def _autoencoder_middle(table: _Table, key: str, path: str, channels: int) -> None:
    _autoencoder_block(table, f"{key}.mid.block_1", f"{path}/mid_block_1", channels, channels)
    table.norm(f"{key}.mid.attn_1.norm", f"{path}/mid_attn/norm", channels)
    for torch_name, name in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
        table.pointwise(f"{key}.mid.attn_1.{torch_name}", f"{path}/mid_attn/{name}", channels, channels)
    _autoencoder_block(table, f"{key}.mid.block_2", f"{path}/mid_block_2", channels, channels)


def _autoencoder(table: _Table, config: AutoencoderConfig) -> None:
    widths, z = [config.ch * mult for mult in config.ch_mult], config.z_channels
    path, channels = "autoencoder/encoder", config.ch
    table.conv("encoder.conv_in", f"{path}/conv_in", 3, channels)
    for level, width in enumerate(widths):
        for i in range(config.num_res_blocks):
            name = f"{path}/down_{level}_block_{i}"
            _autoencoder_block(table, f"encoder.down.{level}.block.{i}", name, channels, width)
            channels = width
        if level != len(widths) - 1:
            table.conv(f"encoder.down.{level}.downsample.conv", f"{path}/down_{level}_downsample", width, width)
    _autoencoder_middle(table, "encoder", path, channels)
    table.norm("encoder.norm_out", f"{path}/norm_out", channels)
    table.conv("encoder.conv_out", f"{path}/conv_out", channels, 2 * z)
    table.pointwise("quant_conv", "autoencoder/quant_conv", 2 * z, 2 * z)
    path = "autoencoder/decoder"
    table.pointwise("post_quant_conv", "autoencoder/post_quant_conv", z, z)
    table.conv("decoder.conv_in", f"{path}/conv_in", z, channels)
    _autoencoder_middle(table, "decoder", path, channels)
    for level, width in reversed(list(enumerate(widths))):
        for i in range(config.num_res_blocks + 1):
            name = f"{path}/up_{level}_block_{i}"
            _autoencoder_block(table, f"decoder.up.{level}.block.{i}", name, channels, width)
            channels = width
        if level > 0:
            table.conv(f"decoder.up.{level}.upsample.conv", f"{path}/up_{level}_upsample", width, width)
    table.norm("decoder.norm_out", f"{path}/norm_out", channels)
    table.conv("decoder.conv_out", f"{path}/conv_out", channels, 3)


def _text_encoder(table: _Table, config: TextEncoderConfig) -> None:
    root, path, c = "transformer.text_model", "text_encoder", config.hidden_size
    for name, rows in (("token", config.vocab_size), ("position", config.max_length)):
        key = f"{root}.embeddings.{name}_embedding.weight"
        table.add(key, f"{path}/{name}_embedding/embedding", "copy", rows, c)
    for i in range(config.num_layers):
        key, layer = f"{root}.encoder.layers.{i}", f"{path}/layer_{i}"
        table.norm(f"{key}.layer_norm1", f"{layer}/norm1", c)
        for name in ("q", "k", "v", "out"):
            table.linear(f"{key}.self_attn.{name}_proj", f"{layer}/attn/{name}", c, c)
        table.norm(f"{key}.layer_norm2", f"{layer}/norm2", c)
        table.linear(f"{key}.mlp.fc1", f"{layer}/mlp/in", c, config.intermediate_size)
        table.linear(f"{key}.mlp.fc2", f"{layer}/mlp/out", config.intermediate_size, c)
    table.norm(f"{root}.final_layer_norm", f"{path}/final_norm", c)


def rename_table(part: str, config: ModelConfig, absent: Collection[str] = ()) -> dict[str, Entry]:
    """Every key of one state dict of the released checkpoint.

    Args:
        part: one of PARTS; "model" holds the UNet and UniFusion.
        config: the model's sizes.
        absent: those of ADAPTERS to leave out.
    """
    table = _Table()
    if part == "model":
        _unet(table, config.unet)
        _unifusion(table, config)
    elif part == "autoencoder":
        _autoencoder(table, config.autoencoder)
    elif part == "text_encoder":
        _text_encoder(table, config.text_encoder)
    else:
        raise ValueError(f"unknown part {part!r}")
    return {key: entry for key, entry in table.entries.items() if entry.group not in absent}
