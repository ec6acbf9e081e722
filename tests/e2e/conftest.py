"""A small checkpoint with layouts, for the tests of `sample`."""

import json

import numpy as np
import pytest
from PIL import Image
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from instdiff_jax.cli import sample
from instdiff_jax.sampling import outputs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A checkpoint, two layouts and wrong inputs."""
    folder = tmp_path_factory.mktemp("sample")
    make_tiny_checkpoint(folder / "checkpoint")
    for place, count in (("scenes", 3), ("others", 3)):
        (folder / place).mkdir()
        (folder / place / "scene.json").write_text(make_layout(count).to_json())
    (folder / "broken.json").write_text('{"caption": "half')
    (folder / "empty").mkdir()
    (folder / "text.npy").write_text("no array")
    np.save(folder / "double.npy", np.zeros((1, 16, 16, 4)))
    np.savez(folder / "several.npz", np.zeros(3, np.float32))
    np.save(folder / "small.npy", np.zeros((1, 2, 2, 4), np.float32))
    Image.new("RGB", (8, 8)).save(folder / "tiny.png")
    Image.effect_noise((400, 400), 90).save(folder / "damaged.png")  # its data are two chunks: the second has no name
    (folder / "cut.npy").write_bytes(
        b"\x93NUMPY\x01\x00v\x00" + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1, 8".ljust(118)
    )
    picture = (folder / "damaged.png").read_bytes()
    (folder / "damaged.png").write_bytes(picture[:60] + picture[60:].replace(b"IDAT", b"\xff\xff\0\1"))
    (folder / "taken").mkdir()
    (folder / "taken" / "scene").write_text("no folder")
    coco = {"images": [{"id": 1, "width": 64, "height": 64}], "annotations": [], "categories": []}
    (folder / "coco.json").write_text(json.dumps(coco))
    return folder


@pytest.fixture
def many(folder, monkeypatch):
    """Five layouts and `draw(flags)`, which runs `sample.main` on them; returns the layouts that were drawn."""
    place = folder / "many"
    place.mkdir(exist_ok=True)
    for i in range(5):
        (place / f"scene{i}.json").write_text(make_layout(1, seed=i).to_json())
    monkeypatch.chdir(folder)
    drawn, write = [], outputs.OutputFolder.write

    def write_and_note(folder, *given):
        drawn.append(write(folder, *given))
        return drawn[-1]

    monkeypatch.setattr(outputs.OutputFolder, "write", write_and_note)

    def draw(*flags) -> list[str]:
        drawn.clear()
        quick = ("--checkpoint", "checkpoint", "--layout", "many", "--steps", "1", "--mis", "0")
        sample.run(sample.parse_args([*quick, *map(str, flags)]))
        return list(drawn)

    return draw
