"""The pipeline on a tiny model: start images, errors, a mesh, and limits of memory."""

import json
import os
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from tiny_checkpoint import SIDE, make_layout

from common import PYTHONPATH, relative_error
from instdiff_jax import Pipeline
from instdiff_jax.errors import InputError

LATENT = (SIDE // 2, SIDE // 2, 4)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def latents(results) -> np.ndarray:
    return np.stack([result.latents for result in results])


def picture(side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (side, side, 3)).astype(np.uint8)


def test_inpainting_keeps_the_known_region(pipeline):
    mask, settings = np.zeros((SIDE, SIDE), bool), dict(mis=0.0, alpha=1.0)
    mask[5:20, 9:30] = True
    result = pipeline([make_layout(3)], init_image=picture(), inpaint_mask=mask, **settings)[0]
    assert np.array_equal(result.array[~mask], picture()[~mask])
    assert np.abs(result.array[mask].astype(int) - picture()[mask]).mean() > 5
    free = pipeline([make_layout(3)], **settings)[0]
    assert relative_error(result.latents, free.latents) > 1e-2, "the painted part knows of the rest"


def test_strength_orders_how_far_a_picture_moves(pipeline):
    start = np.asarray(pipeline.encode(picture()))[0]
    moved, quiet = [], dict(guidance_scale=1.5)
    for strength in (0.2, 0.6, 1.0):
        result = pipeline([make_layout(3)], init_image=picture(), strength=strength, steps=10, **quiet)[0]
        moved.append(np.abs(result.latents - start).mean())
    assert moved == sorted(moved)
    whole = pipeline([make_layout(3)], steps=10, **quiet)[0].latents
    assert relative_error(result.latents, whole) <= 1e-6, "strength 1 starts from noise alone"


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(width=30), "width: expected a multiple of 4 pixels, got 30; nearest: 32"),
        (dict(height=-4), "height: expected a multiple of 4"),
        (dict(steps=0), "sampling.steps: expected a whole number from 1 to 1000, got 0"),
        (dict(mis=1.5), "sampling.mis: expected a fraction"),
        (dict(guidance_interval=(0.5, 1.5)), "sampling.guidance_interval: expected two fractions"),
        (dict(preset="slow"), "preset: expected one of quality, fast"),
        (dict(alpha=(0.5, 0.5)), "sampling.alpha: expected a fraction"),
        (dict(sampler="eulr"), "sampling.sampler: expected one of plms, ddim, dpm.., .*, lcm, tcd, got .eulr."),
        (dict(masked_attention="yes"), "sampling.masked_attention: expected one of none"),
        (dict(guidance_scale=float("nan")), "sampling.guidance_scale: expected"),
        (dict(seeds=[-1]), "seed: expected a whole number"),
        (dict(format="boxes"), "format: expected one of auto"),
        (dict(noise=np.zeros((1, 3, 3, 4), np.float32)), "noise: expected float32 of shape"),
        (dict(noise=np.full((1, *LATENT), np.nan, np.float32)), "not finite"),
        (dict(init_image=picture(16)), "init_image: expected 32×32 pixels as the canvas, got 16×16"),
        (dict(init_image=picture().astype(float)), "init_image: expected uint8"),
        (dict(strength=0.5), "strength: expected an init_image"),
        (dict(init_image=picture(), strength=0.0), "strength: expected a number above 0"),
        (dict(init_image=picture(), inpaint_mask=np.zeros((3, 3), bool)), "inpaint_mask: expected bool of shape"),
    ],
)
def test_errors_name_what_is_wrong(pipeline, options, message):
    with pytest.raises(InputError, match=message.replace("(", r"\(")) as error:
        pipeline([make_layout(1)], **options)
    assert "\n" not in str(error.value)


def test_checkpoints_that_cannot_sample(tiny_checkpoint, tmp_path):
    with pytest.raises(InputError, match="not a checkpoint folder"):
        Pipeline.from_checkpoint(tmp_path / "nowhere")
    with pytest.raises(InputError, match="dtype: expected one of float32"):
        Pipeline.from_checkpoint(tiny_checkpoint, "float8")
    shutil.copytree(tiny_checkpoint, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    del config["crc32"]
    config["absent"] = ["fusers", "scaleu", "unifusion", "trunk"]
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="cannot sample: fusers, scaleu, unifusion, trunk absent"):
        Pipeline.from_checkpoint(tmp_path / "base")
    shutil.copytree(tiny_checkpoint, tmp_path / "torn")
    largest = max((tmp_path / "torn" / "params" / "unet").rglob("*"), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[:-10])
    with pytest.raises(InputError, match="incomplete or changed"):
        Pipeline.from_checkpoint(tmp_path / "torn")


@pytest.mark.filterwarnings("ignore:os.fork")
def test_a_pipeline_used_after_a_fork_is_an_error(tiny_checkpoint):
    """jax would wait forever in the forked process, which has none of its threads."""
    pipeline = Pipeline.from_checkpoint(tiny_checkpoint)
    latents, picture_ = np.zeros((1, *LATENT), np.float32), picture()
    uses = [
        lambda: pipeline([make_layout(1)]),
        lambda: pipeline.stream(make_layout(1)),
        lambda: pipeline.without_scaleu()([make_layout(1)]),
        lambda: pipeline.decode(latents),
        lambda: pipeline.encode(picture_),
    ]
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        refused = b""
        try:
            signal.alarm(60)  # a hang ends here
            for use in uses:
                try:
                    use()
                except InputError as error:
                    refused += b"+" * ("made before a fork" in str(error))
        finally:
            os.write(writing, refused)
            os._exit(0)
    os.close(writing)
    os.waitpid(child, 0)
    with open(reading, "rb") as stream:
        assert stream.read() == b"+" * len(uses)


# ---------------------------------------------------------------- a mesh

MESH_SCRIPT = """
import sys
import jax, numpy as np
import conftest
from instdiff_jax import Pipeline
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from tiny_checkpoint import make_layout
assert jax.device_count() == 8
mesh = make_mesh(ParallelSettings(fsdp=2), jax.devices())
layouts = [make_layout(3), make_layout(3, seed=1)]
results = Pipeline.from_checkpoint(sys.argv[1], mesh=mesh)(layouts, seeds=[0, 1], alpha=1.0)
np.save(sys.argv[2], [result.latents for result in results])
"""


@pytest.mark.slow
def test_eight_devices_draw_the_same(tiny_checkpoint, pipeline, tmp_path):
    env = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "PYTHONPATH": PYTHONPATH,
    }
    command = [sys.executable, "-c", MESH_SCRIPT, str(tiny_checkpoint), str(tmp_path / "latents.npy")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    expected = latents(pipeline([make_layout(3), make_layout(3, seed=1)], seeds=[0, 1], alpha=1.0))
    assert relative_error(np.load(tmp_path / "latents.npy"), expected) <= 1e-4


def test_a_gpus_memory_bounds_rows_and_decoding(pipeline, monkeypatch):
    """Rows and images are as many as fit beside the parameters, at least one; a CPU's are not bounded."""
    limits = pipeline.limits
    assert limits.rows_in_memory(64 * 64) == sys.maxsize
    device = types.SimpleNamespace()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "local_devices", lambda: [device])

    def rows(limit, latents=64 * 64):
        device.memory_stats = lambda: {"bytes_limit": limit}
        return limits.rows_in_memory(latents)

    def decoded(limit):
        device.memory_stats = lambda: {"bytes_limit": limit}
        return limits.decode_limit((64, 64))

    assert decoded(10**6) == 1 < decoded(10**10)
    assert rows(10**6) == 1 < rows(6 * 10**9) < rows(12 * 10**9) < rows(12 * 10**9, 32 * 32)
    device.memory_stats = lambda: None
    assert limits.rows_in_memory(64 * 64) == sys.maxsize
