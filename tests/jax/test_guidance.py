"""Guidance in an interval of steps and without instances' rows: against each image alone, and what really runs."""

import functools
import itertools
from pathlib import Path

import jax
import numpy as np
import pytest
from compilations import compilations
from sampler_cases import SCHEDULE, fake_eps, make_images, make_inputs, sample

from common import relative_error
from instdiff_jax.cli.sample import parse_args
from instdiff_jax.cli.sampling_flags import read_overrides
from instdiff_jax.config import SamplingConfig
from instdiff_jax.diffusion.loop import Evaluations, denoise, noise_key, start_state
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.rows import ImageRows
from instdiff_jax.diffusion.solvers import SOLVERS, solver_table
from instdiff_jax.sampling.request import sampler_settings

SAMPLERS = ("plms", "ddim", "dpm++")
COUNTS = (1, 4, 0, 2)
OPTIONS = [
    dict(guidance_interval=(0.25, 1.0)),
    dict(guidance_interval=(0.0, 0.6)),
    dict(guidance_interval=(0.15, 0.45)),  # ends before M does
    dict(guidance_interval=(0.0, 0.0)),
    dict(mis_guidance=False),
    dict(mis_guidance=False, guidance_interval=(0.25, 0.85)),
]


def _seed(noise):
    """A seed for an image with this initial noise."""
    return int(abs(noise[0, 0, 0]) * 1e6)


def run(sampler, images=None, first=0, mis_steps=10, fractions=(0.7, 0.0, 0.3), eps_fn=fake_eps, **options):
    """Samples images (their noise starts at number `first`) in 20 steps, or so, of which half are the sampler's."""
    images = make_images(COUNTS) if images is None else images
    params, noise, conditions = make_inputs(len(COUNTS))
    table = solver_table(sampler, 20, SCHEDULE, fractions)
    noise = noise[first : first + len(images)]
    keys = np.stack([noise_key(_seed(one)) for one in noise])
    return sample(eps_fn, params, noise, conditions, images, table, mis_steps=mis_steps, keys=keys, **options)


def by_hand(sampler, image, noise, mis_steps, scale, guidance_interval=(0.0, 1.0), mis_guidance=True):
    """One image, each row on its own through one evaluation at a time, guided where the options say so."""
    params, _, conditions = make_inputs(len(COUNTS))
    table = solver_table(sampler, 20, SCHEDULE, (0.7, 0.0, 0.3))

    def row(state, entry, first_step, last_step, instance=False):
        for i in range(table.starts[first_step], table.starts[last_step]):
            step = np.searchsorted(table.starts, i, side="right") - 1
            low, high = (int(fraction * table.steps) for fraction in guidance_interval)
            guided = low <= step < high and (mis_guidance or not instance)
            entries = np.array([[entry, image.negative]]) if guided else np.array([[entry]])
            given = jax.tree.map(lambda a, entries=entries: a[entries], conditions)
            use_fusers = i < table.fused_evaluations
            given = given if use_fusers else {"text": given["text"]}
            one = Evaluations(table.coefficients, i, i + 1, scale)
            state = denoise(fake_eps, params, state, given, one, use_fusers=use_fusers)
        return state

    key = noise_key(_seed(noise))[None]
    state = start_state(noise[None], key)
    rows = [row(start_state(noise[None], key), entry, 0, mis_steps, True) for entry in image.instances]
    state = row(state, image.layout, 0, mis_steps)
    if rows:
        state = state._replace(latents=sum([one.latents for one in rows], state.latents) / (1 + len(rows)))
    return row(state, image.layout, mis_steps, table.steps).latents[0]


@pytest.mark.parametrize(
    "sampler, options",
    [(sampler, options) for sampler in SAMPLERS for options in OPTIONS]
    + [(sampler, OPTIONS[-1]) for sampler in SOLVERS if sampler not in SAMPLERS],
    ids=str,
)
def test_rows_are_guided_where_the_options_say(sampler, options):
    together = run(sampler, guidance_scale=3.0, **options)
    _, noise, _ = make_inputs(len(COUNTS))
    for i, image in enumerate(make_images(COUNTS)):
        assert relative_error(together[i], by_hand(sampler, image, noise[i], 10, 3.0, **options)) <= 1e-5


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_options_at_their_defaults_change_no_bit(sampler):
    plain = run(sampler, guidance_scale=3.0)
    same = run(sampler, guidance_scale=3.0, guidance_interval=(0.0, 1.0), mis_guidance=True)
    assert np.array_equal(plain, same)
    for options in OPTIONS:
        assert relative_error(run(sampler, guidance_scale=3.0, **options), plain) > 1e-3


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_an_interval_that_covers_nothing_is_no_guidance(sampler):
    none = run(sampler, guidance_scale=1.0)
    for interval in ((0.0, 0.0), (0.42, 0.44), (1.0, 1.0)):
        for mis_guidance in (True, False):
            options = dict(guidance_interval=interval, mis_guidance=mis_guidance)
            assert np.array_equal(run(sampler, guidance_scale=3.0, **options), none)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_image_is_the_same_in_any_batch(options):
    """Also one without instances, beside others that have some."""
    together = run("dpm++", guidance_scale=3.0, **options)
    images = make_images(COUNTS)
    for i in range(len(COUNTS)):
        alone = run("dpm++", images[i : i + 1], i, guidance_scale=3.0, **options)
        assert relative_error(together[i], alone[0]) <= 1e-5


@pytest.mark.parametrize("merge", ["mean", "crop"])
@pytest.mark.parametrize("max_rows", [1, 3, 10])
def test_chunks_equal_one_batch(merge, max_rows):
    settings = dict(merge=merge, mis_guidance=False, guidance_interval=(0.15, 0.85))
    whole = run("plms", **settings)
    assert relative_error(run("plms", max_rows=max_rows, **settings), whole) <= 1e-5


def test_all_steps_may_be_the_multi_instance_samplers():
    merged = run("ddim", mis_steps=20, mis_guidance=False)
    params, noise, conditions = make_inputs(len(COUNTS))
    image, steps = make_images(COUNTS)[1], solver_table("ddim", 20, SCHEDULE, (0.7, 0.0, 0.3)).steps
    expected = by_hand("ddim", image, noise[1], steps, 7.5, mis_guidance=False)
    assert relative_error(merged[1], expected) <= 1e-5


# ---------------------------------------------------------------- what runs

CALLS = []


def counting_eps(params, latents, timesteps, conditions, alpha):
    """`fake_eps` that says each time it runs how many latents it was given."""
    jax.debug.callback(functools.partial(CALLS.append, latents.shape[0]))
    return fake_eps(params, latents, timesteps, conditions, alpha)


@pytest.mark.parametrize("options", [dict(), dict(guidance_scale=1.0), *OPTIONS], ids=str)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluations_counted_are_evaluations_done(sampler, options):
    """No row is padding here: 2 images and 6 instances are 8 rows."""
    images = make_images((2, 4))
    CALLS.clear()
    run(sampler, images, eps_fn=counting_eps, **options).block_until_ready()
    jax.effects_barrier()
    table = solver_table(sampler, 20, SCHEDULE, (0.7, 0.0, 0.3))
    assert sum(CALLS) == make_plan(table, SamplerSettings(10, **options)).evaluations(images)


def test_the_table_of_costs_in_the_docs():
    """Every cell of docs/sampling.md is what is counted."""
    lines = (Path(__file__).resolve().parent.parent.parent / "docs" / "sampling.md").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("| flags |"))
    instances = [int(cell) for cell in lines[head].split("|")[2:-2]]
    rows = [line.split("|")[1:-2] for line in itertools.takewhile(lambda line: line.startswith("|"), lines[head + 2 :])]
    assert len(rows) >= 9 and instances == [1, 4, 6, 13, 30]
    for flags, *cells in rows:
        overrides = read_overrides(parse_args(flags.strip(" `").split()))
        settings = SamplingConfig.from_dict(overrides)
        table = solver_table(settings.sampler, settings.steps, SCHEDULE, settings.alpha)
        plan = make_plan(table, sampler_settings(settings, table))
        counted = [plan.evaluations([ImageRows(0, 0, (0,) * n)]) for n in instances]
        assert [int(cell) for cell in cells] == counted, flags


def test_other_values_compile_nothing():
    """One program for each number of rows, with guidance or without, with fusers or without."""
    eps_fn = functools.partial(fake_eps)  # no other test's programs
    with compilations() as compiled:
        run("plms", eps_fn=eps_fn, mis_guidance=False, guidance_interval=(0.1, 0.9), fractions=(0.6, 0.0, 0.4))
    # Images with fusers: guided and not; without: guided and not; instances with fusers, not guided.
    assert compiled.count("denoise") == 5
    for sampler, interval, fractions, mis_steps in (
        ("ddim", (0.2, 0.8), (0.65, 0.0, 0.35), 8),
        ("dpm++", (0.3, 0.7), (0.5, 0.1, 0.4), 3),
    ):
        options = dict(fractions=fractions, mis_steps=mis_steps, guidance_scale=2.0)
        with compilations() as compiled:
            run(sampler, eps_fn=eps_fn, mis_guidance=False, guidance_interval=interval, **options)
        assert "denoise" not in compiled


def test_instances_without_guidance_add_no_program():
    """Instances without guidance take the place of all rows with it; the global rows run the images' program."""
    eps_fn = functools.partial(fake_eps)
    with compilations() as compiled:
        run("plms", eps_fn=eps_fn, mis_guidance=False)
    assert compiled.count("denoise") == 3
