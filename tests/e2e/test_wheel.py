"""The wheel holds everything that the commands need, and works in another folder without the clone."""

import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

from common import ROOT

# Heavy packages that only training, plots and tests need.
EXTRAS = ("grain", "tensorflow_datasets", "tensorboardX", "importlib_resources", "matplotlib", "skimage", "torch")
LAYOUT = """{"caption": "a red circle", "width": 64, "height": 64,
 "annos": [{"caption": "a red circle", "bbox": [8, 8, 40, 40]}]}"""


def requirements(lines) -> set[str]:
    return {line.split("#")[0].strip() for line in lines} - {""}


def test_requirements_are_those_of_the_package():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert requirements((ROOT / "requirements.txt").read_text().splitlines()) == {
        *project["dependencies"],
        *extras["train"],
        *extras["plots"],
    }
    assert requirements((ROOT / "requirements-test.txt").read_text().splitlines()) == set(extras["dev"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools would reuse what is in build/.
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "instdiff_jax", "checkpoints", "examples"):
        (source / name).symlink_to(ROOT / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-cache-dir"]
    done = subprocess.run([*command, "-w", str(folder), "."], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), str(wheel)]
    subprocess.run(command, check=True)
    return folder


def run(installed, cwd, *arguments):
    """`instdiff` of the installed package, away from the clone."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(installed / "bin" / "instdiff"), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


def test_contents(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "instdiff_jax").rglob("*.py")}
    assert modules <= names and "instdiff_jax/py.typed" in names
    page = {str(path.relative_to(ROOT)) for path in (ROOT / "instdiff_jax" / "serving" / "static").iterdir()}
    assert len(page) > 4 and page <= names
    assert {f"instdiff_jax/checkpoint/clip/{name}" for name in ("LICENSE", "bpe_simple_vocab_16e6.txt.gz")} <= names
    for folder in ("checkpoints/shapes", "examples/shapes"):
        files = [path for path in (ROOT / folder).rglob("*") if path.is_file()]
        assert {f"instdiff_jax/box/{path.relative_to(ROOT)}" for path in files} <= names
    assert {name.split("/")[0].split("-")[0] for name in names} == {"instdiff_jax"}


def test_help_and_version(installed, tmp_path):
    done = run(installed, tmp_path, "--help")
    assert done.returncode == 0 and "  sample  " in done.stdout and "  convert  " in done.stdout
    assert run(installed, tmp_path, "--version").stdout.startswith("instdiff 0.")
    done = run(installed, tmp_path, "sample", "--help")
    assert done.returncode == 0 and done.stdout.startswith("usage: instdiff sample")


def test_sample(installed, tmp_path):
    (tmp_path / "scene.json").write_text(LAYOUT)
    done = run(installed, tmp_path, "sample", "--layout", "scene.json", "--steps", 1, "--mis", 0, "--alpha", 0)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "output" / "scene" / "0.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("convert", "--input", "missing.pth", "--output", "out"), "error: "),
        (("train", "--workdir", "run"), "error: "),
        (("evaluate", "--coco_dir", "none", "--split", "val", "--output", "out", "--real"), "none"),
        (("paint",), "'paint': expected one of sample, "),
    ],
)
def test_bad_input_is_one_line(installed, tmp_path, arguments, words):
    done = run(installed, tmp_path, *arguments)
    assert done.returncode == 2 and not (tmp_path / "out").exists(), done.stderr
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line and "Traceback" not in done.stderr


IMPORTS = f"""
import importlib.abc, sys
class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {EXTRAS!r}:
            raise ModuleNotFoundError(f"{{name}} is not installed", name=name)
sys.meta_path.insert(0, Missing())
import instdiff_jax.cli.convert, instdiff_jax.cli.sample, instdiff_jax.sampling.pipeline
from instdiff_jax import Pipeline
import instdiff_jax
print(instdiff_jax.__file__)
"""


def test_sampling_and_converting_import_nothing_of_the_extras(installed, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [sys.executable, "-c", IMPORTS], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed)
