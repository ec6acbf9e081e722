"""The UNet's base and fusers against diffusers' UNet with gated (GLIGEN) attention, random weights.

diffusers has no ScaleU: ours has zeros there, which is a factor of 1.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest

from common import channels_first, channels_last, make_array, model_config, relative_error
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.config import ModelConfig, UNetConfig
from instdiff_jax.models.unet import UNet
from instdiff_jax.tree import flatten, unflatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

CONTEXT = 96
SIZES = [  # channel_mult, num_res_blocks, attention_resolutions, height and width
    ((1, 2, 2), 1, (1, 2), (8, 12)),
    pytest.param((1, 2), 2, (1, 2), (16, 8), marks=pytest.mark.slow),
]
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


NORM = r"norm\d?\.|in_layers\.0\.|out_layers\.0\.|^out\.0\."
# Scales of parameters, by name, which make features about as large as the epsilon of the norm that they enter.
TINY = {
    "outside of transformer blocks": {NORM: 1.0, "": 0.01},
    "inside of transformer blocks": {
        r"transformer_blocks.*norm\d": 1.0,
        r"proj_in|to_out\.0|ff\.net\.2": 0.004,
        "proj_out": 30.0,
    },
}


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


@pytest.mark.parametrize(("channel_mult", "num_res_blocks", "attention_resolutions", "side"), SIZES)
def test_gated_unet_equals_diffusers(channel_mult, num_res_blocks, attention_resolutions, side):
    config = UNetConfig(
        in_channels=4,
        out_channels=4,
        model_channels=32,
        channel_mult=channel_mult,
        num_res_blocks=num_res_blocks,
        attention_resolutions=attention_resolutions,
        num_heads=4,
        context_dim=CONTEXT,
    )
    theirs = their_unet(config)
    params, keys = our_params(dataclasses.replace(model_config("small"), unet=config))
    assert {official_key(key, config) for key in theirs.state_dict()} == keys

    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, *side), dtype=np.float32)
    context, tokens = (rng.standard_normal((2, n, CONTEXT), dtype=np.float32) for n in (77, 184))
    times = np.array([981, 1])
    unet = UNet(config)

    @jax.jit
    def ours(params, x, t, context, tokens, alpha):
        variables = {"params": params}
        return unet.apply(variables, x, t, unet.apply(variables, context, tokens, method="condition"), alpha)

    def expected():
        with torch.no_grad():
            gligen = {"gligen": {"objs": torch.from_numpy(tokens)}}
            given = (torch.from_numpy(array) for array in (x, times, context))
            return theirs(*given, cross_attention_kwargs=gligen).sample.numpy()

    fused, plain = (
        channels_first(ours(params, channels_last(x), times, context, tokens, alpha)) for alpha in (1.0, None)
    )
    assert relative_error(fused, expected()) <= 5e-5
    for module in theirs.modules():
        if hasattr(module, "fuser"):
            module.fuser.enabled = False
    assert relative_error(plain, expected()) <= 5e-5
    assert relative_error(fused, plain) > 1e-2


NORMS = {  # kinds of norms by their names in diffusers, and in which case their epsilon shows
    r"resnets\.\d+\.norm\d": "outside of transformer blocks",
    r"attentions\.\d+\.norm$": "outside of transformer blocks",
    r"conv_norm_out": "outside of transformer blocks",
    r"transformer_blocks\.\d+\.norm\d": "inside of transformer blocks",
    r"fuser\.norm\d": "inside of transformer blocks",
}


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


def test_gradients_of_the_loss_equal_those_of_diffusers():
    """Of every parameter: a training step in small, for the official four steps take minutes."""
    theirs = their_unet(ONE_LEVEL)
    params, _ = our_params(dataclasses.replace(model_config("small"), unet=ONE_LEVEL))
    rng = np.random.default_rng(0)
    x, target = rng.standard_normal((2, 2, 4, 8, 8), dtype=np.float32)
    context, tokens = (rng.standard_normal((2, n, CONTEXT), dtype=np.float32) for n in (77, 184))
    times = np.array([981, 1])

    given = (torch.from_numpy(array) for array in (x, times, context))
    sample = theirs(*given, cross_attention_kwargs={"gligen": {"objs": torch.from_numpy(tokens)}}).sample
    loss = torch.square(sample - torch.from_numpy(target)).mean()
    loss.backward()
    expected = {official_key(name, ONE_LEVEL): leaf.grad.numpy() for name, leaf in theirs.named_parameters()}

    def mean_square(params):
        variables = {"params": params}
        conditions = UNet(ONE_LEVEL).apply(variables, context, tokens, method="condition")
        eps = UNet(ONE_LEVEL).apply(variables, channels_last(x), times, conditions, 1.0)
        return jax.numpy.square(eps - channels_last(target)).mean()

    value, grads = jax.jit(jax.value_and_grad(mean_square))(params)
    assert abs(float(value) / loss.item() - 1) <= 1e-5
    entries = rename_table("model", dataclasses.replace(model_config("small"), unet=ONE_LEVEL))
    leaves = flatten(grads)
    for key, gradient in expected.items():
        assert relative_error(entries[key].to_torch(np.asarray(leaves[entries[key].path[1:]])), gradient) <= 1e-4, key


@pytest.mark.parametrize("case", TINY)
def test_epsilons_of_the_norms_equal_those_of_diffusers(case):
    """Features so small that another epsilon would show: diffusers' own output moves when its epsilons do."""
    theirs = their_unet(ONE_LEVEL, TINY[case])
    params, _ = our_params(dataclasses.replace(model_config("small"), unet=ONE_LEVEL), TINY[case])
    rng = np.random.default_rng(0)
    x = 0.1 * rng.standard_normal((2, 4, 4, 4), dtype=np.float32)
    context, tokens = (rng.standard_normal((2, n, CONTEXT), dtype=np.float32) for n in (77, 184))
    times = np.array([981, 1])

    def expected() -> np.ndarray:
        with torch.no_grad():
            given = (torch.from_numpy(array) for array in (x, times, context))
            return theirs(*given, cross_attention_kwargs={"gligen": {"objs": torch.from_numpy(tokens)}}).sample.numpy()

    unet, variables = UNet(ONE_LEVEL), {"params": params}
    conditions = unet.apply(variables, context, tokens, method="condition")
    ours = channels_first(unet.apply(variables, channels_last(x), times, conditions, 1.0))
    right = expected()
    assert relative_error(ours, right) <= 5e-5
    for pattern in (pattern for pattern, where in NORMS.items() if where == case):
        norms = [module for name, module in theirs.named_modules() if re.search(pattern, name)]
        assert norms, pattern
        for norm in norms:
            norm.eps *= 10
        assert relative_error(expected(), right) > 1e-2, pattern
        for norm in norms:
            norm.eps /= 10
