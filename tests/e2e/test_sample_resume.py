"""`sample --resume`: what is done is kept, what changed or broke is made again."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import SIDE

from instdiff_jax.cli import sample
from instdiff_jax.sampling import loading, outputs
from instdiff_jax.sampling import results as sampling_results


def test_a_run_that_was_cut_off_goes_on(many, folder, monkeypatch):
    out, write = folder / "cut", outputs.write_image

    def fail(path, pixels, made_from):
        if path.parent.name == "scene2":
            raise KeyboardInterrupt
        write(path, pixels, made_from)

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
        patched.setattr(loading, "checkpoint_fingerprint", lambda folder: "retrained")
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
