"""Commands on a full disk: one line that names where, exit code 2, nothing half written, and they go on exactly."""

import full_disk_cases
import pytest
from coco_fixture import make_coco
from tiny_checkpoint import make_layout, make_tiny_checkpoint
from training_common import save_dataset, save_start

# Each case, and where its line says that the disk is full.
COMMANDS = {
    "to_pytorch safetensors": "back.safetensors",
    "to_pytorch pth": "back.pth",
    "convert": "converted",
    "convert large": "converted",
    "build-coco": "built",
    "evaluate": "measured/",
    "checkpoint": "saved/checkpoints",
}
TRAINING = {
    "phrases": "data/phrases/",
    "latents": "data/latents/",
    "metrics": "small/",
    "train": "run/checkpoints",
    "export": "exported",
    "sample": "pictures/",
}
# What was whole before the disk was full stays, and the next start goes on from there.
WHOLE = {
    "phrases": ("data/phrases",),
    "latents": ("data/phrases", "data/latents"),
    "metrics": ("small",),
    "train": ("run",),
    "sample": ("pictures",),
    "evaluate": ("measured",),
    "checkpoint": ("saved",),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inputs")
    save_start(folder / "start")
    save_dataset(folder / "data")
    make_tiny_checkpoint(folder / "checkpoint")
    make_coco(folder / "coco", broken=False)
    (folder / "scene.json").write_text(make_layout(1).to_json())
    return folder


def check(done, places, folder, how):
    """What is wrong with each case."""
    reason, problems = "No space left on device" if how == "mounted" else "File too large", []
    for name, place in places.items():
        if how == "limited" and name in ("phrases", "metrics"):
            continue  # smaller than any limit that lets the run start
        case, whole = done[name], WHOLE.get(name, ("-",))
        errors = [line for line in case["said"] if "rror" in line or "Traceback" in line]
        good = case["code"] == 2 and len(errors) == 1 and case["said"][-1] == errors[0] and len(case["said"]) < 12
        good = good and errors[0].startswith(f"error: {folder / place}") and errors[0].endswith(reason)
        left = [path for path in case["left"] if not path.startswith(whole) or "instdiff-" in path or "tmp" in path]
        if not good or left:
            problems.append((case, left))
    return problems


def how_to(folder):
    return "mounted" if full_disk_cases.can_mount(folder) else "limited"


@pytest.mark.slow
def test_commands_on_a_full_disk(inputs, tmp_path):
    how = how_to(tmp_path)
    done = {case["name"]: case for case in full_disk_cases.start(inputs, tmp_path, how, "commands")}
    assert not check(done, COMMANDS, tmp_path, how)


@pytest.mark.slow
def test_training_on_a_full_disk(inputs, tmp_path):
    how = how_to(tmp_path)
    done = {case["name"]: case for case in full_disk_cases.start(inputs, tmp_path, how, "training")}
    assert not check(done, TRAINING, tmp_path, how)
    again = "\n".join(done["train again"]["said"])
    assert done["train again"]["code"] == 0 and f"from step {2 if how == 'mounted' else 0} to" in again
    assert done["results"]["equal"]
