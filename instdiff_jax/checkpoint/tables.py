"""Tables of every PyTorch key of the released checkpoint: which parameter of ours it is, and how its axes are turned.

Only names are written here. Shapes, and which of the named parameters a model has, come from the modules
(`shapes.py`). Axes of PyTorch arrays: Linear [out, in], Conv2d [out, in, height, width]. Ours: kernel [in, out] and
[height, width, in, out]. 1x1 convolutions that act as linear layers become [in, out].
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

import numpy as np

from instdiff_jax.checkpoint.shapes import parameter_group, parameter_shapes
from instdiff_jax.config import AutoencoderConfig, ModelConfig, TextEncoderConfig, UNetConfig, UniFusionConfig
from instdiff_jax.tree import flatten

# The state dicts of the released checkpoint, and what each holds of our tree.
PARTS = {"model": ("unet", "unifusion"), "autoencoder": ("autoencoder",), "text_encoder": ("text_encoder",)}

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
    """One parameter: its path and shape in our tree, and how it is turned."""

    path: tuple[str, ...]
    kind: Kind
    shape: tuple[int, ...]

    def to_ours(self, array: np.ndarray) -> np.ndarray:
        """A view of a state dict's array in our order of axes."""
        return _TO_OURS[self.kind](array)

    def to_torch(self, array: np.ndarray) -> np.ndarray:
        """The inverse of `to_ours`."""
        return _TO_TORCH[self.kind](array)

    @property
    def group(self) -> str:
        """What it belongs to: "base" or one of `shapes.ADAPTERS`."""
        return parameter_group(self.path)

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """Shape in the state dict."""
        return self.to_torch(np.broadcast_to(np.int8(0), self.shape)).shape


def rename_table(part: str, config: ModelConfig, absent: Collection[str] = ()) -> dict[str, Entry]:
    """Every key of one state dict of the released checkpoint.

    Args:
        part: one of PARTS; "model" holds the UNet and UniFusion.
        config: the model's sizes.
        absent: those of `shapes.ADAPTERS` to leave out.
    """
    names = Names()
    if part == "model":
        _unet(names, config.unet)
        _unifusion(names, config.unifusion)
    elif part == "autoencoder":
        autoencoder_names(names, config.autoencoder)
    elif part == "text_encoder":
        _text_encoder(names, config.text_encoder)
    else:
        raise ValueError(f"unknown part {part!r}")
    shapes = flatten(parameter_shapes(config, absent, PARTS[part]))
    return {key: Entry(path, kind, shapes[path]) for key, (path, kind) in names.found.items() if path in shapes}


class Names:
    """Collects keys. Every method takes a PyTorch module's name and our module's path.

    Layers are named with all the parameters they may have: those that a model lacks, such as the biases of q, k and v,
    are left out by `rename_table`.
    """

    def __init__(self):
        self.found: dict[str, tuple[tuple[str, ...], Kind]] = {}

    def add(self, key: str, path: str, kind: Kind = "copy") -> None:
        self.found[key] = (tuple(path.split("/")), kind)

    def norm(self, key: str, path: str) -> None:
        self.add(f"{key}.weight", f"{path}/scale")
        self.add(f"{key}.bias", f"{path}/bias")

    def layer(self, kind: Kind, key: str, path: str) -> None:
        self.add(f"{key}.weight", f"{path}/kernel", kind)
        self.add(f"{key}.bias", f"{path}/bias")

    def linear(self, key: str, path: str) -> None:
        self.layer("linear", key, path)

    def conv(self, key: str, path: str) -> None:
        self.layer("conv", key, path)

    def pointwise(self, key: str, path: str) -> None:
        self.layer("pointwise", key, path)


def attention_names(names: Names, key: str, path: str) -> None:
    for theirs, ours in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "out")):
        names.linear(f"{key}.{theirs}", f"{path}/{ours}")


def ff_names(names: Names, key: str, path: str) -> None:
    names.linear(f"{key}.net.0.proj", f"{path}/in")
    names.linear(f"{key}.net.2", f"{path}/out")


def _fuser(names: Names, key: str, path: str) -> None:
    names.linear(f"{key}.linear", f"{path}/proj")
    names.norm(f"{key}.norm1", f"{path}/norm1")
    attention_names(names, f"{key}.attn", f"{path}/attn")
    names.norm(f"{key}.norm2", f"{path}/norm2")
    ff_names(names, f"{key}.ff", f"{path}/ff")
    names.add(f"{key}.alpha_attn", f"{path}/gate_attn")
    names.add(f"{key}.alpha_dense", f"{path}/gate_ff")


def _transformer(names: Names, key: str, path: str) -> None:
    names.norm(f"{key}.norm", f"{path}/norm")
    names.pointwise(f"{key}.proj_in", f"{path}/proj_in")
    block = f"{key}.transformer_blocks.0"
    for i in (1, 2, 3):
        names.norm(f"{block}.norm{i}", f"{path}/norm{i}")
    attention_names(names, f"{block}.attn1", f"{path}/self_attn")
    _fuser(names, f"{block}.fuser", f"{path}/fuser")
    attention_names(names, f"{block}.attn2", f"{path}/cross_attn")
    ff_names(names, f"{block}.ff", f"{path}/ff")
    names.pointwise(f"{key}.proj_out", f"{path}/proj_out")


def res_block_names(names: Names, key: str, path: str) -> None:
    names.norm(f"{key}.in_layers.0", f"{path}/norm1")
    names.conv(f"{key}.in_layers.2", f"{path}/conv1")
    names.linear(f"{key}.emb_layers.1", f"{path}/time_proj")
    names.norm(f"{key}.out_layers.0", f"{path}/norm2")
    names.conv(f"{key}.out_layers.3", f"{path}/conv2")
    names.pointwise(f"{key}.skip_connection", f"{path}/skip")


def _unet(names: Names, config: UNetConfig) -> None:
    names.linear("time_embed.0", "unet/time_in")
    names.linear("time_embed.2", "unet/time_out")
    names.conv("input_blocks.0.0", "unet/conv_in")
    # Not in the released layout: the official code has no such layer.
    names.linear("position_in", "unet/position_in")
    index, last = 1, len(config.channel_mult) - 1
    for level in range(last + 1):
        for i in range(config.num_res_blocks):
            res_block_names(names, f"input_blocks.{index}.0", f"unet/down_{level}_res_{i}")
            if 2**level in config.attention_resolutions:
                _transformer(names, f"input_blocks.{index}.1", f"unet/down_{level}_attn_{i}")
            index += 1
        if level != last:
            names.conv(f"input_blocks.{index}.0.op", f"unet/down_{level}_downsample")
            index += 1
    res_block_names(names, "middle_block.0", "unet/mid_res_0")
    _transformer(names, "middle_block.1", "unet/mid_attn")
    res_block_names(names, "middle_block.2", "unet/mid_res_1")
    index = 0
    for level in range(last, -1, -1):
        for i in range(config.num_res_blocks + 1):
            key, has_attention = f"output_blocks.{index}", 2**level in config.attention_resolutions
            for leaf in ("b", "s"):
                names.add(f"scaleu_{leaf}_{index}", f"unet/scaleu_{index}/{leaf}")
            res_block_names(names, f"{key}.0", f"unet/up_{level}_res_{i}")
            if has_attention:
                _transformer(names, f"{key}.1", f"unet/up_{level}_attn_{i}")
            if level > 0 and i == config.num_res_blocks:
                names.conv(f"{key}.{1 + has_attention}.conv", f"unet/up_{level}_upsample")
            index += 1
    names.norm("out.0", "unet/norm_out")
    names.conv("out.2", "unet/conv_out")


def _trunk(names: Names, key: str, path: str, depths: tuple[int, ...]) -> None:
    for i, depth in enumerate(depths):
        conv, norm = (0, 1) if i == 0 else (1, 0)  # only the stem normalises after its convolution
        names.conv(f"{key}.downsample_layers.{i}.{conv}", f"{path}/downsample_{i}_conv")
        names.norm(f"{key}.downsample_layers.{i}.{norm}", f"{path}/downsample_{i}_norm")
        for j in range(depth):
            block, name = f"{key}.stages.{i}.{j}", f"{path}/stage_{i}_block_{j}"
            names.add(f"{block}.gamma", f"{name}/gamma")
            names.conv(f"{block}.dwconv", f"{name}/dwconv")
            names.norm(f"{block}.norm", f"{name}/norm")
            names.linear(f"{block}.pwconv1", f"{name}/pw1")
            names.linear(f"{block}.pwconv2", f"{name}/pw2")


def _unifusion(names: Names, config: UniFusionConfig) -> None:
    key, path = "position_net", "unifusion"
    nulls = {
        "positive": "text",
        "position": "box",
        "point": "point",
        "scribble": "scribble",
        "polygon": "mask_points",
        "seg": "map",
    }
    for theirs, ours in nulls.items():
        names.add(f"{key}.null_{theirs}_feature", f"{path}/null_{ours}")
    names.add(f"{key}.pos_embedding", f"{path}/pos_embedding", "row")
    names.conv(f"{key}.in_conv", f"{path}/map_conv")
    _trunk(names, f"{key}.convnext_tiny_backbone", f"{path}/trunk", config.trunk_depths)
    for i, name in enumerate(("box", "point", "scribble", "mask_points", "map")):
        for layer, ours in ((0, "in"), (2, "mid"), (4, "out")):
            names.linear(f"{key}.linears_list.{i}.{layer}", f"{path}/mlp_{name}/{ours}")


def _autoencoder_block(names: Names, key: str, path: str) -> None:
    for i in (1, 2):
        names.norm(f"{key}.norm{i}", f"{path}/norm{i}")
        names.conv(f"{key}.conv{i}", f"{path}/conv{i}")
    names.pointwise(f"{key}.nin_shortcut", f"{path}/skip")


def _autoencoder_half(names: Names, half: str) -> None:
    """What encoder and decoder share: the middle, the first and the last convolution."""
    path = f"autoencoder/{half}"
    names.conv(f"{half}.conv_in", f"{path}/conv_in")
    for i in (1, 2):
        _autoencoder_block(names, f"{half}.mid.block_{i}", f"{path}/mid_block_{i}")
    names.norm(f"{half}.mid.attn_1.norm", f"{path}/mid_attn/norm")
    for theirs, ours in (("q", "q"), ("k", "k"), ("v", "v"), ("proj_out", "out")):
        names.pointwise(f"{half}.mid.attn_1.{theirs}", f"{path}/mid_attn/{ours}")
    names.norm(f"{half}.norm_out", f"{path}/norm_out")
    names.conv(f"{half}.conv_out", f"{path}/conv_out")


def autoencoder_names(names: Names, config: AutoencoderConfig) -> None:
    last = len(config.ch_mult) - 1
    for half in ("encoder", "decoder"):
        _autoencoder_half(names, half)
    for name in ("quant_conv", "post_quant_conv"):
        names.pointwise(name, f"autoencoder/{name}")
    for level in range(last + 1):
        for i in range(config.num_res_blocks):
            _autoencoder_block(names, f"encoder.down.{level}.block.{i}", f"autoencoder/encoder/down_{level}_block_{i}")
        if level != last:
            names.conv(f"encoder.down.{level}.downsample.conv", f"autoencoder/encoder/down_{level}_downsample")
        for i in range(config.num_res_blocks + 1):
            _autoencoder_block(names, f"decoder.up.{level}.block.{i}", f"autoencoder/decoder/up_{level}_block_{i}")
        if level > 0:
            names.conv(f"decoder.up.{level}.upsample.conv", f"autoencoder/decoder/up_{level}_upsample")


def _text_encoder(names: Names, config: TextEncoderConfig) -> None:
    root, path = "transformer.text_model", "text_encoder"
    for name in ("token", "position"):
        names.add(f"{root}.embeddings.{name}_embedding.weight", f"{path}/{name}_embedding/embedding")
    for i in range(config.num_layers):
        key, layer = f"{root}.encoder.layers.{i}", f"{path}/layer_{i}"
        for j in (1, 2):
            names.norm(f"{key}.layer_norm{j}", f"{layer}/norm{j}")
        for name in ("q", "k", "v", "out"):
            names.linear(f"{key}.self_attn.{name}_proj", f"{layer}/attn/{name}")
        names.linear(f"{key}.mlp.fc1", f"{layer}/mlp/in")
        names.linear(f"{key}.mlp.fc2", f"{layer}/mlp/out")
    names.norm(f"{root}.final_layer_norm", f"{path}/final_norm")
