"""The UNet, its fuser, ScaleU and attention against the official code's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import common
from instdiff_jax.models.attention import EVERYWHERE, Fuser, attention
from instdiff_jax.models.layers import timestep_embedding
from instdiff_jax.models.scaleu import scale_low_frequencies
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import UniFusion

UNET_TOLERANCE = 5e-5


def predict(size: str, data: dict, grounding: dict, alpha, regions=None) -> np.ndarray:
    """ε in PyTorch's layout: UniFusion, condition, denoise."""
    config = common.model_config(size)
    unifusion, unet = UniFusion(config.unifusion), UNet(config.unet)

    @jax.jit
    def run(params, grounding, x, timesteps, context, alpha):
        tokens = unifusion.apply({"params": params["unifusion"]}, grounding)
        variables = {"params": params["unet"]}
        conditions = unet.apply(variables, context, tokens, method="condition")
        if regions is not None:
            conditions["regions"] = regions
        return unet.apply(variables, x, timesteps, conditions, alpha)

    params = {root: common.model_params(size, root) for root in ("unet", "unifusion")}
    x = common.channels_last(data["x"])
    return common.channels_first(run(params, grounding, x, data["timesteps"], data["context"], alpha))


@pytest.mark.parametrize("size", ["small", "alt"])
def test_noise_equals_the_official_one(size):
    data = common.parity(f"unet_{size}")
    grounding = common.grounding_arrays(data, common.DROPPED["mask"])
    for alpha in (1.0, 0.35, 0.0):
        error = common.relative_error(predict(size, data, grounding, alpha), data[f"eps_alpha{alpha}"])
        assert error < UNET_TOLERANCE, alpha
    assert common.relative_error(predict(size, data, grounding, None), data["eps_alpha0.0"]) < UNET_TOLERANCE
    null = common.null_grounding_arrays(grounding)
    assert common.relative_error(predict(size, data, null, 1.0), data["eps_null"]) < UNET_TOLERANCE


@pytest.mark.slow
def test_full_size_noise_equals_the_official_one():
    data = common.parity("unet_full")
    grounding = common.grounding_arrays(data, common.DROPPED["mask"])
    assert common.relative_error(predict("full", data, grounding, 1.0), data["eps"]) < UNET_TOLERANCE
    null = common.null_grounding_arrays(grounding)
    assert common.relative_error(predict("full", data, null, 1.0), data["eps_null"]) < UNET_TOLERANCE


def test_instance_masked_attention_equals_the_official_one():
    data = common.parity("unet_small_masked_attention")
    grounding = common.grounding_arrays(data, common.DROPPED["box"])
    assert common.relative_error(predict("small", data, grounding, 1.0), data["eps_unmasked"]) < UNET_TOLERANCE
    words = (data["att_masks"].astype(np.uint32) << np.arange(30, dtype=np.uint32)[None, :, None, None]).sum(1)
    own = np.where(data["att_masks"].any((2, 3)), np.uint32(1) << np.arange(30, dtype=np.uint32), 0)
    everywhere = np.full((1, 30), EVERYWHERE, np.uint32)
    tokens = np.concatenate([own, everywhere, everywhere, own, np.full((1, 64), EVERYWHERE, np.uint32)], 1)
    regions = dict(visual=words.reshape(1, -1).astype(np.uint32), tokens=tokens.astype(np.uint32))
    error = common.relative_error(predict("small", data, grounding, 1.0, regions), data["eps_masked"])
    assert error < UNET_TOLERANCE
    # The mask matters: without it the numbers are far off.
    assert common.relative_error(data["eps_unmasked"], data["eps_masked"]) > 100 * UNET_TOLERANCE


def test_timestep_embedding():
    data = common.parity("primitives")
    ours = np.asarray(timestep_embedding(jnp.asarray(data["timesteps"]), 320))
    small = data["timesteps"] <= 1
    assert common.relative_error(ours[small], data["timestep_embedding"][small]) < 2e-7
    # One unit in the last place of an angle near 1000 is 6.1e-5, and PyTorch's float32 exp differs by a
    # unit between processors: it meets its own numbers of another machine to 2.9e-5 only.
    assert common.relative_error(ours, data["timestep_embedding"]) < np.spacing(np.float32(999)) * 1.01


@pytest.mark.parametrize("case", [0, 1, 2])
def test_scaleu_equals_the_fft(case):
    data = common.parity("primitives")
    ours = scale_low_frequencies(common.channels_last(data[f"scaleu_in{case}"]), data["scaleu_scale"])
    assert common.relative_error(common.channels_first(ours), data[f"scaleu_out{case}"]) < 2e-5


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (2, 2), (3, 5), (1, 2)])
def test_scaleu_takes_each_bin_once(shape):
    """Against numpy's FFT with the distinct bins {−1, 0} of each side scaled."""
    x = np.random.default_rng(0).standard_normal((2, *shape, 3)).astype(np.float32)
    spectrum = np.fft.fft2(x, axes=(1, 2))
    mask = np.ones(shape)
    mask[np.ix_(sorted({-1 % shape[0], 0}), sorted({-1 % shape[1], 0}))] = 0.37
    expected = np.fft.ifft2(spectrum * mask[None, :, :, None], axes=(1, 2)).real
    assert common.relative_error(scale_low_frequencies(jnp.asarray(x), jnp.float32(0.37)), expected) < 2e-5


def test_fuser_equals_the_official_one():
    data = common.parity("primitives")
    names = {
        ("proj",): "linear", ("norm1",): "norm1", ("norm2",): "norm2", ("attn", "q"): "attn.to_q",
        ("attn", "k"): "attn.to_k", ("attn", "v"): "attn.to_v", ("attn", "out"): "attn.to_out.0",
        ("ff", "in"): "ff.net.0.proj", ("ff", "out"): "ff.net.2",
    }  # fmt: skip
    fuser = Fuser(64, 4, jnp.float32, jnp.float32)
    x, objs = data["fuser_x"], data["fuser_objs"]

    def run(module, x, objs, alpha=1.0):
        return module(x, module.condition(objs), alpha)

    shapes = jax.eval_shape(lambda key: fuser.init(key, x, objs, method=run), jax.random.key(0))["params"]

    def weight(path, leaf):
        *module, name = (key.key for key in path)
        if not module:
            return common.make_array({"gate_attn": "fuser.alpha_attn", "gate_ff": "fuser.alpha_dense"}[name], ())
        key = f"fuser.{names[tuple(module)]}.{'bias' if name == 'bias' else 'weight'}"
        return common.make_array(key, leaf.shape[::-1]).T

    params = jax.tree_util.tree_map_with_path(weight, shapes)
    assert common.relative_error(fuser.apply({"params": params}, x, objs, method=run), data["fuser_out"]) < 2e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [40, 160])
def test_chunked_attention_equals_plain(monkeypatch, masked, d):
    monkeypatch.setitem(attention.__globals__["_LOGITS"], "cpu", 8192)
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, d), dtype=np.float32)) for n in (96, 130, 130))
    words = ()
    if masked:
        words = tuple(jnp.asarray(rng.integers(0, 8, (2, n)), jnp.uint32) for n in (96, 130))
    plain = attention(q, k, v, *words, kernel="plain")
    chunked = attention(q, k, v, *words, kernel="chunked")
    assert common.relative_error(chunked, plain) < 2e-6
    if masked:
        assert common.relative_error(attention(q, k, v, kernel="plain"), plain) > 0.1

    def loss(kernel):
        return lambda q: attention(q, k, v, *words, kernel=kernel).sum()

    assert common.relative_error(jax.grad(loss("chunked"))(q), jax.grad(loss("plain"))(q)) < 1e-4


def test_bfloat16_stays_close_to_float32():
    data = common.parity("unet_small")
    config = common.model_config("small").unet
    tokens = np.random.default_rng(0).standard_normal((2, 184, 768)).astype(np.float32)
    params = {"params": common.model_params("small")}

    def run(dtype):
        unet = UNet(config, dtype=dtype)

        @jax.jit
        def both(params, x, t, context, tokens):
            return unet.apply(params, x, t, unet.apply(params, context, tokens, method="condition"), 1.0)

        return both(params, common.channels_last(data["x"]), data["timesteps"], data["context"], tokens)

    assert run(jnp.bfloat16).dtype == jnp.float32
    assert common.relative_error(run(jnp.bfloat16), run(jnp.float32)) < 0.05


def test_any_canvas():
    """Sides that are multiples of eight latent pixels, square or not."""
    unet = UNet(common.model_config("small").unet)
    params = {"params": common.model_params("small")}
    context, tokens = jnp.zeros((1, 77, 768)), jnp.zeros((1, 184, 768))

    def run(x):
        return unet.apply(params, x, jnp.ones(1), unet.apply(params, context, tokens, method="condition"))

    for h, w in [(8, 8), (24, 40), (96, 64)]:
        assert jax.eval_shape(run, jnp.zeros((1, h, w, 4))).shape == (1, h, w, 4)


def test_exact_parameter_counts():
    config = common.model_config("full")
    from instdiff_jax.checkpoint.rename import flatten, parameter_shapes

    shapes = flatten(parameter_shapes(config))
    count = lambda keep: sum(int(np.prod(shape)) for path, shape in shapes.items() if keep(path))
    assert count(lambda path: path[0] in ("unet", "unifusion")) == 1_228_333_437
    assert count(lambda path: "fuser" in path) == 208_018_272
    assert count(lambda path: path[0] == "unifusion") == 160_782_669
    assert count(lambda path: path[1].startswith("scaleu")) == 11_532
