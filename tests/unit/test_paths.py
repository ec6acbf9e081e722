"""Names from files lead nowhere but into their folder; inputs are regular files."""

import os

import numpy as np
import pytest
from coco_fixture import make_coco
from PIL import Image

from instdiff_jax import InputError, Layout
from instdiff_jax.checkpoint import torch_file, verify
from instdiff_jax.checkpoint.folder import read_config
from instdiff_jax.checkpoint.run import read_run
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.cli import build_coco as build_command
from instdiff_jax.data import build_coco, official_json
from instdiff_jax.data.dataset import read_meta
from instdiff_jax.data.latents import LatentCache
from instdiff_jax.data.phrases import PhraseTable, read_phrases
from instdiff_jax.evaluation.files import image_path
from instdiff_jax.evaluation.split import read_split
from instdiff_jax.files import read_json, write_json
from instdiff_jax.images import open_image, open_mask
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.paths import inside, output_path, read_file
from instdiff_jax.sampling.outputs import OutputFolder
from instdiff_jax.training import metrics
from projects.common import segmenter


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "/etc", "a\0"])
def test_names_that_are_no_names(name, tmp_path):
    with pytest.raises(InputError, match="cannot be the name"):
        output_path(tmp_path, name, "0.png")


@pytest.mark.parametrize("name", ["run.json", "RUN.json", "run-0-of-2.json", "contact_sheet.png", "..", "."])
def test_layouts_do_not_take_the_place_of_other_files(name, tmp_path):
    (tmp_path / "layout.png").write_text("a user's")
    output = OutputFolder(tmp_path / "out", [0])
    uses = (lambda names: output.finished(names, {}), output.remove, lambda names: output.opened(names).__enter__())
    for use in uses:
        with pytest.raises(InputError, match="rename"):
            use([name])
    assert (tmp_path / "layout.png").read_text() == "a user's"


def test_a_link_in_the_output_is_not_followed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "scene").symlink_to(tmp_path / "mine")
    (tmp_path / "out" / "images").symlink_to(tmp_path / "mine")
    with pytest.raises(InputError, match="out/scene: is a link"):
        OutputFolder(tmp_path / "out", [0]).files("scene")
    coco = make_coco(tmp_path / "coco", broken=False)
    with pytest.raises(InputError, match="out/images: is a link"):
        image_path(tmp_path / "out", read_split(coco, "val2017").scenes[0])
    (tmp_path / "other").symlink_to(tmp_path / "mine")
    assert output_path(tmp_path / "other", "scene") == tmp_path / "other" / "scene", "the folder itself may be one"


@pytest.mark.parametrize("read", [read_file, read_json, Layout.from_json])
def test_devices_and_pipes_are_no_input(read, tmp_path):
    os.mkfifo(tmp_path / "pipe.json")
    for path in ("/dev/zero", tmp_path / "pipe.json"):
        with pytest.raises(InputError):
            read(path)
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_file(tmp_path)


READERS = {
    "image": ("x.png", open_image),
    "mask": ("x.png", open_mask),
    "weights": ("x.pth", torch_file.read_file),
    "checkpoint": ("config.json", read_config),
    "run": ("config.json", lambda path: read_run(path.parent)),
    "vocabulary": ("vocab.json", lambda path: find_tokenizer(str(path.parent))),
    "tokenizer": ("tokenizer.json", lambda path: Tokenizer(path.parent, 1024)),
    "checksums": ("params", lambda path: verify.compare_files(path.parent, {path.name: 0})),
    "dataset": ("dataset.json", lambda path: read_meta(path.parent)),
    "phrases": ("phrases.json", lambda path: read_phrases(path.parent)),
    "phrase table": ("embeddings.npy", PhraseTable),
    "latents": ("mean.npy", lambda path: opened_cache(path.parent).lookup(0, False)),
    "cache": ("latents.json", lambda path: opened_cache(path.parent)),
    "metrics": ("metrics.jsonl", lambda path: metrics._drop_later_lines(path, 1)),
    "segmenter": ("params.npz", segmenter._read_arrays),
}


def opened_cache(folder):
    facts = {"dataset": "d", "encoder": "e", "image_size": 8, "flips": True}
    if not (folder / "latents.json").exists():
        write_json(folder / "latents.json", facts)
    return LatentCache(folder, DATA, "e", 8)


class _Data:
    fingerprint = "d"

    def __len__(self):
        return 1


DATA = _Data()


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("reader", READERS)
def test_no_reader_waits_for_a_pipe_or_reads_a_device(reader, kind, tmp_path):
    name, read = READERS[reader]
    if kind == "pipe":
        os.mkfifo(tmp_path / name)
    else:
        (tmp_path / name).symlink_to("/dev/zero")
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert "\n" not in str(error.value) and name in str(error.value)


def test_official_list_with_a_device(tmp_path):
    (tmp_path / "list.txt").write_text("/dev/zero\n")
    with pytest.raises(InputError):
        official_json.build([tmp_path / "list.txt"], tmp_path / "data")


@pytest.mark.parametrize("name", ["../secret.jpg", "/dev/zero", "a/../../secret.jpg"])
def test_file_names_that_leave_the_images(name, tmp_path):
    with pytest.raises(InputError, match="expected a path inside"):
        inside(tmp_path, name)
    coco = make_coco(tmp_path / "coco", broken=False)
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(coco / "secret.jpg")
    file = coco / "annotations" / "instances_val2017.json"
    content = read_json(file)
    content["images"][0]["file_name"] = name
    write_json(file, content)
    with pytest.raises(InputError, match="file_name: expected a path inside"):
        read_split(coco, "val2017", min_area=0)
    _, report = build_coco.build(coco, tmp_path / "data", ["val2017"], workers=1)
    assert any("expected a path inside" in entry["reason"] for entry in report.skipped)


def test_file_names_may_leave_the_images_if_the_user_says_so(tmp_path):
    """Absolute, and up from the folder: the usual ways to annotate images where they are. Devices stay refused."""
    coco = make_coco(tmp_path / "coco", broken=False)
    file = coco / "annotations" / "instances_val2017.json"
    content = read_json(file)
    first, second, *rest = content["images"]
    for image, place, name in ((first, tmp_path, str(tmp_path / "a.jpg")), (second, coco, "../b.jpg")):
        (coco / "val2017" / image["file_name"]).rename(place / name.removeprefix("../"))
        image["file_name"] = name
    rest[0]["file_name"] = "/dev/zero"
    write_json(file, content)
    scenes = read_split(coco, "val2017", min_area=0, outside=True).scenes
    found = {scene.image_id: scene for scene in scenes}
    for image in (first, second):
        assert found[image["id"]].real_image().shape == (512, 512, 3)
    with pytest.raises(InputError, match="/dev/zero: expected a regular file"):
        found[rest[0]["id"]].real_image()
    flags = ["--coco_dir", str(coco), "--data_dir", str(tmp_path / "data"), "--splits", "val2017"]
    build_command.main([*flags, "--images_outside"])
    skipped = read_json(tmp_path / "data" / "report.json")["skipped"]
    assert len(skipped) == 1 and "regular file" in skipped[0]["reason"]
