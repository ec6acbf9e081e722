"""Every number of tests/parity, measured: what the tests assert and what parity_report.py prints.

A check gives max|a − b| / max|b| of one entry of one file against the official code's number, in float32.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from pictures import end_to_end, official_pixels

import common
from common import channels_first, channels_last, parity, relative_error
from instdiff_jax.checkpoint.rename import from_state_dict
from instdiff_jax.checkpoint.tables import rename_table
from instdiff_jax.diffusion.multi_instance import SamplerInputs, sample_rows
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.grounding import instance_groundings, stack
from instdiff_jax.models.autoencoder import Autoencoder
from instdiff_jax.models.clip_text import CLIPTextEncoder
from instdiff_jax.models.fuser import Fuser
from instdiff_jax.models.layers import timestep_embedding
from instdiff_jax.models.regions import EVERYWHERE, region_bits
from instdiff_jax.models.scaleu import scale_low_frequencies
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion, fourier_features
from instdiff_jax.sampling.programs import NoisePredictor
from instdiff_jax.tree import unflatten

MODULE, UNET, SAMPLER = 2e-5, 5e-5, 2e-4  # tolerances


@dataclasses.dataclass(frozen=True)
class Check:
    """One number to measure.

    Attributes:
        file, entry: where the official number is.
        how: what of ours is run.
        tolerance: the error allowed.
        measure: gives the error.
        cost: fast, slow (minutes on two cores) or full (the full-size UNet: 7 GB of memory).
    """

    file: str
    entry: str
    how: str
    tolerance: float
    measure: Callable[[], float]
    cost: str = "fast"


CHECKS: list[Check] = []


def add(file: str, entry: str, how: str, tolerance: float, measure: Callable, *args: Any, cost: str = "fast") -> None:
    CHECKS.append(Check(file, entry, how, tolerance, functools.partial(measure, *args), cost))


def params_of(*files: str) -> Iterator[Any]:
    """The checks of these files for `pytest.mark.parametrize`; those that cost much are marked slow."""
    import pytest  # benchmarks/gpu_checks.py runs checks where there is none

    for check in CHECKS:
        if check.file in files:
            marks = () if check.cost == "fast" else pytest.mark.slow
            yield pytest.param(check, marks=marks, id=f"{check.file}-{check.entry}")


# ---------------------------------------------------------------- modules


def _fourier() -> float:
    data = parity("primitives")
    return relative_error(fourier_features(jnp.asarray(data["fourier_in"])), data["fourier_out"])


def _timestep_embedding(small: bool) -> float:
    data = parity("primitives")
    ours = np.asarray(timestep_embedding(jnp.asarray(data["timesteps"]), 320))
    kept = data["timesteps"] <= 1 if small else slice(None)
    return relative_error(ours[kept], data["timestep_embedding"][kept])


def _scaleu(case: int) -> float:
    data = parity("primitives")
    ours = scale_low_frequencies(channels_last(data[f"scaleu_in{case}"]), data["scaleu_scale"])
    return relative_error(channels_first(ours), data[f"scaleu_out{case}"])


FUSER_KEYS = {
    ("proj",): "linear", ("norm1",): "norm1", ("norm2",): "norm2", ("attn", "q"): "attn.to_q",
    ("attn", "k"): "attn.to_k", ("attn", "v"): "attn.to_v", ("attn", "out"): "attn.to_out.0",
    ("ff", "in"): "ff.net.0.proj", ("ff", "out"): "ff.net.2",
}  # fmt: skip


def _fuser() -> float:
    data = parity("primitives")
    fuser = Fuser(64, 4, jnp.float32)
    x, objs = data["fuser_x"], data["fuser_objs"]

    def run(module, x, objs):
        return module(x, module.condition(objs), 1.0)

    def weight(path, leaf):
        *module, name = (key.key for key in path)
        if not module:
            return common.make_array({"gate_attn": "fuser.alpha_attn", "gate_ff": "fuser.alpha_dense"}[name], ())
        key = f"fuser.{FUSER_KEYS[tuple(module)]}.{'bias' if name == 'bias' else 'weight'}"
        return common.make_array(key, leaf.shape[::-1]).T

    shapes = jax.eval_shape(lambda key: fuser.init(key, x, objs, method=run), jax.random.key(0))["params"]
    params = jax.tree_util.tree_map_with_path(weight, shapes)
    return relative_error(fuser.apply({"params": params}, x, objs, method=run), data["fuser_out"])


@functools.cache
def _text_states(size: str) -> tuple[np.ndarray, np.ndarray]:
    data, config = parity(f"clip_text_{size}"), common.model_config(size)
    weights = common.state_dict(f"text_encoder_{size}", int(data["seed"]))
    params = {"params": from_state_dict("text_encoder", weights, config)["text_encoder"]}
    states = jax.jit(CLIPTextEncoder(config.text_encoder).apply)(params, data["input_ids"].astype(np.int32))
    return tuple(map(np.asarray, states))


def _text(size: str, which: int, entry: str) -> float:
    return relative_error(_text_states(size)[which], parity(f"clip_text_{size}")[entry])


def _autoencoder(size: str, method: str) -> float:
    data, config = parity(f"autoencoder_{size}"), common.model_config(size)
    weights = common.state_dict(f"autoencoder_{size}", int(data["seed"]))
    params = {"params": from_state_dict("autoencoder", weights, config)["autoencoder"]}
    model = Autoencoder(config.autoencoder)
    if method == "encode":
        mean, log_variance = jax.jit(functools.partial(model.apply, method="encode"))(
            params, channels_last(data["image"])
        )
        return relative_error(np.concatenate([mean, log_variance], axis=-1), channels_last(data["moments"]))
    decoded = jax.jit(functools.partial(model.apply, method="decode"))(params, channels_last(data["z"]))
    return relative_error(decoded, channels_last(data["decoded"]))


@functools.cache
def _unifusion_program(size: str, use_maps: bool) -> Callable:
    model = UniFusion(common.model_config(size).unifusion)
    return jax.jit(lambda params, grounding: model.apply({"params": params}, grounding, use_maps))


def grounding_tokens(grounding: dict, size: str = "full", use_maps: bool = True) -> np.ndarray:
    """UniFusion's tokens with the deterministic weights."""
    return np.asarray(_unifusion_program(size, use_maps)(common.model_params(size, "unifusion"), grounding))


def _unifusion(format: str) -> float:
    grounding = common.grounding_arrays(parity("unifusion_mask"), common.DROPPED[format])
    return relative_error(grounding_tokens(grounding), parity(f"unifusion_{format}")["tokens"])


def _null_tokens(format: str, use_maps: bool) -> float:
    null = common.null_grounding_arrays(common.grounding_arrays(parity("unifusion_mask")))
    return relative_error(grounding_tokens(null, use_maps=use_maps), parity(f"unifusion_{format}")["null_tokens"])


# ---------------------------------------------------------------- the UNet


@functools.cache
def _unet_program(size: str) -> Callable:
    config = common.model_config(size)
    unifusion, unet = UniFusion(config.unifusion), UNet(config.unet)

    @jax.jit
    def run(params, grounding, x, timesteps, context, alpha, regions):
        tokens = unifusion.apply({"params": params["unifusion"]}, grounding)
        variables = {"params": params["unet"]}
        conditions = unet.apply(variables, context, tokens, method="condition")
        if regions is not None:
            conditions["regions"] = regions
        return unet.apply(variables, x, timesteps, conditions, alpha)

    return run


@functools.lru_cache(maxsize=1)
def _model_params(size: str) -> dict:
    """Parameters of "unet" and "unifusion", put on the device leaf by leaf: the full size is never there twice."""
    leaves = {}
    for key, entry in rename_table("model", common.model_config(size)).items():
        leaves[entry.path] = jnp.asarray(entry.to_ours(common.make_array(key, entry.torch_shape)))
    return unflatten(leaves)


def predict(size: str, data: dict, grounding: dict, alpha: float | None, regions: dict | None = None) -> np.ndarray:
    """ε in PyTorch's layout: UniFusion, condition, denoise."""
    inputs = channels_last(data["x"]), data["timesteps"], data["context"], alpha, regions
    return channels_first(_unet_program(size)(_model_params(size), grounding, *inputs))


def _unet(size: str, entry: str, alpha: float | None) -> float:
    data = parity(f"unet_{size}")
    grounding = common.grounding_arrays(data, common.DROPPED["mask"])
    if entry == "eps_null":
        grounding = common.null_grounding_arrays(grounding)
    return relative_error(predict(size, data, grounding, alpha), data[entry])


def _masked_attention(entry: str) -> float:
    """Regions from the boxes, as sampling makes them; for the unmasked number, each token in one region of all."""
    data = parity("unet_small_masked_attention")
    grounding = common.grounding_arrays(data, common.DROPPED["box"])
    one = {key: value[0] for key, value in grounding.items()}
    visual, tokens = region_bits(one, 64, 64, "official")
    if entry == "eps_unmasked":
        visual, tokens = np.full_like(visual, EVERYWHERE), np.full_like(tokens, EVERYWHERE)
    regions = dict(visual=visual[None], tokens=tokens[None])
    return relative_error(predict("small", data, grounding, 1.0, regions), data[entry])


# ---------------------------------------------------------------- samplers and pictures

SAMPLERS = {"plms_50": (50, 0.0), "mis_50_0.36": (50, 0.36), "mis_20_0.2": (20, 0.2)}  # steps, mis


def _sampler(entry: str) -> float:
    """Two noises of one layout of three instances, as packed rows."""
    data, config = parity("sampler_small_box"), common.model_config("small")
    whole = {key: value[0] for key, value in common.grounding_arrays(data, common.DROPPED["box"]).items()}
    whole["maps"] = np.zeros_like(whole["maps"])
    entries = [whole, *instance_groundings(whole), common.null_grounding_arrays(whole)]
    grounding = {key: value for key, value in stack(entries).items() if key != "maps"}
    context = np.concatenate([data["context"], data["instance_context"], data["uncond_context"]])
    unet = UNet(config.unet)
    params = jax.device_put(common.model_params("small", "unet"))
    conditions = unet.apply(
        {"params": params}, context, grounding_tokens(grounding, "small", use_maps=False), method="condition"
    )
    steps, mis = SAMPLERS[entry]
    table = solver_table("plms", steps, config.schedule, (float(data["alpha"]), 0.0, 1 - float(data["alpha"])))
    latents = sample_rows(
        NoisePredictor(unet),
        params,
        SamplerInputs(
            jnp.asarray(channels_last(data["noise"])),
            conditions,
            [ImageRows(layout=0, negative=4, instances=(1, 2, 3))] * 2,
        ),
        make_plan(
            table, SamplerSettings(mis_steps=int(table.steps * mis), guidance_scale=float(data["guidance_scale"]))
        ),
    )
    return relative_error(channels_first(latents), data[entry])


def _end_to_end(format: str, entry: str, dtype: str = "float32") -> float:
    data = parity(f"end_to_end_small_{format}")
    latents, images = end_to_end(format, dtype)
    if entry == "latents":
        return relative_error(latents, channels_last(data["latents"]))
    return np.abs(images.astype(int) - official_pixels(data)).max() / 255


# ---------------------------------------------------------------- the list

ULP = float(np.spacing(np.float32(999)))
add("primitives", "fourier_out", "Fourier features", MODULE, _fourier)
add("primitives", "timestep_embedding (t ≤ 1)", "timestep embedding", 2e-7, _timestep_embedding, True)
# One unit in the last place of an angle near 1000 is 6.1e-5, and PyTorch's float32 exp differs by a unit between
# processors: it meets its own numbers of another machine to 2.9e-5 only.
add("primitives", "timestep_embedding", "timestep embedding", ULP * 1.01, _timestep_embedding, False)
for case in range(3):
    add("primitives", f"scaleu_out{case}", "ScaleU's closed form", MODULE, _scaleu, case)
add("primitives", "fuser_out", "one fuser", MODULE, _fuser)
for size in ("small", "full"):
    add(f"clip_text_{size}", "last_hidden_state", "text encoder", MODULE, _text, size, 0, "last_hidden_state")
    add(f"clip_text_{size}", "pooler_output", "text encoder", MODULE, _text, size, 1, "pooler_output")
    add(f"autoencoder_{size}", "moments", "autoencoder's encoder", MODULE, _autoencoder, size, "encode")
    add(f"autoencoder_{size}", "decoded", "autoencoder's decoder", MODULE, _autoencoder, size, "decode")
for format in ("box", "mask", "point", "scribble"):
    add(f"unifusion_{format}", "tokens", "full-size UniFusion", MODULE, _unifusion, format)
    how = "full-size UniFusion without its trunk"
    add(f"unifusion_{format}", "null_tokens", how, MODULE, _null_tokens, format, False)
add("unifusion_mask", "null_tokens (trunk kept)", "full-size UniFusion", MODULE, _null_tokens, "mask", True)
for size in ("small", "alt"):
    for alpha in (1.0, 0.35, 0.0):
        add(f"unet_{size}", f"eps_alpha{alpha}", "UniFusion and UNet", UNET, _unet, size, f"eps_alpha{alpha}", alpha)
    add(f"unet_{size}", "eps_null", "UniFusion and UNet", UNET, _unet, size, "eps_null", 1.0)
add("unet_small", "eps_alpha0.0 (no fusers)", "UNet without fusers", UNET, _unet, "small", "eps_alpha0.0", None)
for entry in ("eps", "eps_null"):
    add("unet_full", entry, "full-size UniFusion and UNet", UNET, _unet, "full", entry, 1.0, cost="full")
for entry in ("eps_masked", "eps_unmasked"):
    how = "UniFusion and UNet, " + ("official regions" if entry == "eps_masked" else "one region of all")
    add("unet_small_masked_attention", entry, how, UNET, _masked_attention, entry)
for entry in SAMPLERS:
    cost = "fast" if entry == "mis_20_0.2" else "slow"
    add("sampler_small_box", entry, "packed rows, PLMS", SAMPLER, _sampler, entry, cost=cost)
for format in ("box", "mask"):
    file = f"end_to_end_small_{format}"
    cost = "fast" if format == "mask" else "slow"
    how = "Pipeline on a converted checkpoint"
    add(file, "latents", how, SAMPLER, _end_to_end, format, "latents", cost=cost)
    # Within one of 256 levels: pixels are truncated, and the official ones were stored as float16.
    add(file, "images_float", "as uint8 pixels", 1.01 / 255, _end_to_end, format, "images_float", cost=cost)
for entry, tolerance in (("latents", 0.05), ("images_float", 0.1)):
    how = "Pipeline in bfloat16; norms, softmax and solver in float32"
    args = "mask", entry, "bfloat16"
    add("end_to_end_small_mask", f"{entry} (bfloat16)", how, tolerance, _end_to_end, *args, cost="slow")
