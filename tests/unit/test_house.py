"""Rules of the house: the direction of imports, the size of files and functions, and what an import costs."""

import ast
import functools
import graphlib
import json
import subprocess
import sys
from pathlib import Path

from common import ROOT
from docs.make_structure import PAGE, drawing, fill, imported_names, imports, modules, room, row

FOLDERS = ("instdiff_jax", "projects", "benchmarks", "configs", "docs", "examples", "tests")
MAX_FILE, MAX_FUNCTION, MAX_PARAMETERS = 350, 60, 8
# Functions that are easier to use with many parameters, each with its reason.
_KEYWORDS = "every option is a keyword that an editor completes"
MANY_PARAMETERS: dict[str, str] = {
    "instdiff_jax/sampling/pipeline.py: __call__ has many parameters": _KEYWORDS,
    "instdiff_jax/sampling/pipeline.py: stream has many parameters": _KEYWORDS,
}


def python_files() -> list[Path]:
    return [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]


@functools.cache
def functions(path: Path) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    nodes = ast.walk(ast.parse(path.read_text(), str(path)))
    return [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_imports_go_one_way():
    upward = {
        f"{module} imports {other}"
        for module, found in imports().items()
        for other in found
        if row(room(other)) > row(room(module))
    }
    assert not upward


def test_no_import_cycle():
    graphlib.TopologicalSorter(imports()).prepare()


def test_the_package_imports_nothing_beside_it():
    beside = {path.stem for path in ROOT.iterdir()} - {"instdiff_jax"}
    found = {
        f"{name_of(path)} imports {name.split('.')[0]}"
        for path in modules().values()
        for name in imported_names(path)
        if name.split(".")[0] in beside
    }
    assert not found


def test_the_drawing_is_up_to_date():
    text = PAGE.read_text()
    assert drawing() in text and fill(text) == text, "run python docs/make_structure.py"


def test_files_are_short():
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in python_files()}
    assert {name for name, length in lengths.items() if length > MAX_FILE} == set()


def test_functions_are_short():
    found = {
        f"{name_of(path)}: {node.name}"
        for path in python_files()
        for node in functions(path)
        if node.end_lineno - node.lineno + 1 > MAX_FUNCTION
    }
    assert not found


def test_functions_have_few_parameters():
    found = set()
    for path in python_files():
        for node in functions(path):
            names = [arg.arg for arg in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
            if len([name for name in names if name not in ("self", "cls")]) > MAX_PARAMETERS:
                found.add(f"{name_of(path)}: {node.name} has many parameters")
    assert found == MANY_PARAMETERS.keys()


IMPORT = """
import json, os, sys
import jax
environment, settings = dict(os.environ), dict(jax.config.values)
import instdiff_jax
from instdiff_jax import Pipeline
changed = [name for name, value in jax.config.values.items() if settings[name] != value]
print(json.dumps([sorted(sys.modules), dict(os.environ) == environment, changed]))
"""


def test_importing_the_package_is_light_and_changes_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORT], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, same_environment, changed = json.loads(done.stdout)
    heavy = {"grain", "tensorflow_datasets", "matplotlib", "tensorflow", "torch", "tensorboardX", "configs", "projects"}
    assert not heavy & set(loaded)
    assert same_environment and not changed
