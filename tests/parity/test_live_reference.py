"""Against the official code itself, where INSTDIFF_REFERENCE names a clone of its repository.

git clone https://github.com/frank-xwang/InstanceDiffusion
INSTDIFF_REFERENCE=InstanceDiffusion python -m pytest tests/parity/test_live_reference.py
"""

import dataclasses
import functools
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
from common import channels_first, channels_last, relative_error
from instdiff_jax.checkpoint.pytorch import save_pytorch
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import PARTS, rename_table
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion.multi_instance import SamplerInputs, sample_rows
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.grounding import instance_groundings, stack
from instdiff_jax.models.regions import region_bits
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion
from instdiff_jax.sampling.programs import NoisePredictor

REFERENCE = os.environ.get("INSTDIFF_REFERENCE")
pytestmark = pytest.mark.skipif(
    not REFERENCE, reason="INSTDIFF_REFERENCE does not name a clone of the official repository"
)
torch = pytest.importorskip("torch")
from benchmarks import official_code as baseline  # noqa: E402  (needs torch)

SAMPLER_STEPS = [(12, 0.0, 7.5, (0.8, 0.0, 0.2)), (12, 0.36, 7.5, (0.5, 0.25, 0.25)), (6, 0.5, 1.0, (1.0, 0.0, 0.0))]


@pytest.fixture(scope="module")
def official():
    """The official classes."""
    with baseline.official_classes(REFERENCE) as classes:
        yield classes


@functools.cache
def config() -> ModelConfig:
    """A small UNet with the trunk and the map size of the release, which the official code fixes."""
    small = common.model_config("small")
    return dataclasses.replace(
        small,
        unet=dataclasses.replace(
            small.unet, model_channels=32, channel_mult=(1, 2), num_res_blocks=1, attention_resolutions=(1, 2)
        ),
        unifusion=dataclasses.replace(small.unifusion, mid_dim=64),
    )


@functools.cache
def our_params() -> dict:
    table = rename_table("model", config())
    return from_state_dict("model", {k: common.make_array(k, e.torch_shape) for k, e in table.items()}, config())


@functools.cache
def our_programs():
    """UniFusion and condition; one noise prediction."""
    unifusion, unet = UniFusion(config().unifusion), UNet(config().unet)

    @jax.jit
    def condition(params, grounding, context):
        tokens = unifusion.apply({"params": params["unifusion"]}, grounding)
        return tokens, unet.apply({"params": params["unet"]}, context, tokens, method="condition")

    return condition, jax.jit(NoisePredictor(unet))


def inputs(valid: int = 3, seed: int = 0) -> dict:
    """One random grounding under the official names, with a point that is no box centre, and holes in the scribbles."""
    rng = np.random.default_rng(seed)
    masks = (np.arange(30) < valid).astype(np.float32)
    corners = np.sort(rng.random((30, 2, 2)), axis=1).reshape(30, 4)
    data = dict(
        boxes=corners,
        points=rng.random((30, 2)),
        scribbles=rng.random((30, 40)) * (rng.random((30, 1)) < 0.6),
        polygons=rng.random((30, 512)) * (rng.random((30, 1)) < 0.6),
        text_embeddings=rng.standard_normal((30, 768)),
        segs=rng.random((30, 16, 16)).repeat(32, 1).repeat(32, 2) < 0.3,
    )
    data = {key: (value * masks.reshape(30, *[1] * (value.ndim - 1))).astype(np.float32) for key, value in data.items()}
    return {key: value[None] for key, value in dict(data, masks=masks).items()}


def official_grounding(data: dict) -> dict:
    renamed = {"text_embeddings": "positive_embeddings"}
    return {renamed.get(key, key): torch.from_numpy(value) for key, value in data.items()}


KEPT = [("boxes", "points"), ("points",), ("boxes", "points", "masks"), ("boxes", "points", "scribbles", "masks")]
DROPPED = dict(zip(KEPT, (common.DROPPED[format] for format in ("box", "point", "mask", "scribble")), strict=True))


@pytest.mark.parametrize("kept", KEPT, ids=" ".join)
def test_unifusion_and_unet(official, kept):
    network, (condition, predict), data = baseline.build_unet(official, config(), kept), our_programs(), inputs()
    grounding = official_grounding(data)
    rng = np.random.default_rng(1)
    x, context = (rng.standard_normal(shape).astype(np.float32) for shape in ((1, 4, 8, 12), (1, 77, 768)))
    order = ("boxes", "masks", "positive_embeddings", "scribbles", "polygons", "segs", "points")
    tokens, conditions = condition(our_params(), common.grounding_arrays(data, DROPPED[kept]), context)
    with torch.no_grad():
        expected, _ = network.position_net(*(grounding[name] for name in order))
        assert relative_error(tokens, expected) <= 2e-5
        for alpha in (1.0, 0.3):
            baseline.set_alpha(network, alpha)
            given = dict(x=torch.from_numpy(x), timesteps=torch.tensor([601]), context=torch.from_numpy(context))
            noise = network(given | dict(grounding_input=grounding))
            ours = predict(our_params()["unet"], channels_last(x), np.array([601]), conditions, alpha)
            assert relative_error(channels_first(ours), noise) <= 5e-5


@pytest.mark.parametrize(("steps", "mis", "guidance", "fractions"), SAMPLER_STEPS)
def test_plms_and_multi_instance_sampler(official, steps, mis, guidance, fractions):
    network, (condition, _), data = baseline.build_unet(official, config(), KEPT[0]), our_programs(), inputs()
    rng = np.random.default_rng(2)
    noise = rng.standard_normal((1, 4, 8, 8)).astype(np.float32)
    contexts = rng.standard_normal((5, 77, 768)).astype(np.float32)  # the layout, three instances, the negative prompt

    whole = {key: value[0] for key, value in common.grounding_arrays(data, DROPPED[KEPT[0]]).items()}
    whole["maps"] = np.zeros_like(whole["maps"])
    entries = [whole, *instance_groundings(whole), common.null_grounding_arrays(whole)]
    conditions = [condition(our_params(), stack([e]), c[None])[1] for e, c in zip(entries, contexts, strict=True)]
    table = solver_table("plms", steps, config().schedule, fractions)
    ours = sample_rows(
        NoisePredictor(UNet(config().unet)),
        jax.device_put(our_params()["unet"]),
        SamplerInputs(
            jnp.asarray(channels_last(noise)),
            jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditions),
            [ImageRows(layout=0, negative=4, instances=(1, 2, 3))],
        ),
        make_plan(table, SamplerSettings(mis_steps=int(table.steps * mis), guidance_scale=guidance)),
    )

    alone = []
    for slot in range(3):
        single = {key: np.zeros_like(value) for key, value in data.items()}
        for key, value in data.items():
            single[key][0, 0] = value[0, slot]
        alone.append(single)
    given = []
    for single, context in zip([data, *alone], contexts, strict=False):
        network.grounding_tokenizer_input.prepare({k: torch.from_numpy(v) for k, v in single.items()})
        given.append(
            dict(
                x=torch.from_numpy(noise.copy()),
                timesteps=None,
                context=torch.from_numpy(context[None]),
                grounding_input=official_grounding(single),
            )
        )
    schedule = config().schedule
    diffusion = official.LatentDiffusion("linear", schedule.timesteps, schedule.linear_start, schedule.linear_end)
    settings = dict(
        alpha_generator_func=lambda length: baseline.alphas(length, fractions), set_alpha_scale=baseline.set_alpha
    )
    uncond = torch.from_numpy(contexts[4:])
    if mis:
        sampler, batch = official.PLMSSamplerInst(diffusion, network, mis=mis, **settings), given
    else:
        sampler, batch = official.PLMSSampler(diffusion, network, **settings), given[0]
    expected = sampler.sample(steps, noise.shape, batch, uc=uncond, guidance_scale=guidance)
    assert relative_error(channels_first(ours), expected) <= 2e-4


def attention_masks(data: dict) -> np.ndarray:
    """The official masks of a layout: each instance's box with x along rows, edges rounded."""
    masks = np.zeros((1, 30, 64, 64), np.float32)
    for slot in np.flatnonzero(data["masks"][0]):
        x0, y0, x1, y1 = (int(edge) for edge in np.round(data["boxes"][0, slot] * 64))
        masks[0, slot, x0:x1, y0:y1] = 1
    return masks


@pytest.mark.parametrize("kept", [KEPT[0], KEPT[1]], ids=" ".join)
def test_multi_instance_sampler_with_masked_attention(official, kept):
    """On 64×64 latents, the only grid it masks, with guidance: the unconditional rows have the null grounding, and no
    mask. Where boxes and masks are dropped, nothing is masked."""
    network, data, count = baseline.build_unet(official, config(), kept), inputs(2), 2
    condition, _ = our_programs()
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((1, 4, 64, 64)).astype(np.float32)
    contexts = rng.standard_normal((count + 2, 77, 768)).astype(np.float32)

    whole = {key: value[0] for key, value in common.grounding_arrays(data, DROPPED[kept]).items()}
    whole["maps"] = np.zeros_like(whole["maps"])
    entries = [whole, *instance_groundings(whole), common.null_grounding_arrays(whole)]
    conditions = [condition(our_params(), stack([e]), c[None])[1] for e, c in zip(entries, contexts, strict=True)]
    joined = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *conditions)
    bits = [region_bits(entry, 64, 64, "official") for entry in entries]
    joined["regions"] = dict(zip(("visual", "tokens"), map(np.stack, zip(*bits, strict=True)), strict=True))
    table = solver_table("plms", 2, config().schedule, (1.0, 0.0, 0.0))
    rows = ImageRows(layout=0, negative=count + 1, instances=tuple(range(1, count + 1)))
    ours = sample_rows(
        NoisePredictor(UNet(config().unet)),
        jax.device_put(our_params()["unet"]),
        SamplerInputs(jnp.asarray(channels_last(noise)), joined, [rows]),
        make_plan(table, SamplerSettings(mis_steps=1, guidance_scale=3.0)),
    )

    given = []
    for slot, context in zip((None, *range(count)), contexts, strict=False):
        one = data if slot is None else {key: np.zeros_like(value) for key, value in data.items()}
        for key in data if slot is not None else ():
            one[key][0, 0] = data[key][0, slot]
        batch = {key: torch.from_numpy(value) for key, value in one.items()}
        batch["att_masks"] = torch.from_numpy(attention_masks(one))
        grounding = network.grounding_tokenizer_input.prepare(batch, return_att_masks=True)
        start = dict(x=torch.from_numpy(noise.copy()), timesteps=None, context=torch.from_numpy(context[None]))
        given.append(start | dict(grounding_input=grounding))
    schedule = config().schedule
    diffusion = official.LatentDiffusion("linear", schedule.timesteps, schedule.linear_start, schedule.linear_end)
    sampler = official.PLMSSamplerInst(diffusion, network, mis=0.5)
    uncond = torch.from_numpy(contexts[-1:])
    expected = sampler.sample(2, noise.shape, given, uc=uncond, guidance_scale=3.0)
    error = relative_error(channels_first(ours), expected)
    print(f"MIS with masked attention, {' '.join(kept)}: {error:.1e}")
    assert error <= 2e-4
    del joined["regions"]
    unmasked = sample_rows(
        NoisePredictor(UNet(config().unet)),
        jax.device_put(our_params()["unet"]),
        SamplerInputs(jnp.asarray(channels_last(noise)), joined, [rows]),
        make_plan(table, SamplerSettings(mis_steps=1, guidance_scale=3.0)),
    )
    moved = relative_error(channels_first(unmasked), expected)
    assert (moved > 1e-2) == ("boxes" in kept), "the masks show"


def test_an_export_loads_in_the_official_code(official, tmp_path):
    """A checkpoint of the small size, written back to PyTorch."""
    small = common.model_config("small")
    params = {}
    for part in PARTS:
        table = rename_table(part, small)
        params |= from_state_dict(part, {k: common.make_array(k, e.torch_shape) for k, e in table.items()}, small)
    save_pytorch(tmp_path / "small.pth", params, small)
    content = torch.load(tmp_path / "small.pth", map_location="cpu", weights_only=True)
    network = baseline.build_unet(official, small, KEPT[0])
    network.load_state_dict(content["model"], strict=True)
    autoencoder = baseline.build_autoencoder(official, small.autoencoder)
    autoencoder.load_state_dict(content["autoencoder"], strict=True)
    schedule = small.schedule
    diffusion = official.LatentDiffusion("linear", schedule.timesteps, schedule.linear_start, schedule.linear_end)
    diffusion.load_state_dict(content["diffusion"], strict=True)
    for key, value in diffusion.state_dict().items():
        assert relative_error(content["diffusion"][key], value) <= 1e-6, key
