"""`sample --resume`: what is done is kept, what changed or broke is made again."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import SIDE, TOKENIZER

from instdiff_jax import Pipeline
from instdiff_jax.checkpoint.folder import read_config, restore_params, save_folder
from instdiff_jax.cli import sample
from instdiff_jax.errors import InputError
from instdiff_jax.sampling import loading, outputs
from instdiff_jax.sampling import results as sampling_results
from instdiff_jax.tree import flatten, unflatten


def test_a_run_that_was_cut_off_goes_on(many, folder, monkeypatch):
    out, write = folder / "cut", outputs.write_image

    def fail(path, pixels, *rest):
        if path.parent.name == "scene2":
            raise KeyboardInterrupt
        write(path, pixels, *rest)

    def cut_off(*flags):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(outputs, "write_image", fail)
            many("--output", out, *flags)

    cut_off()
    record = json.loads((out / "run.json").read_text())
    assert [entry["layout"] for entry in record["layouts"]] == ["scene0", "scene1"] and "seconds" not in record
    (out / "scene0" / "layout.png").unlink()
    assert many("--output", out, "--resume", "--save_latents", "--seed", 0)[:1] == ["scene0"]
    record = json.loads((out / "run.json").read_text())
    assert record["seconds"] and len(record["layouts"]) == 5, "without latents no layout was finished"
    with pytest.raises(sample.InputError, match=r"run.json: sampling: the images there were made with .*--output"):
        (out / "scene3" / "0.png").unlink()
        many("--output", out, "--resume", "--guidance_scale", 2)
    # An older version's record lacks settings that it did not have: they had their defaults.
    record = json.loads((out / "run.json").read_text())
    for name in ("prompt_weights", "long_prompts", "sigmas"):
        del record["sampling"][name]
    (out / "run.json").write_text(json.dumps(record))
    assert many("--output", out, "--resume") == ["scene3"]
    # A file of latents is one run's: of other seeds it is not finished.
    assert many("--output", out, "--resume", "--save_latents", "--seed", 1) == [f"scene{i}" for i in range(5)]
    assert many("--output", out, "--resume", "--save_latents", "--seed", 1) == []
    assert len(many("--output", out, "--resume", "--save_latents", "--seed", 0)) == 5
    assert len(many("--output", out, "--resume", "--seed", 2)) == 5
    assert len(many("--output", out, "--resume", "--save_latents", "--seed", 2)) == 5, "those there are of seed 0"
    # Pictures of an earlier run with other settings are not what this one has finished.
    cut_off("--guidance_scale", 2)
    assert many("--output", out, "--resume", "--guidance_scale", 2) == ["scene2", "scene3", "scene4"]
    with (
        monkeypatch.context() as patched,
        pytest.raises(sample.InputError, match="run.json: fingerprint: the images"),
    ):
        patched.setattr(loading, "checkpoint_fingerprint", lambda folder, verify: "retrained")
        many("--output", out, "--resume", "--guidance_scale", 2)


def test_resume_makes_again_what_changed(many, folder, capsys):
    """Contents count, not paths: a layout that was edited, another start image or noise of the same name."""
    out, noise, start = folder / "edited", folder / "noise.npy", folder / "start.png"
    scene = folder / "many" / "scene1.json"
    before = scene.read_text()
    try:
        assert len(many("--output", out, "--resume")) == 5
        scene.write_text(before.replace("caption", "caption", 1).replace("thing 0", "box"))
        assert many("--output", out, "--resume") == ["scene1"]
        assert "made again" in capsys.readouterr().out
        assert many("--output", out, "--resume") == []
    finally:
        scene.write_text(before)
    flags = ("--output", folder / "edited2", "--resume", "--layout", scene, "--noise", noise, "--init_image", start)
    rng = np.random.default_rng(0)
    for changes in (("noise", "start"), (), ("noise",), ("start",), ()):
        if "noise" in changes:
            np.save(noise, rng.standard_normal((1, SIDE // 2, SIDE // 2, 4), np.float32))
        if "start" in changes:
            Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8)).save(start)
        assert many(*flags) == ["scene1"] * bool(changes)


def test_latents_that_are_not_finite_are_no_images(many, folder, monkeypatch):
    """One NaN weight, or an overflow of float16: the image is named, and nothing of its layout is written or done."""
    out, results = folder / "broken_weight", sampling_results.PendingBatch.results

    def broken(batch):
        bad = [(layout.name, seed) == ("scene2", 1) for layout, seed in zip(batch.layouts, batch.seeds, strict=True)]
        latents = np.where(np.reshape(bad, (-1, 1, 1, 1)), np.inf, np.asarray(batch.latents)[: len(bad)])
        return results(batch._replace(latents=latents))

    with monkeypatch.context() as patched, pytest.raises(sample.InputError, match="scene2: seed 1: .*not finite"):
        patched.setattr(sampling_results.PendingBatch, "results", broken)
        many("--output", out, "--num_images", 2)
    assert (out / "scene1" / "1.png").exists() and not list(out.glob("scene2/*"))
    record = json.loads((out / "run.json").read_text())
    assert [entry["layout"] for entry in record["layouts"]] == ["scene0", "scene1"]
    assert many("--output", out, "--num_images", 2, "--resume") == ["scene2", "scene3", "scene4"]


def change_weight(folder, new, path, change):
    """A copy of the checkpoint with one changed array."""
    params = restore_params(folder / "checkpoint", as_numpy=True)
    leaves = flatten(params)
    leaves[path] = change(leaves[path].copy())
    save_folder(folder / new, unflatten(leaves), *read_config(folder / "checkpoint")[:2], TOKENIZER)


def one_nan(kernel):
    kernel.flat[0] = np.nan
    return kernel


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_an_overflow_of_float16_is_no_image(many, folder, capsys):
    """Weights that float16 holds, and whose products it does not: float32 draws with them, float16 names the step."""
    change_weight(folder, "large", ("unet", "conv_in", "kernel"), lambda kernel: kernel * (6e4 / np.abs(kernel).max()))
    out = folder / "overflow"
    flags = ("--output", out, "--checkpoint", "large", "--layout", "many/scene0.json", "--steps", 10, "--dtype")
    broken = r"scene0: seed 0: the latents are not finite from steps 1 to 4 of 10: a weight is not, or float16 overflow"
    for more in ((), ("--resume",)):
        with pytest.raises(InputError, match=broken):
            many(*flags, "float16", *more)
        assert not list(out.glob("*/*.png"))
    assert many(*flags, "float32") == ["scene0"]


@pytest.mark.usefixtures("quick_compilation")
def test_a_broken_autoencoder_draws_no_black_image(many, folder):
    change_weight(folder, "broken", ("autoencoder", "decoder", "conv_out", "kernel"), one_nan)
    out = folder / "undecoded"
    for more in ((), ("--resume",)):
        with pytest.raises(InputError, match="scene0: seed 0: the decoded image is not finite, and its latents are"):
            many("--output", out, "--checkpoint", "broken", *more)
        assert not list(out.glob("*/*.png"))
    pipeline = Pipeline.from_checkpoint(folder / "broken")
    with pytest.raises(InputError, match="decode: an image is not finite"):
        pipeline.decode(np.zeros((1, SIDE // 2, SIDE // 2, 4), np.float32))
