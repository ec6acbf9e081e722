"""Draws the package's rooms and the imports between them into docs/design.md.

    python docs/make_structure.py

The graph stands between `<!-- structure -->` and `<!-- end -->`. tests/unit/test_house.py holds it up to date, and the
direction of the arrows.
"""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "instdiff_jax"
PAGE = ROOT / "docs" / "design.md"
# A file imports from its own row and the rows before it.
ROWS = (
    ("errors", "buckets", "paths", "processes", "temporaries", "files", "copies", "locks", "config", "tree"),
    ("parallel",),
    ("analysis",),
    ("geometry", "images", "other_tools"),
    ("layout", "coco"),
    ("grounding",),
    ("models",),
    ("diffusion",),
    ("checkpoint",),
    ("sampling",),
    ("data",),
    ("training",),
    ("evaluation",),
    ("aot",),
    ("serving",),
    ("cli",),
)


@functools.cache
def modules() -> dict[str, Path]:
    """Name and file of every module of the package."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_names(path: Path) -> set[str]:
    """The dotted names a file imports, inside functions as well."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path}:{node.lineno}: expected an absolute import")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@functools.cache
def imports() -> dict[str, frozenset[str]]:
    """The package's modules that each of its modules imports."""
    graph = {}
    for module, path in modules().items():
        found = set()
        for name in imported_names(path):
            while name and name not in modules():
                name = name.rpartition(".")[0]
            found |= {name} - {"", module}
        graph[module] = frozenset(found)
    return graph


def room(module: str) -> str:
    """The room of a module; the package itself and its `__main__` stand last, as ""."""
    first = module.split(".")[1:2]
    return "" if first in ([], ["__main__"]) else first[0]


def row(name: str) -> int:
    """The place of a room in the order."""
    if not name:
        return len(ROWS)
    return next(i for i, rooms in enumerate(ROWS) if name in rooms)


def drawing() -> str:
    """The rooms and their imports as a Mermaid graph.

    An arrow goes from a room to one that imports it. An import that follows from two others is left out.
    """
    rooms = {room(module) for module in modules()} - {""}
    uses = {name: set() for name in rooms}
    for module, found in imports().items():
        if room(module):
            uses[room(module)] |= {room(name) for name in found if row(room(name)) <= row(room(module))} - {
                room(module)
            }

    @functools.cache
    def below(name: str) -> frozenset[str]:
        return frozenset(uses[name]).union(*map(below, uses[name]))

    lines = ["```mermaid", "graph TD"]
    for name in sorted(rooms, key=lambda name: (row(name), name)):
        folder = (ROOT / PACKAGE / name).is_dir()
        lines.append(f'    {name}["{name}{"/" if folder else ".py"}"]')
        indirect = frozenset().union(*map(below, uses[name]))
        for other in sorted(uses[name] - indirect, key=lambda other: (row(other), other)):
            lines.append(f"    {other} --> {name}")
    return "\n".join([*lines, "```", ""])


def fill(text: str) -> str:
    """The page with the present graph."""
    pattern = re.compile(r"(<!-- structure -->\n).*?(<!-- end -->)", re.DOTALL)
    return pattern.sub(lambda match: match[1] + drawing() + match[2], text)


if __name__ == "__main__":
    PAGE.write_text(fill(PAGE.read_text()))
