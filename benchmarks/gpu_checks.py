"""Whether a card computes what a CPU does: the small model's official numbers, attention's and a step's gradients.

    python -m benchmarks.gpu_checks --write    # on a CPU: the gradients that a card is compared with

The file `goldens/gradients.npz` holds, for every trained parameter of the tiny model, the norm of its gradient and a
few of its entries, computed in float32 on a CPU.
"""

import argparse
import dataclasses
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.models import find_model, make_params, random_grounding
from common import channels_first, grounding_arrays, parity, relative_error
from instdiff_jax.config import ModelConfig
from instdiff_jax.models.attention import attention
from instdiff_jax.models.kernels import plain
from instdiff_jax.models.regions import region_bits
from instdiff_jax.training.settings import TrainSettings
from instdiff_jax.training.state import make_networks, merge_params, split_params
from instdiff_jax.training.step import diffusion_loss
from instdiff_jax.tree import flatten

GOLDENS = Path(__file__).parent / "goldens" / "gradients.npz"
LENGTHS, BATCH, CANVAS, SAMPLES = (64, 77), 2, 128, 6
# float32: rounding in another order. bfloat16: 8 bits of a product's operands; a CPU's own error is 0.20.
GRADIENT = {"float32": 1e-3, "bfloat16": 0.3}


@dataclasses.dataclass(frozen=True)
class Measured:
    """An error and what is allowed; one that is not finite is beyond every tolerance."""

    name: str
    error: float
    tolerance: float


def run(quick: bool = False) -> Iterator[Measured]:
    """All checks, most wanted first; `quick`: one of each kind, without the small model's official numbers."""
    if quick:
        yield from itertools.islice(check_attention(), 1)
        yield from check_gradients([(LENGTHS[0], True, "float32")])
        return
    yield from check_attention()
    yield from check_gradients(list(itertools.product(LENGTHS, (False, True), GRADIENT)))
    yield from check_official()


def check_official() -> Iterator[Measured]:
    """The small UNet with the official weights' stand-ins against the official outputs, in both dtypes."""
    from parity_checks import CHECKS, UNET

    wanted = ("eps_alpha1.0", "eps_null", "eps_masked", "eps_unmasked")
    for check in CHECKS:
        if check.file in ("unet_small", "unet_small_masked_attention") and check.entry in wanted:
            with jax.default_matmul_precision("highest"):
                yield Measured(f"{check.file}: {check.entry}, float32", check.measure(), UNET)
    yield Measured("unet_small: eps_alpha1.0, bfloat16", _official_in_bfloat16(), 0.05)


def _official_in_bfloat16() -> float:
    import common
    from instdiff_jax.models.unet import UNet
    from instdiff_jax.models.unifusion import UniFusion

    data, config = parity("unet_small"), common.model_config("small")
    unet, unifusion = UNet(config.unet, jnp.bfloat16), UniFusion(config.unifusion, dtype=jnp.bfloat16)
    params = {name: common.model_params("small", name) for name in ("unet", "unifusion")}

    @jax.jit
    def evaluate(params, grounding, x):
        tokens = unifusion.apply({"params": params["unifusion"]}, grounding)
        variables = {"params": params["unet"]}
        conditions = unet.apply(variables, data["context"], tokens, method="condition")
        return unet.apply(variables, x, data["timesteps"], conditions, 1.0)

    ours = evaluate(params, grounding_arrays(data, common.DROPPED["mask"]), common.channels_last(data["x"]))
    return relative_error(channels_first(ours), data["eps_alpha1.0"])


# ---------------------------------------------------------------- attention


def attention_gradients(keys: int, masked: bool = False) -> float:
    """Error of attention's gradients in bfloat16 with logits near −100, as a trained model's caption tokens have them.

    It is the distance to the plain kernel's, 0 where they are closer to float32's than those are.
    cuDNN's own gradient is not finite there for some numbers of keys; see `models/kernels/cudnn.py`.
    """
    rng, width = np.random.default_rng(0), 32
    q, k, v, weights = (
        jnp.asarray(rng.standard_normal((2, n, 2, width)) / 10, jnp.bfloat16) for n in (64, keys, keys, 64)
    )
    q, k = q.at[..., 0].set(1), k.at[..., 0].set(-100 * width**0.5)
    bits = tuple(jnp.asarray(rng.integers(1, 8, (2, n)), jnp.uint32) for n in (64, keys)) if masked else ()

    def gradients(kernel, dtype=jnp.bfloat16):
        def total(q, k, v):
            return (kernel(q, k, v, *bits) * weights.astype(dtype)).astype(jnp.float32).sum()

        found = jax.jit(jax.grad(total, argnums=(0, 1, 2)))(*(x.astype(dtype) for x in (q, k, v)))
        return [x.astype(jnp.float32) for x in found]

    sides = gradients(attention), gradients(plain.attention), gradients(plain.attention, jnp.float32)
    return _worst(
        0.0 if relative_error(ours, exact) <= relative_error(theirs, exact) else relative_error(ours, theirs)
        for ours, theirs, exact in zip(*sides, strict=True)
    )


def check_attention() -> Iterator[Measured]:
    for keys in (64, 77, 192, 440):
        for masked in (False, True):
            name = f"gradient of attention on {keys} keys, logits near -100{', masked' * masked}, bfloat16"
            yield Measured(name, attention_gradients(keys, masked), 0.05)


# ---------------------------------------------------------------- a step's gradients


def gradient_sample(length: int, masked: bool, dtype: str) -> np.ndarray:
    """Norm and some entries of every trained parameter's gradient of one step: float32 [parameters, 1 + SAMPLES].

    Args:
        length: tokens of the captions.
        masked: whether attention is masked, with the boxes' regions.
        dtype: of the networks' products.
    """
    model = _small_model()
    mode = "correct" if masked else "none"
    settings = TrainSettings(steps=1, batch_size=BATCH, dtype=dtype, masked_attention=mode)
    trainable, frozen = split_params(make_params(model, jnp.float32), settings)
    loss = diffusion_loss(make_networks(model, settings), model, settings)

    @jax.jit
    def sampled(trainable, frozen, batch):
        keys = jax.random.split(jax.random.key(0), BATCH)
        found = jax.grad(lambda part: loss(merge_params(part, frozen), batch, keys))(trainable)
        return jnp.stack([_entries(leaf) for _, leaf in sorted(flatten(found).items())])

    with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
        return np.asarray(sampled(trainable, frozen, _batch(model, length, masked)))


def _small_model() -> ModelConfig:
    """The tiny model with a small trunk for maps, which no attention depends on."""
    sizes = find_model("tiny").config.to_dict()
    sizes["unifusion"] |= dict(trunk_depths=(1, 1, 1, 1), trunk_dims=(8, 16, 32, 64), map_size=64)
    return ModelConfig.from_dict(sizes)


def _entries(leaf: Any) -> Any:
    flat = leaf.astype(jnp.float32).reshape(-1)
    positions = np.linspace(0, flat.size - 1, SAMPLES).astype(int)
    return jnp.concatenate([jnp.linalg.norm(flat)[None], flat[positions]])


def _batch(model: ModelConfig, length: int, masked: bool) -> dict[str, Any]:
    rng, side = np.random.default_rng(length), CANVAS // model.latent_stride
    given = random_grounding(6, rng, model.unet.context_dim, model.unifusion.map_size)
    grounding = {key: value.repeat(BATCH, 0) for key, value in grounding_arrays(given).items()}
    shape = (BATCH, side, side, model.unet.in_channels)
    batch: dict[str, Any] = dict(
        latents=rng.standard_normal(shape, np.float32),
        noise=rng.standard_normal(shape, np.float32),
        timesteps=np.array([100, 700], np.int32),
        context=rng.standard_normal((BATCH, length, model.unet.context_dim), np.float32),
        grounding=grounding,
    )
    if masked:
        visual, tokens = region_bits({key: value[0] for key, value in grounding.items()}, side, side, "correct")
        batch["regions"] = dict(visual=np.stack([visual] * BATCH), tokens=np.stack([tokens] * BATCH))
    return batch


def gradient_error(found: np.ndarray, golden: np.ndarray) -> float:
    """Distance of two samples, relative to the second. Parameters count alike, but for those without a gradient."""
    counted = golden[:, 0] > 1e-6 * golden[:, 0].max()
    scale = 1 / golden[counted, :1]
    found, golden = found[counted] * scale, golden[counted] * scale
    return float(np.linalg.norm(found - golden) / np.linalg.norm(golden))


def check_gradients(cases: list[tuple[int, bool, str]]) -> Iterator[Measured]:
    """Cases of `gradient_sample`, compiled in threads: a card's compiler takes most of the time."""
    with np.load(GOLDENS, allow_pickle=False) as data:
        goldens = dict(data)
    with ThreadPoolExecutor(4) as pool:
        for case, found in zip(cases, pool.map(lambda case: gradient_sample(*case), cases), strict=True):
            length, masked, dtype = case
            name = f"gradients of a step, captions of {length} tokens{', masked attention' * masked}, {dtype}"
            yield Measured(name, gradient_error(found, goldens[_key(length, masked)]), GRADIENT[dtype])


def _key(length: int, masked: bool) -> str:
    return f"captions_{length}{'_masked' * masked}"


def _worst(errors: Iterator[float]) -> float:
    return float(np.max(list(errors)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="compute the gradients here, and write the file")
    if not parser.parse_args().write:
        for check in run():
            print(f"{check.name}: {check.error:.1e}, at most {check.tolerance:.0e}")
        return
    goldens = {_key(n, masked): gradient_sample(n, masked, "float32") for n in LENGTHS for masked in (False, True)}
    GOLDENS.parent.mkdir(exist_ok=True)
    np.savez_compressed(GOLDENS, **goldens)
    print(f"{GOLDENS}: {GOLDENS.stat().st_size} bytes")


if __name__ == "__main__":
    main()
