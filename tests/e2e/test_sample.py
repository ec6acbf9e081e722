"""`sample.py` as users run it: outputs, errors in one line with exit code 2, what it imports, no network."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sample_errors import WRONG
from tiny_checkpoint import SIDE

from instdiff_jax.cli import sample
from instdiff_jax.sampling import outputs

ROOT = Path(__file__).resolve().parent.parent.parent
# Sockets that reach anything but this machine are an error.
NO_NETWORK = """
import socket
def refuse(self, address, *rest):
    raise AssertionError(f"network: {address}")
socket.socket.connect = socket.socket.connect_ex = refuse
socket.getaddrinfo = refuse
"""


def run(folder: Path, *flags, prelude: str = "") -> subprocess.CompletedProcess:
    """`sample.py` in a process of its own, in `folder`."""
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "HF_HUB_OFFLINE": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    script = f"{prelude}\nimport runpy, sys\nsys.argv[0] = {str(ROOT / 'sample.py')!r}\n"
    script += "sys.path.insert(0, sys.argv[0].rsplit('/', 1)[0])\nrunpy.run_path(sys.argv[0], run_name='__main__')"
    command = [sys.executable, "-c", script, *map(str, flags)]
    return subprocess.run(command, env=env, cwd=folder, capture_output=True, text=True, check=False)


GOOD = ("--checkpoint", "checkpoint", "--layout", "scenes", "--output", "out")


def test_outputs(folder):
    flags = ("--num_images", 2, "--seed", 7, "--save_latents", "--steps", 3, "--alpha", "0.5,0.25,0.25")
    done = run(folder, *GOOD, *flags, prelude=NO_NETWORK)
    assert done.returncode == 0, done.stderr
    assert "2 images in out" in done.stdout
    out = folder / "out"
    names = sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file())
    inside = [f"scene/{name}" for name in ("7.png", "8.png", "latents.npy", "layout.png")]
    assert names == ["contact_sheet.png", "run.json", *inside]
    for name in ("7.png", "8.png", "layout.png"):
        with Image.open(out / "scene" / name) as image:
            assert image.size == (SIDE, SIDE) and image.mode == "RGB"
    latents = np.load(out / "scene" / "latents.npy")
    assert latents.shape == (2, SIDE // 2, SIDE // 2, 4) and latents.dtype == np.float32
    record = json.loads((out / "run.json").read_text())
    assert record["sampling"]["steps"] == 3 and record["sampling"]["alpha"] == [0.5, 0.25, 0.25]
    assert record["layouts"][0]["layout"] == "scene" and record["layouts"][0]["seeds"] == [7, 8]
    assert record["dtype"] == "float32" and record["model"]["unet"]["model_channels"] == 32
    assert set(record["seconds"]) == {"loading", "sampling"} and record["checkpoint"] == "checkpoint"


def files(place: Path) -> dict[str, tuple[bytes, int]]:
    return {str(path.relative_to(place)): (path.read_bytes(), path.stat().st_mtime_ns) for path in place.rglob("*.png")}


def test_shards_make_up_the_whole_and_a_resumed_run_redoes_nothing(many, folder):
    whole, parts = folder / "whole", folder / "parts"
    assert many("--output", whole) == [f"scene{i}" for i in range(5)]
    assert many("--output", parts, "--shard", "0/2") == ["scene0", "scene2", "scene4"]
    assert not (parts / "contact_sheet.png").exists() and not (parts / "run.json").exists()
    assert json.loads((parts / "run-0-of-2.json").read_text())["seconds"]
    before = files(parts)
    assert many("--output", parts, "--shard", "1/2", "--resume") == ["scene1", "scene3"]
    assert {name: seen for name, seen in files(parts).items() if name in before} == before

    finished = files(parts)
    assert many("--output", parts, "--resume") == [], "the contact sheet alone is new"
    assert {name: seen for name, seen in files(parts).items() if name != "contact_sheet.png"} == finished
    assert finished.keys() | {"contact_sheet.png"} == files(whole).keys()
    for name in files(whole):
        ours, theirs = (np.asarray(Image.open(place / name)).astype(int) for place in (parts, whole))
        assert np.abs(ours - theirs).max() <= 1


def test_an_output_folder_is_no_layout(many, folder):
    """Layouts and pictures may share a folder: what a run notes there is not drawn."""
    assert len(many("--output", folder / "many", "--resume")) == 5
    try:
        assert many("--output", folder / "many", "--resume") == []
    finally:
        (folder / "many" / "run.json").unlink()


def test_pictures_are_written_as_they_come(many, folder, monkeypatch):
    out, write, made = folder / "streamed", outputs.write_image, []

    def fail(path, pixels, *rest):
        if len(made) == 2:
            raise KeyboardInterrupt
        made.append(path)
        write(path, pixels, *rest)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(outputs, "write_image", fail)
        many("--output", out, "--num_images", 3, "--max_rows", 1)
    assert [path.name for path in made] == ["0.png", "1.png"] and all(path.exists() for path in made)


def test_a_broken_layout_stops_a_run_before_anything_is_written(many, folder):
    bad = folder / "many" / "scene9.json"
    bad.write_text('{"caption": "half')
    try:
        with pytest.raises(sample.InputError, match="scene9.json: not valid JSON"):
            many("--output", folder / "none")
        assert not (folder / "none").exists()
    finally:
        bad.unlink()


@pytest.mark.parametrize(("flags", "message"), WRONG, ids=[" ".join(flags) for flags, _ in WRONG])
def test_wrong_input_ends_in_one_line(folder, monkeypatch, flags, message):
    """In this process, for speed; `test_exit_code` runs the real thing."""
    monkeypatch.chdir(folder)
    with pytest.raises(sample.InputError) as error:
        sample.run(sample.parse_args([*GOOD, *flags]))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"), [((), "--image_id: expected"), (("--image_id", "5"), "no image has the id 5")]
)
def test_wrong_images_of_coco(folder, monkeypatch, flags, message):
    monkeypatch.chdir(folder)
    with pytest.raises(sample.InputError, match=message):
        sample.run(sample.parse_args(["--checkpoint", "checkpoint", "--output", "out", "--coco", "coco.json", *flags]))


def test_an_error_leaves_no_empty_folder_behind(folder, monkeypatch):
    monkeypatch.chdir(folder)
    for flags in (("--checkpoint", "nowhere"), ("--width", "30"), ("--seed", "-1")):
        with pytest.raises(sample.InputError):
            sample.run(sample.parse_args([*GOOD, "--output", "new", *flags]))
        assert not (folder / "new").exists()


@pytest.mark.parametrize(
    "flags",
    [
        ("--layout", "broken.json"),
        ("--layout", "scenes", "others"),
        ("--output", "broken.json"),
        ("--mis", "2"),
        ("--checkpoint", "nowhere"),
    ],
)
def test_exit_code(folder, flags):
    done = run(folder, *GOOD, *flags)
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr, done.stderr
    assert not (folder / "out2").exists()


@pytest.mark.parametrize(
    "flags",
    [("--format", "boxes"), ("--preset", "slow"), ("--steps", "many"), ("--alpha", "x"), ("--unknown",)],
)
def test_flags_of_another_type(folder, flags):
    done = run(folder, *GOOD, *flags)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and flags[0] in line


def test_imports_are_light(folder):
    """Sampling brings in nothing of training, data sets or plotting, and no other framework."""
    heavy = ("torch", "tensorflow", "grain", "tensorflow_datasets", "matplotlib", "diffusers", "optax", "skimage")
    tell = "import atexit, sys\n@atexit.register\ndef tell():\n    print('LOADED', *sys.modules)\n"
    done = run(folder, *GOOD, "--output", "light", "--steps", "1", "--mis", "0", "--alpha", "0", prelude=tell)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split("LOADED", 1)[1].split())
    assert "instdiff_jax.sampling.pipeline" in loaded
    assert not loaded & set(heavy), loaded & set(heavy)


def test_a_process_with_nothing_to_draw_waits_for_the_others(folder):
    """Two processes, one layout: reading the checkpoint takes both, and both end well."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "XDG_CACHE_HOME": str(folder / "cache"),
        "JAX_COORDINATOR_ADDRESS": address,
        "JAX_NUM_PROCESSES": "2",
    }
    flags = (*GOOD[:-1], "two", "--steps", "1", "--mis", "0")
    processes = [
        subprocess.Popen(
            [sys.executable, ROOT / "sample.py", *flags],
            env=env | {"JAX_PROCESS_ID": str(index)},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for index in range(2)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], said
    assert "1 images in two" in said[0] and "0 images in two" in said[1]
    assert (folder / "two" / "scene" / "0.png").exists()
