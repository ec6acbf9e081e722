"""The UNet's base and fusers against diffusers' UNet with gated (GLIGEN) attention, random weights.

diffusers has no ScaleU: ours has zeros there, which is a factor of 1.
"""

import dataclasses
import re

import jax
import numpy as np
import pytest
from live_diffusers import CONTEXT, ONE_LEVEL, official_key, our_params, their_unet

from common import channels_first, channels_last, model_config, relative_error
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.config import UNetConfig
from instdiff_jax.models.unet import UNet
from instdiff_jax.tree import flatten

torch = pytest.importorskip("torch")
diffusers = pytest.importorskip("diffusers")

SIZES = [  # channel_mult, num_res_blocks, attention_resolutions, height and width
    ((1, 2, 2), 1, (1, 2), (8, 12)),
    pytest.param((1, 2), 2, (1, 2), (16, 8), marks=pytest.mark.slow),
]
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
