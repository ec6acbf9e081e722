"""A stand-in for the UNet with inputs for it, and the multi-instance sampler stated one row at a time."""

import jax
import jax.numpy as jnp
import numpy as np

from instdiff_jax.config import ScheduleConfig
from instdiff_jax.diffusion import schedule as schedules
from instdiff_jax.diffusion.multi_instance import Placement, SamplerInputs, sample_rows
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.rows import ImageRows

SCHEDULE = ScheduleConfig(linear_start=0.00085, linear_end=0.012, timesteps=1000)
H, W, C, UNIQUE = 5, 7, 4, 24
TRACES = []


def fake_eps(params, latents, timesteps, conditions, alpha):
    """A cheap stand-in for the UNet; the order of `conditions` decides what it reads, as in the UNet."""
    TRACES.append(latents.shape)
    assert (alpha is None) == ("grounding" not in conditions)
    t = (timesteps.astype(jnp.float32) / 1000)[:, None, None, None]
    y = jnp.einsum("nhwc,cd->nhwd", latents, params) + t * conditions["text"]["key"][:, None, None]
    if alpha is not None:
        y = y + alpha * conditions["grounding"][:, None, None]
    return jnp.tanh(y) + 0.2 * jnp.roll(latents, 1, axis=2)


def make_inputs(num_images, seed=0):
    rng = np.random.default_rng(seed)
    params = rng.standard_normal((C, C)).astype(np.float32) * 0.4
    noise = rng.standard_normal((num_images, H, W, C)).astype(np.float32)
    conditions = {
        "text": {"key": jnp.asarray(rng.standard_normal((UNIQUE, C)), jnp.float32)},
        "grounding": jnp.asarray(rng.standard_normal((UNIQUE, C)), jnp.float32),
    }
    return jnp.asarray(params), jnp.asarray(noise), conditions


def make_images(counts, seed=1):
    """Images with these numbers of instances, each row with its own condition; entry 0 is the negative one."""
    rng, entry, images = np.random.default_rng(seed), 1, []
    for count in counts:
        low = rng.uniform(0, 0.6, (count, 2))
        boxes = np.concatenate([low, low + rng.uniform(0.2, 0.4, (count, 2))], axis=1)
        images.append(ImageRows(entry, 0, tuple(range(entry + 1, entry + 1 + count)), boxes.tolist()))
        entry += 1 + count
    return images


def sample(eps_fn, params, noise, conditions, images, table, events=None, **options):
    """`sample_rows` with the fields of its settings objects as keywords."""
    inputs = SamplerInputs(noise, conditions, images, options.pop("inpaint", None), options.pop("keys", None))
    placement = Placement(options.pop("max_rows", None), options.pop("sharding", None))
    return sample_rows(eps_fn, params, inputs, make_plan(table, SamplerSettings(**options)), placement, events)


def sequential(inputs, image, steps, fractions, mis_steps, guidance, known=None):
    """The released algorithm for one image: the global layout and each instance in turn, mean, the rest."""
    params, noise, conditions = inputs
    params = np.asarray(params, np.float64)
    text, grounding = np.asarray(conditions["text"]["key"]), np.asarray(conditions["grounding"])
    cumprod = schedules.alphas_cumprod(SCHEDULE)
    times = schedules.uniform_timesteps(steps, 1000)
    scales = schedules.alpha_schedule(len(times), fractions)
    evaluations = 0

    def model(x, t, entry, scale):
        nonlocal evaluations
        evaluations += 1
        y = x @ params + t / 1000 * text[entry] + scale * grounding[entry]
        return np.tanh(y) + 0.2 * np.roll(x, 1, axis=1)

    def guided(x, t, entry, scale):
        eps = model(x, t, entry, scale)
        if guidance == 1:
            return eps
        negative = model(x, t, image.negative, scale)
        return negative + guidance * (eps - negative)

    def run(x, entry, past, begin, end):
        for i in range(begin, end):
            t, now = times[i], cumprod[times[i]]
            if known is not None:
                clean, keep, fixed = (np.asarray(a, np.float64) for a in known)
                x = keep * (np.sqrt(now) * clean + np.sqrt(1 - now) * fixed) + (1 - keep) * x
            after = cumprod[times[i + 1]] if i + 1 < len(times) else cumprod[0]

            def move(eps, x=x, now=now, after=after):
                return np.sqrt(after) * (x - np.sqrt(1 - now) * eps) / np.sqrt(now) + np.sqrt(1 - after) * eps

            eps = guided(x, t, entry, scales[i])
            if not past:
                used = (eps + guided(move(eps), times[min(i + 1, len(times) - 1)], entry, scales[i])) / 2
            elif len(past) == 1:
                used = (3 * eps - past[-1]) / 2
            elif len(past) == 2:
                used = (23 * eps - 16 * past[-1] + 5 * past[-2]) / 12
            else:
                used = (55 * eps - 59 * past[-1] + 37 * past[-2] - 9 * past[-3]) / 24
            x = move(used)
            past.append(eps)
        return x

    x, past = np.asarray(noise, np.float64), []
    if mis_steps:
        rows = [run(x, image.layout, past, 0, mis_steps)]
        rows += [run(x, entry, [], 0, mis_steps) for entry in image.instances]
        x = np.mean(rows, axis=0)
    return run(x, image.layout, past, mis_steps, len(times)), evaluations


def looping_eps(params, latents, timesteps, conditions, alpha):
    """`fake_eps` one row at a time, as a chunked attention kernel loops: a compiler left to itself gathers for it."""

    def one(row):
        latents, timesteps, conditions = jax.tree.map(lambda a: a[None], row)
        return fake_eps(params, latents, timesteps, conditions, alpha)[0]

    return jax.lax.map(one, (latents, timesteps, conditions))
