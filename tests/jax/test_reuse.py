"""Deep features reused between evaluations (DeepCache): which evaluations compute them, and what comes out."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sampler_cases import SCHEDULE, make_images, make_inputs, sample
from training_common import tiny_model

from common import relative_error
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.diffusion.loop import Evaluations, denoise, start_state
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.solvers import solver_table
from instdiff_jax.models.unet import UNet

# With 32 channels, each is a group of its norms, which then take the time away again.
CONFIG = dataclasses.replace(tiny_model().unet, model_channels=64, attention_resolutions=(1,))
DEEP = []  # the batch of each computation of deep features


@dataclasses.dataclass(frozen=True)
class TwoParts:
    """A stand-in for the UNet, in two parts; both read latents, time, text and fusers."""

    def deep(self, params, latents, timesteps, conditions, alpha):
        jax.debug.callback(lambda: DEEP.append(latents.shape[0]))
        y = jnp.einsum("nhwc,cd->nhwd", latents, params) + conditions["text"]["key"][:, None, None]
        return y if alpha is None else y + alpha * conditions["grounding"][:, None, None]

    def finish(self, params, latents, timesteps, conditions, alpha, deep):
        time = (timesteps.astype(jnp.float32) / 1000)[:, None, None, None]
        return jnp.tanh(deep + time * conditions["text"]["key"][:, None, None]) + 0.2 * jnp.roll(latents, 1, axis=2)

    def __call__(self, params, *inputs):
        return self.finish(params, *inputs, self.deep(params, *inputs))


@dataclasses.dataclass
class ByHand:
    """The same with features kept from call to call, for evaluations that run one at a time."""

    reuse: int
    calls: int = 0

    def __call__(self, params, *inputs):
        if self.calls % self.reuse == 0:
            self.kept = TwoParts().deep(params, *inputs)
        self.calls += 1
        return TwoParts().finish(params, *inputs, self.kept)

    def __hash__(self):
        return id(self)


@pytest.mark.parametrize("reuse", [2, 3, 100])
@pytest.mark.parametrize("sampler", ["plms", "dpm++"])
def test_features_are_kept_between_fresh_ones(sampler, reuse):
    params, noise, conditions = make_inputs(3)
    noise = np.array(noise)  # a state is donated
    given = jax.tree.map(lambda a: a[np.array([[1, 0], [2, 0], [3, 0]])], conditions)
    table = solver_table(sampler, 11, SCHEDULE, (1.0, 0.0, 0.0))
    window = Evaluations(table.coefficients, 2, 10, 3.0)
    expected = start_state(noise)
    eps = ByHand(reuse)
    with jax.disable_jit():
        for i in range(2, 10):
            one = Evaluations(table.coefficients, i, i + 1, 3.0)
            expected = denoise(eps, params, expected, given, one, use_fusers=True)
    DEEP.clear()
    every = window._replace(reuse=reuse)
    reused = denoise(TwoParts(), params, start_state(noise), given, every, use_fusers=True)
    jax.block_until_ready(reused)
    jax.effects_barrier()
    assert DEEP == [6] * -(-8 // reuse)
    assert relative_error(reused.latents, expected.latents) <= 1e-5
    each = denoise(TwoParts(), params, start_state(noise), given, window, use_fusers=True)
    assert relative_error(each.latents, reused.latents) > 1e-3


def test_one_is_none():
    """`reuse=1` is the program without reuse, for which `eps_fn` needs no parts; so is what `reuse` 1 computes."""
    params, noise, conditions = make_inputs(2)
    images, table = make_images((2, 1)), solver_table("ddim", 8, SCHEDULE, (0.75, 0.0, 0.25))
    args = params, noise, conditions, images, table
    whole = sample(TwoParts().__call__, *args, mis_steps=3)
    assert np.array_equal(sample(TwoParts(), *args, mis_steps=3, reuse=1), whole)
    given, noise = jax.tree.map(lambda a: a[np.array([[1, 0], [2, 0]])], conditions), np.array(noise)
    one, none = (
        denoise(
            TwoParts(),
            params,
            start_state(noise),
            given,
            Evaluations(table.coefficients, 0, 5, 3.0, reuse),
            use_fusers=True,
        ).latents
        for reuse in (1, None)
    )
    assert relative_error(one, none) <= 1e-6


@pytest.mark.parametrize("reuse", [2, 3, 7])
def test_neither_progress_nor_chunks_nor_other_images_change_a_result(reuse):
    params, noise, conditions = make_inputs(3)
    images, table = make_images((2, 0, 3)), solver_table("plms", 20, SCHEDULE, (0.7, 0.0, 0.3))

    def run(first=0, last=3, **options):
        rows = images[first:last]
        settings = dict(mis_steps=8, guidance_interval=(0.0, 0.8), mis_guidance=False, reuse=reuse)
        return sample(TwoParts(), params, noise[first:last], conditions, rows, table, **settings, **options)

    whole, events = run(), []
    assert relative_error(run(events=events), whole) <= 1e-6
    plan = make_plan(table, SamplerSettings(8, guidance_interval=(0.0, 0.8), mis_guidance=False))
    assert sum(event.evaluations for event in events) == plan.evaluations(images)
    assert relative_error(run(max_rows=2), whole) <= 1e-5
    for i in range(3):
        assert relative_error(run(i, i + 1)[0], whole[i]) <= 1e-5


def test_the_two_parts_are_the_unet():
    """Of the same latents; the last part is the smaller one, and knows of text, time and fusers too."""
    model, rng = UNet(CONFIG), np.random.default_rng(0)
    width = CONFIG.context_dim
    latents, times = rng.standard_normal((2, 8, 8, CONFIG.in_channels)).astype(np.float32), np.array([900, 40])
    context, tokens = (rng.standard_normal((2, n, width)).astype(np.float32) for n in (7, 184))

    def init(unet, *args):
        return unet(latents, times, unet.condition(*args))

    params = model.init(jax.random.key(0), context, tokens, method=init)
    params = jax.tree.map(lambda a: jnp.asarray(rng.standard_normal(a.shape) * 0.2, jnp.float32), params)
    conditions = model.apply(params, context, tokens, method="condition")
    inputs = latents, times, conditions, 0.7
    deep = model.apply(params, *inputs, method="deep_features")
    whole, parts = model.apply(params, *inputs), model.apply(params, *inputs, deep, method="finish")
    assert relative_error(parts, whole) <= 1e-6
    other = latents[::-1], times[::-1], jax.tree.map(lambda a: a[::-1], conditions), 0.0
    for i in range(4):
        changed = [*inputs[:i], other[i], *inputs[i + 1 :]]
        assert relative_error(model.apply(params, *changed, deep, method="finish"), whole) > 5e-6

    flops = {
        name: count_flops(lambda *args, name=name: model.apply(params, *args, method=name), *args)
        for name, args in dict(__call__=inputs, deep_features=inputs, finish=(*inputs, deep)).items()
    }
    assert flops["finish"] < flops["deep_features"] < flops["__call__"]
    assert flops["__call__"] < flops["deep_features"] + flops["finish"] < 1.1 * flops["__call__"]
