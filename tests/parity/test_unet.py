"""The UNet, its fuser, ScaleU and attention against the official code's numbers."""

import dataclasses
import functools
import importlib
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from parity_checks import UNET as UNET_TOLERANCE
from parity_checks import params_of

import common
from benchmarks.gpu_checks import attention_gradients
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.config import UNetConfig
from instdiff_jax.models import layers
from instdiff_jax.models.attention import choose_kernel
from instdiff_jax.models.kernels import chunked, cudnn, plain
from instdiff_jax.models.scaleu import scale_low_frequencies
from instdiff_jax.models.unet import UNet
from instdiff_jax.models.unifusion import fourier_features


@pytest.mark.parametrize("check", params_of("primitives", "unet_small", "unet_alt", "unet_full"))
def test_equals_the_official_numbers(check):
    assert check.measure() <= check.tolerance


@pytest.mark.parametrize("check", params_of("unet_small_masked_attention"))
def test_instance_masked_attention_equals_the_official_one(check):
    assert check.measure() <= check.tolerance


def test_masked_attention_matters():
    data = common.parity("unet_small_masked_attention")
    assert common.relative_error(data["eps_unmasked"], data["eps_masked"]) > 100 * UNET_TOLERANCE


@pytest.mark.parametrize("shape", [(1, 1), (1, 6), (5, 1), (2, 2), (3, 5), (1, 2)])
def test_scaleu_takes_each_bin_once(shape):
    """Against numpy's FFT with the distinct bins {−1, 0} of each side scaled."""
    x = np.random.default_rng(0).standard_normal((2, *shape, 3)).astype(np.float32)
    spectrum = np.fft.fft2(x, axes=(1, 2))
    mask = np.ones(shape)
    mask[np.ix_(sorted({-1 % shape[0], 0}), sorted({-1 % shape[1], 0}))] = 0.37
    expected = np.fft.ifft2(spectrum * mask[None, :, :, None], axes=(1, 2)).real
    assert common.relative_error(scale_low_frequencies(jnp.asarray(x), jnp.float32(0.37)), expected) < 2e-5


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("d", [40, 160])
def test_chunked_attention_equals_plain(masked, d):
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, d), dtype=np.float32)) for n in (96, 130, 130))
    bits = ()
    if masked:
        bits = tuple(jnp.asarray(rng.integers(0, 8, (2, n)), jnp.uint32) for n in (96, 130))
    in_chunks = functools.partial(chunked.attention, max_logits=8192)
    expected = plain.attention(q, k, v, *bits)
    assert common.relative_error(in_chunks(q, k, v, *bits), expected) < 2e-6
    if masked:
        assert common.relative_error(plain.attention(q, k, v), expected) > 0.1

    def loss(kernel):
        return lambda q: kernel(q, k, v, *bits).sum()

    assert common.relative_error(jax.grad(loss(in_chunks))(q), jax.grad(loss(plain.attention))(q)) < 1e-4


@pytest.mark.parametrize("keys", [64, 77, 192, 440])
def test_gradients_are_finite_where_nothing_suits_a_query(keys):
    """The kernel chosen on this machine, with logits near -100, as a trained model's caption tokens have them."""
    assert attention_gradients(keys) < 0.05


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


def test_positions_tell_where_a_latent_lies():
    """As zeros they change nothing; else the same place has the same features on any grid, and no two are alike."""
    config = UNetConfig(4, 4, 32, (1, 2), 1, (1,), 2, 8, positions=True)
    tokens = jnp.zeros((1, 1, 8))

    def features(unet, x):
        return unet.embed(x, jnp.zeros(1))[0]

    def run(unet, x):
        return unet(x, jnp.zeros(1), unet.condition(tokens, tokens), 1.0)

    with_them, without = UNet(config), UNet(dataclasses.replace(config, positions=False))
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 8, 16, 4)), jnp.float32)
    params = nn.init(run, with_them)(jax.random.key(0), x)["params"]
    kernel = params["position_in"]["kernel"]
    assert kernel.shape == (64, 32) and not kernel.any()
    bare = {name: leaf for name, leaf in params.items() if name != "position_in"}
    np.testing.assert_array_equal(
        nn.apply(run, with_them)({"params": params}, x), nn.apply(run, without)({"params": bare}, x)
    )
    params["position_in"]["kernel"] = jax.random.normal(jax.random.key(1), (64, 32))
    params["conv_in"] = jax.tree.map(jnp.zeros_like, params["conv_in"])
    grids = (4, 6), (12, 18)
    small, large = (nn.apply(features, with_them)({"params": params}, jnp.zeros((1, *grid, 4)))[0] for grid in grids)
    # Three cells of the larger grid lie in one of the smaller, the middle ones at its centre.
    np.testing.assert_allclose(large[1::3, 1::3], small, atol=1e-4)
    cells = np.asarray(small).reshape(-1, 32)
    apart = np.linalg.norm(cells[:, None] - cells, axis=-1) + 1e3 * np.eye(len(cells))
    assert apart.min() > 1
    # UniFusion's features of a point, x before y.
    point = jnp.asarray([(3 + 0.5) / 6, (1 + 0.5) / 4])
    np.testing.assert_allclose(fourier_features(point) @ params["position_in"]["kernel"], small[1, 3], atol=1e-4)


def test_exact_parameter_counts():
    config = common.model_config("full")
    from instdiff_jax.checkpoint.shapes import parameter_shapes
    from instdiff_jax.tree import flatten

    shapes = flatten(parameter_shapes(config))

    def count(keep) -> int:
        return sum(int(np.prod(shape)) for path, shape in shapes.items() if keep(path))

    assert count(lambda path: path[0] in ("unet", "unifusion")) == 1_228_333_437
    assert count(lambda path: "fuser" in path) == 208_018_272
    assert count(lambda path: path[0] == "unifusion") == 160_782_669
    assert count(lambda path: path[1].startswith("scaleu")) == 11_532


@pytest.mark.parametrize("intel", [False, True])
@pytest.mark.parametrize("shape", [(2, 8, 8, 12, 20), (3, 16, 24, 8, 8), (1, 96, 96, 4, 4), (2, 5, 7, 160, 6)])
def test_convolutions_on_cpus_are_the_same_sum(shape, intel, monkeypatch):
    """Over gathered neighbours, over one neighbour after the other, and too large for both; narrow on Intel."""
    monkeypatch.setattr(layers.product_cpu, "is_faster", lambda: intel)
    b, h, w, c, features = shape
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(b, h, w, c)), rng.normal(size=(3, 3, c, features))
    x, kernel, probe = (a.astype(np.float32) for a in (x, kernel, rng.normal(size=(b, h, w, features))))
    names = ("NHWC", "HWIO", "NHWC")

    def total(convolve, x, kernel):
        return jnp.vdot(probe, convolve(x, kernel, (1, 1), "SAME", dimension_numbers=names))

    for which in (layers._convolve, jax.lax.conv_general_dilated):
        value, grads = jax.value_and_grad(total, argnums=(1, 2))(which, x, kernel)
        if which is layers._convolve:
            ours, our_grads = value, grads
    assert abs(ours - value) <= 1e-4 * np.sqrt(b * h * w * features * 9 * c)
    for a, b in zip(our_grads, grads, strict=True):
        assert common.relative_error(a, b) < 1e-5
    text = str(jax.make_jaxpr(lambda x: layers._convolve(x, kernel, (1, 1), "SAME", dimension_numbers=names))(x))
    assert ("conv_general_dilated" in text) == (h == 96 or (intel and c < 128))


@pytest.mark.parametrize(
    "capability, kernel",
    [("9.0", cudnn), ("8.0", cudnn), ("10.3", cudnn), ("7.5", chunked), ("gfx942", chunked)],
)
def test_the_flash_kernel_is_for_gpus_that_have_it(monkeypatch, capability, kernel):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability=capability)])

    def choose(queries, dtype=jnp.bfloat16, platform="gpu"):
        return choose_kernel(platform, queries, (1, 77, *queries[2:]), jnp.dtype(dtype), masked=False)

    assert choose((1, 4, 2, 64)) is kernel.attention
    assert choose((1, 4, 2, 64), jnp.float32) is chunked.attention
    assert choose((1, 4, 2, 160)) is chunked.attention
    assert choose((1, 5, 2, 64)) is chunked.attention
    assert choose((1, 4, 2, 64), platform="cpu") is chunked.attention


@pytest.mark.parametrize("masked", [False, True])
def test_the_gradient_of_the_flash_kernel_is_taken_only_where_it_is_finite(monkeypatch, masked):
    """Not at 64 keys more than a multiple of 128, to which 63 and 191 are made; the rest is the kernel's own."""
    asked = []

    def stand_in(q, k, v, query_bits, key_bits):
        @jax.custom_vjp
        def run(q, k, v):
            return plain.attention(q, k, v, query_bits, key_bits)

        run.defvjp(
            lambda *given: (run(*given), given),
            lambda given, g: (asked.append(1), jax.tree.map(jnp.zeros_like, given))[1],
        )
        return run(q, k, v)

    monkeypatch.setattr(cudnn, "flash", stand_in)
    rng = np.random.default_rng(0)
    for keys, own in {63: False, 64: False, 192: False, 77: True, 128: True, 440: True}.items():
        q, k, v = (jnp.asarray(rng.standard_normal((2, n, 2, 8)), jnp.float32) for n in (32, keys, keys))
        bits = [jnp.asarray(rng.integers(0, 8, (2, n)), jnp.uint32) for n in (32, keys)] if masked else [None, None]

        def run(kernel, argnums=(0, 1, 2)):
            def total(q, k, v):
                return jnp.square(kernel(q, k, v, *bits)).sum()

            return jax.jit(jax.value_and_grad(total, argnums))(q, k, v)

        asked.clear()
        (value, grads), (expected, expected_grads) = run(cudnn.attention), run(plain.attention)
        assert value == expected and bool(asked) == own
        for a, b in zip(grads, expected_grads, strict=True):
            assert not a.any() if own else common.relative_error(a, b) < 1e-5


@pytest.mark.parametrize("keys, masked", [(77, False), (78, False), (77, True)])
def test_the_flash_kernel_has_a_gradient_for_any_number_of_keys(monkeypatch, keys, masked):
    """Traced alone, as on a GPU: a caption has 77 tokens, and cuDNN's gradient takes even numbers."""
    internals = importlib.import_module("jax._src.cudnn.fused_attention_stablehlo")
    monkeypatch.setattr(internals, "check_cudnn_version", lambda: 91100)
    monkeypatch.setattr(internals, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(internals, "is_cuda_compute_capability_equal", lambda capability: False)
    b, n, h, d = 2, 64, 4, 40
    q, k = jnp.zeros((b, n, h, d), jnp.bfloat16), jnp.zeros((b, keys, h, d), jnp.bfloat16)
    bits = [jnp.ones((b, count), jnp.uint32) for count in (n, keys)] if masked else [None, None]

    def total(q, k, v):
        return cudnn.attention(q, k, v, *bits).astype(jnp.float32).sum()

    shapes = [x.shape for x in jax.eval_shape(jax.grad(total, argnums=(0, 1, 2)), q, k, k)]
    assert shapes == [q.shape, k.shape, k.shape]
    # Seven products of queries and keys; an odd number of keys is one more.
    assert count_flops(jax.grad(total), q, k, k) == 7 * 2 * b * n * h * d * (keys + keys % 2)
    assert count_flops(total, q, k, k) == 2 * 2 * b * n * h * d * (keys + keys % 2)
