"""Whole commands with everything in a bucket: the same bits as on this machine, whenever they are killed."""

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from run_cases import FACTS, small_state
from tiny_checkpoint import make_layout
from training_common import save_dataset, save_start
from trees import assert_same_trees

from common import PYTHONPATH, ROOT, SUPPORT
from instdiff_jax import buckets, files, paths
from instdiff_jax.checkpoint.folder import read_config, restore_params
from instdiff_jax.checkpoint.run import CHECKPOINTS
from instdiff_jax.cli import sample, train
from instdiff_jax.errors import InputError
from instdiff_jax.parallel.mesh import ParallelSettings, make_mesh
from instdiff_jax.training.checkpoints import DAMAGED, Checkpoints
from instdiff_jax.training.export import export, read_run
from instdiff_jax.training.state import make_sharding_plan

# ---------------------------------------------------------------- training


@pytest.fixture(scope="module")
def inputs(bucket, tmp_path_factory):
    """A start checkpoint and a dataset on this machine; the same is in the bucket."""
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "start")
    save_dataset(folder / "data")
    buckets.upload_folder(folder / "start", f"{bucket}/start", last="config.json")
    buckets.upload_folder(folder / "data", f"{bucket}/data", last="dataset.json")
    return folder


def start_train(place: str | Path, workdir: str | Path, log: Path, *overrides: str) -> subprocess.Popen:
    """A run on the start and the data at a place."""
    command = [sys.executable, str(ROOT / "train.py"), f"--config={SUPPORT / 'tiny_config.py'}"]
    command += [f"--config.data.dir={place}/data", f"--config.train.start={place}/start", f"--workdir={workdir}"]
    env = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": PYTHONPATH}
    env["JAX_COMPILATION_CACHE_DIR"] = f"{place}/xla"
    with log.open("w") as file:
        return subprocess.Popen([*command, *overrides], env=env, stdout=file, stderr=file)


def run_train(place: str | Path, workdir: str | Path, log: Path, *overrides: str) -> str:
    assert start_train(place, workdir, log, *overrides).wait() == 0, log.read_text()[-3000:]
    return log.read_text()


def steps(workdir: Path) -> tuple[list[int], list[int]]:
    """The finished and the unfinished checkpoints: orbax writes the mark last."""
    files = [name.split("/") for name in buckets.objects(workdir / CHECKPOINTS)]
    started = {int(step) for step, *_ in files}
    finished = {int(step) for step, *rest in files if rest == ["commit_success.txt"]}
    return sorted(finished), sorted(started - finished)


def final_state(workdir: Path, step: int):
    model, _, settings = read_run(workdir)
    alone = ParallelSettings(data=1, fsdp=1)
    plan = make_sharding_plan(model, settings, alone, make_mesh(alone, jax.devices()[:1]))
    return Checkpoints(workdir, {}, read_only=True).restore_at(step, plan.state_shapes())[1]


def numbers(workdir: Path) -> list[tuple]:
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    return [tuple(json.loads(line)[name] for name in ("step", "loss", "grad_norm", "learning_rate")) for line in lines]


@pytest.mark.slow
def test_a_run_in_a_bucket_that_is_killed_ten_times_goes_on_bit_for_bit(inputs, bucket, tmp_path):
    """While it starts, between saves and in saves."""
    rng, workdir, log, place = random.Random(0), buckets.as_path(bucket) / "killed", tmp_path / "log.txt", bucket
    every, newest, in_saves = "--config.train.save_every=2", 0, 0
    for i in range(10):
        process = start_train(place, workdir, log, every, "--config.train.steps=1000000")
        moment = rng.choice(["starting", "running", "saving"]) if i else "running"
        while process.poll() is None and moment != "starting":
            finished, unfinished = steps(workdir)
            if (moment == "running" and finished[-1:] > [newest]) or (
                moment == "saving" and unfinished and "from step" in log.read_text()
            ):
                break
        time.sleep(rng.random() * {"starting": 8, "running": 1, "saving": 0.1}[moment])
        assert process.poll() is None, log.read_text()[-3000:]
        process.kill()
        process.wait()
        finished, unfinished = steps(workdir)
        said, before, newest, in_saves = log.read_text(), newest, finished[-1], in_saves + bool(unfinished)
        assert "damaged" not in said and ("from step" not in said or f"from step {before} to" in said)
    print(f"10 kills, {in_saves} with a checkpoint half written; step {newest}")
    assert in_saves >= 2

    last = newest + 3
    said = run_train(place, workdir, log, f"--config.train.steps={last}", every)
    assert f"from step {newest} to {last}" in said and "damaged" not in said
    run_train(inputs, tmp_path / "straight", log, f"--config.train.steps={last}", "--config.train.save_every=1000000")
    assert_same_trees(final_state(workdir, last), final_state(tmp_path / "straight", last))
    assert numbers(workdir) == numbers(tmp_path / "straight")
    assert [line[0] for line in numbers(workdir)] == list(range(1, last + 1))
    # What the first start had computed is in the bucket, and compiled programs are.
    assert [name for name in buckets.objects(f"{bucket}/data") if name.endswith("embeddings.npy")]
    assert [name for name in buckets.objects(f"{bucket}/xla") if name.startswith("jit_train_step")]


def test_kills_in_saves_leave_whole_checkpoints(bucket):
    """A process that does nothing but save is killed while a checkpoint is half written."""
    workdir, newest = buckets.as_path(bucket) / "saves", 0
    for delay in (0.0, 0.05):
        command = [sys.executable, str(SUPPORT / "run_cases.py"), str(workdir), str(newest + 1)]
        env = os.environ | {"PYTHONPATH": PYTHONPATH, "JAX_PLATFORMS": "cpu"}
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == f"{newest + 1}\n"
        while not steps(workdir)[1]:
            assert process.poll() is None
        time.sleep(delay)
        process.kill()
        process.communicate()
        finished = steps(workdir)[0]
        newest = finished[-1]
        checkpoints = Checkpoints(workdir, FACTS)
        assert_same_trees(checkpoints.restore(shapes()), small_state(newest))
        # It goes on where that one was, over what is left of the next.
        checkpoints.save(newest + 1, small_state(newest + 1))
        checkpoints.close()
        newest += 1
    assert steps(workdir)[0][-1] == newest


def shapes():
    place = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), small_state(0))


def test_a_damaged_checkpoint_in_a_bucket_is_set_aside(bucket):
    workdir = buckets.as_path(bucket) / "damaged"
    checkpoints = Checkpoints(workdir, FACTS)
    for step in (5, 10):
        checkpoints.save(step, small_state(step))
    checkpoints.wait()
    sizes = {name: size for name, size in buckets.files_below(workdir / CHECKPOINTS / "10").items() if "/d/" in name}
    largest = workdir / CHECKPOINTS / "10" / max(sizes, key=sizes.get)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match=r"checkpoints/10: damaged"):
        assert_same_trees(checkpoints.restore(shapes()), small_state(5))
    assert steps(workdir)[0] == [5] and buckets.objects(workdir / DAMAGED / "10").keys() > sizes.keys()
    # The run comes by that step again, and can save it.
    checkpoints.save(10, small_state(10))
    checkpoints.wait()
    # A second run that starts there stops the first one before it saves.
    second = Checkpoints(workdir, FACTS)
    assert_same_trees(second.restore(shapes()), small_state(10))
    with pytest.raises(InputError, match="another run has started there"):
        checkpoints.save(15, small_state(15))
    checkpoints.close()
    second.close()


def train_here(place: str | Path, workdir: str | Path, *overrides: str) -> None:
    """A run in this process."""
    flags = [f"--config.data.dir={place}/data", f"--config.train.start={place}/start", f"--workdir={workdir}"]
    flags += ["--config.train.save_every=2", "--config.data.cache_latents=True"]
    train.main([f"--config={SUPPORT / 'tiny_config.py'}", *flags, *overrides])


@pytest.fixture(scope="module")
def runs(inputs, bucket, quick_compilation):
    """The same run on this machine and in a bucket, where it ends early and goes on."""
    train_here(inputs, inputs / "run", "--config.train.steps=3")
    for steps in (2, 3):
        train_here(bucket, f"{bucket}/run", f"--config.train.steps={steps}")
    return inputs / "run", buckets.as_path(bucket) / "run"


@pytest.mark.slow
def test_a_run_in_a_bucket_has_the_bits_of_one_on_this_machine(runs, bucket):
    local, remote = runs
    assert_same_trees(final_state(remote, 3), final_state(local, 3))
    assert numbers(remote) == numbers(local) and steps(remote) == ([2, 3], [])
    assert read_run(remote)[0] == read_run(local)[0]
    assert json.loads((remote / "config.json").read_text())["train"]["start"] == f"{bucket}/start"
    assert [name for name in buckets.objects(remote / "tensorboard") if "tfevents" in name]
    # What a run adds to its data, another host finds.
    latents = [name for name in buckets.objects(f"{bucket}/data/latents")]
    assert sorted(name.split("/")[1] for name in latents) == ["crc32.npy", "latents.json", "logvar.npy", "mean.npy"]


@pytest.mark.slow
def test_an_export_to_a_bucket_is_the_one_to_this_machine(runs, bucket, tmp_path):
    local, remote = runs
    assert export(local, tmp_path / "export") == export(remote, buckets.as_path(f"{bucket}/export")) == 3
    assert_same_trees(restore_params(f"{bucket}/export"), restore_params(tmp_path / "export"))
    assert read_config(f"{bucket}/export")[1:] == read_config(tmp_path / "export")[1:]
    with pytest.raises(InputError, match="a checkpoint is there already; --overwrite replaces it"):
        export(remote, buckets.as_path(f"{bucket}/export"))
    export(local, buckets.as_path(f"{bucket}/export"), step=2, overwrite=True)
    assert_same_trees(restore_params(f"{bucket}/export"), restore_params_of(local, 2, tmp_path))


def restore_params_of(workdir: Path, step: int, folder: Path):
    export(workdir, folder / str(step), step)
    return restore_params(folder / str(step))


# ---------------------------------------------------------------- sampling


@pytest.mark.slow
def test_samples_in_a_bucket_are_those_on_this_machine(tiny_checkpoint, bucket, tmp_path, capsys):
    for i in range(3):
        files.write_text(tmp_path / "layouts" / f"scene{i}.json", make_layout(1, seed=i).to_json())
    np.save(tmp_path / "noise.npy", np.ones((2, 16, 16, 4), np.float32))
    Image.new("RGB", (32, 32), "red").save(tmp_path / "start.png")
    buckets.upload_folder(tmp_path, f"{bucket}/in")
    buckets.upload_folder(tiny_checkpoint, f"{bucket}/in/checkpoint", last="config.json")

    def draw(place, checkpoint, out, *flags) -> str:
        inputs = ["--noise", f"{place}/noise.npy", "--init_image", f"{place}/start.png", "--strength", "0.5"]
        few = ["--steps", "2", "--mis", "0", "--num_images", "2", "--save_latents"]
        layouts = ["--checkpoint", str(checkpoint), "--layout", f"{place}/layouts", "--output", str(out)]
        sample.run(sample.parse_args([*layouts, *inputs, *few, *flags]))
        return capsys.readouterr().out

    remote = buckets.as_path(bucket) / "out"
    draw(tmp_path, tiny_checkpoint, tmp_path / "out")
    draw(f"{bucket}/in", f"{bucket}/in/checkpoint", remote)

    def contents(folder):
        return {name: paths.read_file(folder / name) for name in buckets.files_below(folder) if name != "run.json"}

    expected = contents(tmp_path / "out")
    assert contents(remote) == expected and len(expected) == 3 * 4 + 1
    ours, theirs = (json.loads(paths.read_file(folder / "run.json")) for folder in (remote, tmp_path / "out"))
    assert [entry["layout"] for entry in ours["layouts"]] == ["scene0", "scene1", "scene2"]
    assert ours["sampling"] == theirs["sampling"] and ours["fingerprint"] == theirs["fingerprint"]

    # Whole files are kept, a missing one and one of a changed layout are made again.
    (remote / "scene1" / "layout.png").unlink()
    files.write_text(f"{bucket}/in/layouts/scene2.json", make_layout(2, seed=2).to_json())
    said = draw(f"{bucket}/in", f"{bucket}/in/checkpoint", remote, "--resume")
    assert "4 images in" in said and "2 were there" in said and "changed: scene2" in said
    found = contents(remote)
    changed = {name for name in expected if found[name] != expected[name]}
    assert changed >= {f"scene2/{name}" for name in ("0.png", "1.png", "latents.npy", "layout.png")}
    # Images of another batch may differ by rounding.
    assert not changed & {"scene1/layout.png", *(name for name in expected if name.startswith("scene0"))}
    with pytest.raises(InputError, match="run.json: sampling: the images there were made with"):
        draw(f"{bucket}/in", f"{bucket}/in/checkpoint", remote, "--resume", "--guidance_scale", "2")
