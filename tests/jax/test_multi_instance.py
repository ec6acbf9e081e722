"""Packed rows against the multi-instance sampler stated one image and one instance at a time."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from sampler_cases import SCHEDULE, TRACES, C, H, W, fake_eps, make_images, make_inputs, sample, sequential

from common import PYTHONPATH, SUPPORT, relative_error
from instdiff_jax.diffusion import multi_instance as mi
from instdiff_jax.diffusion.loop import Evaluations, Inpaint, denoise, start_state
from instdiff_jax.diffusion.plan import SamplerSettings, make_plan
from instdiff_jax.diffusion.rows import ImageRows, bucket_size, pack_rows
from instdiff_jax.diffusion.solvers import SOLVERS, solver_table

CASES = [  # steps, α, M, guidance
    (1, (1.0, 0.0, 0.0), 1, 3.0),
    (2, (0.5, 0.0, 0.5), 1, 3.0),
    (3, (1.0, 0.0, 0.0), 0, 7.5),
    (7, (0.0, 0.0, 1.0), 3, 2.0),
    (20, (0.8, 0.0, 0.2), 7, 7.5),
    (30, (0.2, 0.0, 0.8), 12, 3.0),  # α ends before M
    (37, (0.5, 0.25, 0.25), 5, 1.0),
    (50, (0.8, 0.0, 0.2), 18, 3.0),
    (20, (0.35, 0.0, 0.65), 7, 3.0),  # α ends with M
    (10, (0.8, 0.0, 0.2), 10, 3.0),  # M is all steps
]


@pytest.mark.parametrize("steps, fractions, mis_steps, guidance", CASES)
def test_packed_rows_equal_the_sequential_sampler(steps, fractions, mis_steps, guidance):
    params, noise, conditions = make_inputs(4)
    images = make_images((1, 4, 0, 6))
    table = solver_table("plms", steps, SCHEDULE, fractions)
    actual = sample(fake_eps, params, noise, conditions, images, table, mis_steps=mis_steps, guidance_scale=guidance)
    evaluations = 0
    for i, image in enumerate(images):
        expected, count = sequential((params, noise[i], conditions), image, steps, fractions, mis_steps, guidance)
        evaluations += count
        assert relative_error(actual[i], expected) <= 1e-5
        # The count of the paper's algorithm: 2[(n+1)(M+1) + (S−M)] for M ≥ 1, 2(S+1) without.
        n = len(image.instances)
        formula = (n + 1) * (mis_steps + 1) + table.steps - mis_steps if mis_steps else table.steps + 1
        assert count == (1 + (guidance != 1)) * formula
    assert make_plan(table, SamplerSettings(mis_steps, guidance)).evaluations(images) == evaluations


def test_pieces():
    table = solver_table("plms", 50, SCHEDULE, (0.8, 0.0, 0.2))

    def plan(mis_steps, **settings):
        return list(make_plan(table, SamplerSettings(mis_steps, **settings)).pieces)

    released = [(0, 19, "all", True, True), (19, 41, "image", True, True), (41, 51, "image", False, True)]
    assert plan(18) == plan(18, guidance_interval=(0.0, 1.0), mis_guidance=True) == released
    assert plan(0) == [(0, 41, "image", True, True), (41, 51, "image", False, True)]
    assert plan(45) == [(0, 41, "all", True, True), (41, 46, "all", False, True), (46, 51, "image", False, True)]
    full = solver_table("plms", 50, SCHEDULE)
    assert list(make_plan(full, SamplerSettings()).pieces) == [(0, 51, "image", True, True)]
    for n, expected in ((4, 254), (6, 330), (30, 1242)):
        assert make_plan(table, SamplerSettings(18)).evaluations([ImageRows(0, 0, (1,) * n)]) == expected


def test_pieces_without_guidance():
    """Guidance begins and ends between steps, and instances' rows may have none."""
    table = solver_table("plms", 50, SCHEDULE, (0.8, 0.0, 0.2))

    def plan(**settings):
        return list(make_plan(table, SamplerSettings(18, **settings)).pieces)

    unguided = [(0, 19, "all", True, False), (19, 41, "image", True, False), (41, 51, "image", False, False)]
    for nothing in ((0.0, 0.0), (0.5, 0.5), (1.0, 1.0)):
        for mis_guidance in (True, False):
            assert plan(guidance_interval=nothing, mis_guidance=mis_guidance) == unguided
    assert plan(guidance_interval=(0.1, 0.6)) == [
        (0, 6, "all", True, False),
        (6, 19, "all", True, True),
        (19, 31, "image", True, True),
        (31, 41, "image", True, False),
        (41, 51, "image", False, False),
    ]
    assert plan(guidance_interval=(0.1, 0.9), mis_guidance=False) == [
        (0, 6, "global", True, False),
        (6, 19, "global", True, True),
        (0, 19, "instances", True, False),
        (19, 41, "image", True, True),
        (41, 46, "image", False, True),
        (46, 51, "image", False, False),
    ]
    image = ImageRows(0, 0, (1,) * 4)
    for options, expected in (
        (dict(), 254),
        (dict(mis_guidance=False), 4 * 19 + 2 * 51),
        (dict(guidance_interval=(0.0, 0.8)), 254 - 10),
        (dict(guidance_interval=(0.36, 1.0)), 5 * 19 + 2 * 32),
        (dict(guidance_interval=(1.0, 1.0)), 5 * 19 + 32),
    ):
        assert make_plan(table, SamplerSettings(18, **options)).evaluations([image]) == expected


def test_nothing_compiles_again():
    params, noise, conditions = make_inputs(3)
    images = make_images((2, 3, 1))
    first = solver_table("plms", 20, SCHEDULE, (0.8, 0.0, 0.2))
    sample(fake_eps, params, noise, conditions, images, first, mis_steps=7)
    traces = len(TRACES)
    for sampler, steps, alpha, mis_steps, guidance in (
        ("plms", 50, (0.5, 0.25, 0.25), 18, 5.0),
        ("ddim", 1000, (0.3, 0.0, 0.7), 20, 2.0),
        ("dpm++", 12, (0.5, 0.0, 0.5), 3, 7.5),
        *((sampler, 9, (0.6, 0.0, 0.4), 4, 3.0) for sampler in SOLVERS),
    ):
        options = dict(mis_steps=mis_steps, guidance_scale=guidance, events=[])
        table, other = solver_table(sampler, steps, SCHEDULE, alpha), make_inputs(3, seed=5)[2]
        with compilations() as compiled:
            sample(fake_eps, params, noise, other, make_images((2, 3, 1), seed=3), table, **options)
        assert len(TRACES) == traces and "denoise" not in compiled


def test_an_image_is_the_same_in_any_batch():
    params, noise, conditions = make_inputs(3)
    images = make_images((1, 4, 13))
    table = solver_table("plms", 20, SCHEDULE, (0.8, 0.0, 0.2))
    together = sample(fake_eps, params, noise, conditions, images, table, mis_steps=7)
    for i in range(3):
        alone = sample(fake_eps, params, noise[i : i + 1], conditions, images[i : i + 1], table, mis_steps=7)
        assert relative_error(together[i], alone[0]) <= 1e-5


@pytest.mark.parametrize("merge", ["mean", "crop"])
@pytest.mark.parametrize("max_rows", [1, 3, 10, 16])
def test_chunks_equal_one_batch(merge, max_rows):
    params, noise, conditions = make_inputs(4)
    images = make_images((1, 4, 0, 6))
    table = solver_table("plms", 10, SCHEDULE, (0.3, 0.0, 0.7))
    settings = dict(mis_steps=5, merge=merge)
    whole = sample(fake_eps, params, noise, conditions, images, table, **settings)
    chunked = sample(fake_eps, params, noise, conditions, images, table, max_rows=max_rows, **settings)
    assert relative_error(chunked, whole) <= 1e-5


def test_events_count_every_evaluation():
    params, noise, conditions = make_inputs(4)
    images = make_images((1, 4, 0, 6))
    table = solver_table("plms", 20, SCHEDULE, (0.8, 0.0, 0.2))
    events = []
    quiet = sample(fake_eps, params, noise, conditions, images, table, mis_steps=7, max_rows=10)
    shown = sample(
        fake_eps,
        params,
        noise,
        conditions,
        images,
        table,
        mis_steps=7,
        max_rows=10,
        events=events,
    )
    assert relative_error(shown, quiet) <= 1e-6
    assert all(np.isfinite(event.ready).all() and event.evaluations > 0 for event in events)
    total = make_plan(table, SamplerSettings(7)).evaluations(images)
    assert sum(event.evaluations for event in events) == total and len(events) > total / (2 * 10 * 6)


@pytest.mark.parametrize("devices", [1, 4, 8])
def test_buckets_waste_little(devices):
    for rows in range(1, 400):
        size = bucket_size(rows, devices)
        each = -(-rows // devices)
        assert size >= rows and size % devices == 0
        assert size == each * devices if each <= 8 else size <= 1.2 * each * devices
    assert bucket_size(21) == 25


def test_rows_of_a_batch():
    rows = pack_rows(make_images((1, 0, 7)), devices=4)
    assert (rows.count, rows.chunk, len(rows.image)) == (11, 12, 12)
    np.testing.assert_array_equal(rows.segment, [0, 0, 1, 2, 2, 2, 2, 2, 2, 2, 2, 3])
    np.testing.assert_array_equal(rows.slot, [0, 1, 0, 0, 1, 2, 3, 4, 5, 6, 7, -1])
    np.testing.assert_array_equal(rows.conditions[:4], [[1, 0], [2, 0], [3, 0], [4, 0]])
    for which in ("global", "image"):
        alone = pack_rows(make_images((1, 0, 7)), which)
        np.testing.assert_array_equal(alone.conditions, [[1, 0], [3, 0], [4, 0]])
    instances = pack_rows(make_images((1, 0, 7)), "instances", devices=3)
    assert (instances.count, instances.chunk, len(instances.image)) == (8, 9, 9)
    np.testing.assert_array_equal(instances.segment, [0, *(2,) * 7, 3])
    np.testing.assert_array_equal(instances.slot, [1, *range(1, 8), -1])
    for max_rows in range(1, 80):
        rows = pack_rows(make_images((3,) * 18), max_rows=max_rows)
        assert rows.chunk <= max_rows and len(rows.image) % rows.chunk == 0
        assert 0 <= len(rows.image) - rows.count < rows.chunk


def test_padding_takes_no_part_in_a_merge():
    rows = pack_rows(make_images((1, 2)), devices=8)
    latents = np.random.default_rng(0).standard_normal((8, H, W, C)).astype(np.float32)
    latents[rows.count :] = np.nan
    for weights in (mi.mean_weights(rows), mi.crop_weights(rows, H, W)):
        assert np.isfinite(
            mi.merge_rows(jnp.asarray(latents), jnp.asarray(rows.segment), 2, jnp.asarray(weights))
        ).all()
    merged = mi.merge_rows(jnp.asarray(latents), jnp.asarray(rows.segment), 2, jnp.asarray(mi.mean_weights(rows)))
    np.testing.assert_allclose(merged, [latents[:2].mean(0), latents[2:5].mean(0)], atol=1e-6)


def test_crop_merge_pastes_boxes_on_the_right_axes():
    height, width = 8, 12
    boxes = [(0.0, 0.5, 0.25, 1.0), (0.1, 0.4, 0.5, 0.8), (0.0, 0.0, 0.0, 0.0), (0.3, 0.3, 0.31, 0.31)]
    images = [ImageRows(0, 0), ImageRows(0, 0, (1, 2, 3, 4), boxes)]
    rows = pack_rows(images, devices=8)
    latents = np.random.default_rng(0).standard_normal((len(rows.image), height, width, C)).astype(np.float32)
    weights = mi.crop_weights(rows, height, width)
    merged = mi.merge_rows(jnp.asarray(latents), jnp.asarray(rows.segment), 2, jnp.asarray(weights))
    expected = latents[1].copy()
    expected[4:8, 0:3] = latents[2, 4:8, 0:3]
    expected[3:6, 1:6] = latents[3, 3:6, 1:6]  # 0.4·8 = 3.2 and 0.8·8 = 6.4; 0.1·12 = 1.2
    np.testing.assert_array_equal(merged, [latents[0], expected])


def test_inpainting_follows_the_released_blend():
    params, noise, conditions = make_inputs(2)
    images = make_images((2, 0))
    rng = np.random.default_rng(7)
    keep = (rng.uniform(size=(2, H, W, 1)) < 0.5).astype(np.float32)
    clean, fixed = (rng.standard_normal((2, H, W, C)).astype(np.float32) for _ in range(2))
    table = solver_table("plms", 20, SCHEDULE, (0.8, 0.0, 0.2))
    actual = sample(
        fake_eps,
        params,
        noise,
        conditions,
        images,
        table,
        mis_steps=7,
        guidance_scale=3.0,
        inpaint=Inpaint(*map(jnp.asarray, (clean, keep, fixed))),
    )
    for i, image in enumerate(images):
        known = clean[i], keep[i], fixed[i]
        expected, _ = sequential((params, noise[i], conditions), image, 20, (0.8, 0.0, 0.2), 7, 3.0, known)
        assert relative_error(actual[i], expected) <= 1e-5


def test_low_precision_networks_keep_a_float32_solver():
    params, noise, conditions = make_inputs(1)
    rows = pack_rows(make_images((0,)), "image")
    seen = []

    def bfloat16_eps(params, latents, timesteps, conditions, alpha):
        seen.append(latents.dtype)
        return fake_eps(params, latents, timesteps, conditions, alpha).astype(jnp.bfloat16)

    given = jax.tree.map(lambda a: a[rows.conditions], conditions)
    evaluations = Evaluations(solver_table("plms", 5, SCHEDULE).coefficients, 0, 6, 7.5)
    state = denoise(bfloat16_eps, params, start_state(noise), given, evaluations, use_fusers=True)
    assert {*seen, *(leaf.dtype for leaf in state[:3])} == {jnp.dtype(jnp.float32)}


def test_eight_devices_give_the_same_and_split_the_work():
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": PYTHONPATH,
    }
    done = subprocess.run(
        [sys.executable, str(SUPPORT / "row_mesh_cases.py")], env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
