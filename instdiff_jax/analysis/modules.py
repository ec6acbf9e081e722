"""Which module of a network an operation belongs to, and a table of time by module.

Both jax's traced programs and the compiler's text name every operation by the scopes around it. flax makes a scope of
every module's name, so that time and arithmetic can be summed by the same paths.
"""

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

# Scopes of jax's own: loops, calls and recomputation.
_CONTROL = {"while", "body", "cond", "closed_call", "checkpoint", "rematted_computation", "remat", "shard_map"}
_CONTROL |= {"core_call", "custom_jvp_call", "custom_vjp_call", "vmap", "scan"}
_WRAPPER = re.compile(r"(?:jvp|transpose|vmap|remat|checkpoint)\((.*)\)")
# What belongs to no module.
NO_MODULE = "(no module)"


def module_path(scopes: str) -> str:
    """The module's path in a stack of scopes, for example jvp(UNet)/UNet._deep/mid_attn → UNet/mid_attn.

    Differentiation, loops, functions and methods are left out: forward and backward have the same path.
    """
    path: list[str] = []
    for scope in scopes.split("/"):
        while match := _WRAPPER.fullmatch(scope):
            scope = match[1]
        scope = scope.partition(".")[0]  # of a module's method
        if not re.fullmatch(r"[A-Za-z_]\w*", scope) or scope in _CONTROL:
            continue
        # A recomputed block names its network again.
        if path and scope in (path[0], path[-1]):
            continue
        path.append(scope)
    return "/".join(path)


def operation_module(op_name: str) -> str:
    """The module's path in an `op_name` of a compiled program, whose last scope is the operation itself."""
    return module_path(op_name.rpartition("/")[0])


def module_rows(
    seconds: Mapping[str, float], flops: Mapping[str, float], peak: float, least: float = 0.001
) -> list[dict[str, Any]]:
    """Time and arithmetic of every module with all that is inside it, from those of single paths.

    Args:
        seconds: by path.
        flops: by path.
        peak: FLOP/s.
        least: share of the whole below which a module has no row.

    Returns:
        Rows in the order of the tree, the slowest of siblings first: path, seconds, share of the whole, seconds of the
        arithmetic at the peak rate, and the ratio of the two (None without arithmetic).
    """
    times, work = _with_parents(seconds), _with_parents(flops)
    whole = sum(seconds.values())
    rows = []

    def visit(parent: str) -> None:
        inside = [path for path in times if path and path.rpartition("/")[0] == parent]
        for path in sorted(inside, key=lambda path: -times[path]):
            if times[path] < least * whole:
                continue
            arithmetic = work.get(path, 0.0) / peak
            ratio = times[path] / arithmetic if arithmetic else None
            rows.append(
                dict(path=path, seconds=times[path], share=times[path] / whole, compute=arithmetic, ratio=ratio)
            )
            visit(path)

    visit("")
    return rows


def _with_parents(values: Mapping[str, float]) -> dict[str, float]:
    total: dict[str, float] = defaultdict(float)
    for path, value in values.items():
        parts = (path or NO_MODULE).split("/")
        for depth in range(1, len(parts) + 1):
            total["/".join(parts[:depth])] += value
    return dict(total)


def format_modules(rows: list[dict[str, Any]], least: float = 0.01) -> str:
    """The rows with at least a share of `least`, as a table in Markdown."""
    lines = ["| module | estimate, ms | share | arithmetic, ms | × arithmetic |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        if row["share"] >= least:
            depth, ratio = row["path"].count("/"), "–" if row["ratio"] is None else f"{row['ratio']:.1f}"
            name = "· " * depth + row["path"].rpartition("/")[2]
            numbers = f"{row['seconds'] * 1e3:.2f} | {row['share']:.1%} | {row['compute'] * 1e3:.2f} | {ratio}"
            lines.append(f"| {name} | {numbers} |")
    return "\n".join(lines)
