"""Help, results and errors of every command on terminals that lack signs: none ends a command or changes its exit code.

Names and captions hold ö (in latin-1, not in ASCII) and α (in neither).
"""

import io
import json
import os
import subprocess
import sys

import pytest
from coco_fixture import edit, make_coco
from tiny_checkpoint import make_layout, make_tiny_checkpoint

from common import PYTHONPATH
from instdiff_jax import cli
from instdiff_jax.cli import aot
from instdiff_jax.training import export as training_export
from instdiff_jax.training import inputs, loop

ENCODINGS = ["ascii", "latin-1"]
NAME = "größe-α"


def on_terminal(encoding: str, argv: list[str]) -> tuple[int, str, str]:
    """Exit code, standard output and errors of a command whose output has this encoding."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding) for _ in range(2)]
    with pytest.MonkeyPatch.context() as patch:
        for name, stream in zip(("stdout", "stderr"), streams, strict=True):
            patch.setattr(sys, name, stream)
        try:
            cli.main([str(part) for part in argv])
            code = 0
        except SystemExit as end:
            code = end.code or 0
        for stream in streams:
            stream.flush()
    out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
    return code, out, err


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A COCO folder, a checkpoint and a layout, all of such names."""
    place = tmp_path_factory.mktemp(NAME)
    make_coco(place / "coco", train=3, val=2, broken=False)
    edit(place / "coco", "instances_train2017", lambda data: data["categories"][0].update(name=NAME))
    edit(place / "coco", "instances_train2017", lambda data: data["annotations"][0].update(bbox=[NAME]))
    make_tiny_checkpoint(place / "checkpoint")
    layout = json.loads(make_layout(1).to_json())
    layout["caption"] = f"a scene of {NAME}"
    (place / f"{NAME}.json").write_text(json.dumps(layout, ensure_ascii=False), encoding="utf-8")
    rows = [{"image_id": 10, "category_id": 1, "bbox": [1, 2, 30, 40], "score": 0.9}]
    (place / "predictions.json").write_text(json.dumps(rows))
    return place


DETECTOR = ["--detector", "python:os:getcwd"]
# Flags that name what is not there.
MISSING = {
    "sample": ["--layout", f"{NAME}.json"],
    "train": [f"--config={NAME}.py", "--workdir=run"],
    "convert": ["--input", "x.pth", "--output", "new", f"--config.model.text_encoder.tokenizer={NAME}"],
    "export": ["--workdir", NAME, "--output", "new"],
    "evaluate": ["--coco_dir", NAME, "--split", "val", "--real", "--output", "new"],
    "annotate": ["--images", NAME, "--output", "new", "--tags", "x", *DETECTOR],
    "benchmark": ["coco-mig", "--data", NAME, "--output", "new", "--draw_only"],
    "compile": ["--checkpoint", NAME, "--output", "new"],
    "import-data": ["--from", "yolo", "--input", NAME, "--output", "new"],
    "build-coco": ["--coco_dir", NAME, "--data_dir", "new"],
    "build-official-json": ["--input", NAME, "--data_dir", "new"],
    "build-tokenizer": ["--data_dir", NAME, "--output", "new"],
    "studio": ["--checkpoint", NAME, "--no_browser"],
    "aot": ["--topology", "v5e:2x2", "--output", f"{NAME}/report.json"],
}


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_and_errors(command, encoding, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = on_terminal(encoding, [command, "--help"])
    assert code == 0 and out.startswith("usage:") and not err
    code, out, err = on_terminal(encoding, [command, *MISSING[command]])
    line = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(line) == 1 and r"\u03b1" in line[0], err


@pytest.mark.slow
@pytest.mark.usefixtures("quick_compilation")
def test_success(place, monkeypatch):
    """In one test, as some commands take what another one has made; ASCII is a part of latin-1."""
    encoding = "ascii"
    monkeypatch.chdir(place)
    here = place / encoding
    flags = ["--coco_dir", place / "coco", "--data_dir", here / "data", "--splits", "train2017"]
    code, out, _ = on_terminal(encoding, ["build-coco", *flags])
    assert code == 0 and r"\u03b1" in out.replace("gr\\xf6\\xdfe", "größe"), out
    flags = ["--data_dir", here / "data", "--output", here / "tokenizer"]
    assert on_terminal(encoding, ["build-tokenizer", *flags, "--vocab_size", 560])[0] == 0
    flags = ["--input", place / "checkpoint", "--to_pytorch", here / f"{NAME}.safetensors"]
    code, out, _ = on_terminal(encoding, ["convert", *flags])
    assert code == 0 and out.startswith("writing ") and (here / f"{NAME}.safetensors").exists()
    flags = ["--checkpoint", "checkpoint", "--layout", f"{NAME}.json", "--output", here / "images", "--mis", 0]
    code, out, err = on_terminal(encoding, ["sample", *flags, "--steps", 1])
    assert code == 0 and out.startswith("1 images in"), err
    flags = ["--coco_dir", "coco", "--split", "val2017", "--real", "--output", here / "measured", "--size", 64]
    code, out, err = on_terminal(
        encoding, ["evaluate", *flags, "--detector", "predictions:predictions.json", "--features", "none"]
    )
    assert code == 0 and "written: " in out, err


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_success_of_what_takes_long(encoding, monkeypatch, tmp_path):
    """Training, export, official JSON and compiling for TPUs: what they print, without the work before it."""
    workdir = tmp_path / NAME
    monkeypatch.setattr(inputs, "check_data", lambda run: None)
    monkeypatch.setattr(loop, "train", lambda run, workdir: f"{workdir}: trained")
    code, out, err = on_terminal(encoding, ["train", f"--workdir={workdir}", "--config.train.steps=1"])
    assert code == 0 and r"\u03b1: trained" in err, err
    monkeypatch.setattr(training_export, "export", lambda *args: 3)
    code, out, err = on_terminal(encoding, ["export", "--workdir", workdir, "--output", workdir])
    assert code == 0 and r"\u03b1: the averaged parameters of step 3" in out, err
    monkeypatch.setattr(aot, "compile_programs", lambda *args: print("σ"))
    code, out, err = on_terminal(encoding, ["aot", "--topology", "v5e:2x2"])
    assert code == 0 and out == "\\u03c3\n", err


def test_files_are_utf8_where_the_locale_is_not(place, tmp_path):
    """The C locale, in a process of its own: what is read and written does not follow the locale."""
    env = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONPATH": PYTHONPATH}
    flags = ["--coco_dir", place / "coco", "--data_dir", tmp_path / "data", "--splits", "train2017"]
    command = [sys.executable, "-m", "instdiff_jax", "build-coco", *flags]
    done = subprocess.run(command, env=os.environ | env, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr
    assert NAME in json.loads((tmp_path / "data" / "phrases.json").read_text(encoding="utf-8"))
