"""The pipeline on a tiny model: batches, seeds, programs and settings."""

import dataclasses

import numpy as np
import pytest
from compilations import compilations
from tiny_checkpoint import SIDE, make_layout

from common import relative_error
from instdiff_jax import Layout, Pipeline
from instdiff_jax.analysis.flops import count_flops
from instdiff_jax.config import ModelConfig
from instdiff_jax.diffusion import multi_instance
from instdiff_jax.sampling import memory
from instdiff_jax.sampling.presets import PRESETS

LATENT = (SIDE // 2, SIDE // 2, 4)


pytestmark = pytest.mark.usefixtures("quick_compilation")


def latents(results) -> np.ndarray:
    return np.stack([result.latents for result in results])


@pytest.fixture
def recorded(monkeypatch):
    """What `denoise` is called with: (FLOPs of one evaluation, evaluations, with fusers)."""
    calls, original = [], multi_instance.denoise

    def record(eps_fn, *args, **settings):
        flops = count_flops(lambda *args: original.__wrapped__(eps_fn, *args, **settings), *args)
        calls.append((flops, int(args[-1].stop) - int(args[-1].start), settings["use_fusers"]))
        return original(eps_fn, *args, **settings)

    monkeypatch.setattr(multi_instance, "denoise", record)
    return calls


# ---------------------------------------------------------------- batches and seeds


def test_a_batch_equals_each_layout_alone(tiny_checkpoint, recorded):
    """1, 4 and 13 instances together, in one program; FLOPs are those of the rows there are."""
    layouts = [make_layout(count, f"scene{count}", mask=count == 4) for count in (1, 4, 13)]
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint, max_rows=64)
    together = pipeline(layouts, seeds=[3], alpha=1.0)
    phase = [call for call in recorded if call[1] == 3]  # mis 0.5 of 4 steps: two, and PLMS's extra evaluation
    assert len(phase) == 1
    recorded.clear()
    alone = [pipeline([layout], seeds=[3], alpha=1.0)[0] for layout in layouts]
    assert [result.layout.name for result in together] == ["scene1", "scene4", "scene13"]
    for ours, one in zip(together, alone, strict=True):
        assert relative_error(ours.latents, one.latents) <= 1e-4
        assert np.abs(ours.array.astype(int) - one.array).max() <= 1
    two_rows = recorded[0][0]
    rows = sum(count + 1 for count in (1, 4, 13))
    assert phase[0][0] / (two_rows / 2 * rows) <= 1.2
    assert rows < 3 * 14 / 1.2, "the bound tells rows from a padded maximum"


def test_a_picture_depends_on_its_own_seed_alone(pipeline, monkeypatch):
    """Its noise is the same bits in any batch, its latents are equal to rounding: also with a stochastic solver."""
    starts, keys, original = [], [], multi_instance.start_state

    def record(noise, key):
        starts.append(np.asarray(noise))
        keys.append(key)
        return original(noise, key)

    monkeypatch.setattr(multi_instance, "start_state", record)
    one, two = make_layout(3, "one"), make_layout(3, "two", seed=1)
    alone = pipeline([one], seeds=[5], sampler="euler_a")[0]
    batch = pipeline([two, one], seeds=[4, 5], sampler="euler_a")
    assert [(result.layout.name, result.seed) for result in batch] == [("two", 4), ("two", 5), ("one", 4), ("one", 5)]
    assert relative_error(batch[3].latents, alone.latents) <= 1e-4
    assert relative_error(batch[2].latents, alone.latents) > 1e-2
    first, *rest = starts
    assert first.dtype == np.float32
    assert all(np.array_equal(noise, first[0]) for noise in np.concatenate(rest)[[1, 3]])
    first, *rest = keys
    assert all(np.array_equal(key, first[0]) for key in np.concatenate(rest)[[1, 3]])
    assert not np.array_equal(np.concatenate(rest)[0], first[0])


def test_given_noise_takes_the_place_of_the_seed(pipeline):
    noise = np.random.default_rng(8).standard_normal((1, *LATENT), dtype=np.float32)
    given = pipeline([make_layout(3)], seeds=[0], noise=noise)[0]
    assert relative_error(given.latents, pipeline([make_layout(3)], seeds=[8])[0].latents) <= 1e-6


def test_chunks_of_max_rows_and_canvases_that_differ(tiny_checkpoint, pipeline):
    layouts = [make_layout(3, "a"), make_layout(3, "b", side=48), make_layout(3, "c", seed=2)]
    results = Pipeline.from_checkpoint(tiny_checkpoint, max_rows=2)(layouts, alpha=1.0)
    assert [result.array.shape for result in results] == [(32, 32, 3), (48, 48, 3), (32, 32, 3)]
    whole = pipeline([layouts[2]], alpha=1.0)[0]
    assert relative_error(results[2].latents, whole.latents) <= 1e-4


def test_rows_of_a_program_follow_the_canvas(tiny_checkpoint, pipeline):
    rows = [
        Pipeline(ModelConfig(), pipeline.sampling, {}, None).limits.row_limit(canvas)
        for canvas in ((512, 512), (1024, 1024), (256, 256))
    ]
    assert rows[1] == max(rows[0] // 4, 1) and rows[2] == 4 * rows[0]
    assert pipeline.limits.row_limit((32, 32)) == 16 * rows[0]
    assert Pipeline.from_checkpoint(tiny_checkpoint, max_rows=3).limits.row_limit((1024, 1024)) == 3


def test_progress_counts_to_its_end(pipeline):
    calls = []
    layouts = [make_layout(3), make_layout(3, "two")]
    list(pipeline.stream(layouts, seeds=[0, 1], progress=lambda done, total: calls.append((done, total))))
    done, total = zip(*calls, strict=True)
    assert done[-1] == total[-1] == total[0] and list(done) == sorted(done)


# ---------------------------------------------------------------- programs


def test_nothing_compiles_again(pipeline, monkeypatch):
    """A new prompt, layout, step count, α, mis and solver run the programs there are: three of the UNet at most."""
    fresh = pipeline.networks.unet.clone(name="fresh")  # no other test's programs
    monkeypatch.setattr(pipeline, "networks", pipeline.networks._replace(unet=fresh))
    with compilations() as compiled:
        pipeline([make_layout(3, mask=True)], seeds=[0], steps=6, alpha=0.8, mis=0.4)
    assert compiled.count("denoise") == 3
    other = Layout.from_dict(make_layout(3, seed=9, mask=True).to_dict() | {"caption": "quite another prompt"})
    for settings in (
        dict(steps=9, alpha=(0.5, 0.25, 0.25), mis=0.4, negative_prompt="ugly", guidance_scale=3.0),
        dict(steps=12, alpha=0.6, mis=0.25, sampler="ddim"),
        dict(steps=7, alpha=0.5, mis=0.3, sampler="dpm++"),
        dict(steps=5, alpha=0.6, mis=0.4, sampler="heun", sigmas="karras"),
        dict(steps=6, alpha=0.5, mis=0.4, sampler="tcd"),
    ):
        with compilations() as compiled:
            pipeline([other], seeds=[7], **settings)
        assert compiled == []
    # Nor does the UNet where a run is cut for a progress bar, or begins without MIS: with the same rows.
    for settings in (dict(mis=0.0, alpha=0.8), dict(mis=0.6, alpha=0.8), dict(mis=0.5, alpha=0.8)):
        with compilations() as compiled:
            list(pipeline.stream([other], seeds=[7], steps=14, **settings, progress=lambda done, total: None))
        assert "denoise" not in compiled


def test_only_what_is_pasted_is_denoised_alone(pipeline, recorded):
    """With the crop merge, instances without a box change nothing: they are not denoised, and not counted."""
    layout = make_layout(3, mask=True)
    first, second, third = layout.instances
    point = dataclasses.replace(second, box=None, mask=None, point=(10.0, 12.0))
    mixed = dataclasses.replace(layout, instances=(first, point, third))
    settings = dict(seeds=[0], steps=8, alpha=1.0, mis=0.5, sampler="ddim")

    def draw(layout, **more):
        calls = []
        recorded.clear()
        [result] = pipeline.stream([layout], **settings, **more, progress=lambda *counts: calls.append(counts))
        assert calls[-1][0] == calls[-1][1]
        return result.latents, calls[-1][1]

    _, count = draw(mixed, merge="crop")
    _, most = draw(mixed, merge="mean")
    assert most == 2 * (4 * 4 + 4) and count == most - 2 * 4
    assert draw(mixed, merge="crop", format="point")[1] == 2 * 8
    # Without any format there is no instance; rows and their negative entries are still where they belong.
    drop = ("box", "point", "scribble", "mask")
    for masked in ("none", "correct"):
        with_mis, count = draw(mixed, drop=drop, masked_attention=masked)
        without = pipeline([mixed], **(settings | dict(mis=0.0)), drop=drop, masked_attention=masked)[0]
        assert count == 2 * 8
        np.testing.assert_array_equal(with_mis, without.latents)


def test_memory_of_masked_attention_counts_on_a_gpu(monkeypatch):
    """cuDNN takes a mask as a bias of all pairs of tokens, in 16 bits alone."""
    monkeypatch.setattr(memory, "gpu_memory", lambda: 80 * 10**9)
    half, whole = (memory.MemoryLimits(ModelConfig(), itemsize, parameter_bytes=0) for itemsize in (2, 4))
    latents = 128 * 128
    assert half.rows_in_memory(latents, masked=True) < half.rows_in_memory(latents, masked=False)
    assert whole.rows_in_memory(latents, masked=True) == whole.rows_in_memory(latents, masked=False)


def test_fusers_leave_the_program_after_alpha(pipeline, recorded):
    pipeline([make_layout(3)], seeds=[0], steps=8, alpha=0.5, mis=0.25)
    fused = [flops for flops, _, use_fusers in recorded if use_fusers]
    unfused = [flops for flops, _, use_fusers in recorded if not use_fusers]
    assert len(recorded) == 3 and len(fused) == 2 and len(unfused) == 1
    assert unfused[0] < 0.85 * fused[1]
    assert [count for _, count, _ in recorded] == [3, 2, 4]


def test_without_guidance_an_evaluation_costs_half(pipeline, recorded):
    """And instances without it take one latent each instead of two."""
    pipeline([make_layout(3)], seeds=[0], steps=8, alpha=1.0, mis=0.25, guidance_interval=(0.0, 0.5))
    (whole, *_), guided, unguided = recorded
    assert [count for _, count, _ in recorded] == [3, 2, 4]
    assert unguided[0] == pytest.approx(guided[0] / 2, rel=1e-3)
    recorded.clear()
    pipeline([make_layout(3)], seeds=[0], steps=8, alpha=1.0, mis=0.25, mis_guidance=False)
    rows = [flops for flops, _, _ in recorded]
    assert [count for _, count, _ in recorded] == [3, 3, 6]
    assert rows[0] == rows[2] == guided[0] and rows[0] + rows[1] == pytest.approx(whole * 5 / 8, rel=1e-3)


# ---------------------------------------------------------------- settings


def test_a_preset_is_its_settings(pipeline):
    assert pipeline.settings("quality") == pipeline.settings() == pipeline.sampling
    assert pipeline.settings("fast", steps=3) == pipeline.settings(**PRESETS["fast"] | {"steps": 3})
    by_name = pipeline([make_layout(3)], preset="fast", steps=3)[0]
    by_hand = pipeline([make_layout(3)], **PRESETS["fast"] | {"steps": 3})[0]
    assert np.array_equal(by_name.latents, by_hand.latents)


def test_masked_attention(pipeline):
    images = {
        kind: pipeline([make_layout(3)], mis=0.0, alpha=1.0, masked_attention=kind)[0].latents
        for kind in ("none", "correct", "official")
    }
    assert relative_error(images["correct"], images["none"]) > 1e-3
    assert relative_error(images["official"], images["none"]) > 1e-3
    assert relative_error(images["official"], images["correct"]) > 1e-3


def test_masked_attention_spares_instances_without_a_region(pipeline):
    """Points alone have no region: nothing is masked."""
    annos = [{"caption": f"thing {i}", "point": [4 + 8 * i, 9]} for i in range(3)]
    layout = Layout.from_dict({"caption": "points", "width": SIDE, "height": SIDE, "annos": annos})
    settings = dict(mis=0.0, alpha=1.0)
    plain, masked = (pipeline([layout], masked_attention=kind, **settings)[0].latents for kind in ("none", "correct"))
    assert relative_error(masked, plain) <= 1e-5


@pytest.mark.parametrize(
    "changes",
    [
        dict(merge="crop"),
        dict(mis=0.0),
        dict(guidance_scale=3.0),
        dict(guidance_interval=(0.0, 0.5)),
        dict(mis_guidance=False),
        dict(reuse=2),
        dict(format="point"),
    ],
)
def test_settings_matter(pipeline, changes):
    plain = pipeline([make_layout(3)], seeds=[0])[0]
    assert relative_error(pipeline([make_layout(3)], seeds=[0], **changes)[0].latents, plain.latents) > 1e-3


def test_bfloat16_stays_close_to_float32(tiny_checkpoint, pipeline):
    """With guidance 7.5. docs/parity.md has the small model's numbers."""
    layouts, settings = [make_layout(3, mask=True)], dict(mis=0.0, alpha=1.0)
    exact, rough = (
        pipeline(layouts, **settings),
        Pipeline.from_checkpoint(tiny_checkpoint, "bfloat16")(layouts, **settings),
    )
    assert rough[0].latents.dtype == np.float32
    error = relative_error(rough[0].latents, exact[0].latents)
    print(f"bfloat16: {error:.3f}, pixels {np.abs(rough[0].array.astype(int) - exact[0].array).mean():.2f}")
    assert error <= 0.06
