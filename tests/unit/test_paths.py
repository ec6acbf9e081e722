"""Names from files lead nowhere but into their folder; inputs are regular files."""

import os

import numpy as np
import pytest
from coco_fixture import make_coco
from PIL import Image

from instdiff_jax import InputError, Layout
from instdiff_jax.data import build_coco, official_json
from instdiff_jax.evaluation.files import image_path
from instdiff_jax.evaluation.split import read_split
from instdiff_jax.files import read_json, write_json
from instdiff_jax.paths import inside, output_path, read_file
from instdiff_jax.sampling.outputs import OutputFolder


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
