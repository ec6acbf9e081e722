"""Parses the text of a compiled program, line by line."""

import math
import re
from typing import NamedTuple

_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(body|condition|to_apply|calls|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
_NAMES = re.compile(r"[\w.\-]+")

_KERNEL_METADATA = re.compile(r"kernel_metadata=\{.*?\}\s*\}", re.DOTALL)


class ArrayType(NamedTuple):
    """One array: bytes, bytes with the layout's padding, and whether it is in main memory."""

    size: float
    padded: float
    in_main_memory: bool


class Instruction(NamedTuple):
    """One line of a computation; `called` maps an attribute to the computations it names."""

    name: str
    opcode: str
    types: tuple[ArrayType, ...]
    operands: tuple[str, ...]
    called: dict[str, tuple[str, ...]]
    text: str
    is_root: bool


def parse_program(text: str) -> tuple[dict[str, dict[str, Instruction]], str | None]:
    """The computations of a program, each a dict of instructions by name, and the name of the entry."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = None, None
    # The one attribute that the compiler may print over several lines.
    text = _KERNEL_METADATA.sub(lambda found: found[0].replace("\n", " "), text)
    for line in text.splitlines():
        if current is None:
            header = _COMPUTATION.match(line)
            if header:
                current = computations[header[2]] = {}
                entry = header[2] if header[1] else entry
        elif line.startswith("}"):
            current = None
        elif match := _INSTRUCTION.match(line):
            instruction = _parse(match)
            current[instruction.name] = instruction
    return computations, entry


def _parse(match: re.Match) -> Instruction:
    rest = match[3]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    types, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    closing = _closing(rest, opening)
    called = {name: tuple(_NAMES.findall(value)) for name, value in _CALLED.findall(rest)}
    return Instruction(
        name=match[2],
        opcode=rest[:opening],
        types=tuple(_array(*found) for found in _ARRAY.findall(types)),
        operands=tuple(_NAME.findall(rest[opening:closing])),
        called=called,
        text=match[0],
        is_root=bool(match[1]),
    )


def _closing(text: str, start: int) -> int:
    depth = 0
    for index in range(start, len(text)):
        depth += (text[index] == "(") - (text[index] == ")")
        if depth == 0:
            return index
    raise ValueError(f"unbalanced parentheses in {text!r}")


def _array(dtype: str, dims: str, layout: str) -> ArrayType:
    shape = [int(dim) for dim in dims.split(",") if dim]
    width = _BYTES.get(dtype) if dtype in _BYTES else int(re.sub(r"\D", "", dtype) or 8) / 8
    order, _, rest = layout.partition(":")
    minor = [int(axis) for axis in order.split(",") if axis]
    physical = [shape[axis] for axis in reversed(minor)] if len(minor) == len(shape) else list(shape)
    if tile := re.match(r"T\(([\d,]+)\)", rest):
        sizes = [int(size) for size in tile[1].split(",")]
        for axis, size in zip(range(len(physical) - 1, -1, -1), reversed(sizes), strict=False):
            physical[axis] = -(-physical[axis] // size) * size
    return ArrayType(math.prod(shape) * width, math.prod(physical) * width, "S(" not in layout)


def slice_transfer(text: str) -> tuple[str, int] | None:
    """Kind and number of slices of a collective over the data-centre network: on a chip a `send` to its host."""
    kind = re.search(r'_xla_megascale_transfer_type="(\w+)"', text)
    target = re.search(r'_xla_megascale_target="\{([\d,:]+)\}', text)
    if kind is None or target is None:
        return None
    spans = [part.split(":") for part in target[1].split(",")]
    return kind[1].lower().replace("_", "-"), sum(int(span[-1]) - int(span[0]) + 1 for span in spans)


def collective_group(text: str) -> tuple[int, int]:
    """The number of devices in a collective's group, and the distance between the first two."""
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return 2, abs(int(match[2]) - int(match[1]))
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        members = [int(member) for member in match[1].split(",")]
        return len(members), members[1] - members[0] if len(members) > 1 else 1
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]<=\[([\d,]+)\](T\(1,0\))?", text):
        sizes = [int(size) for size in match[2].split(",")]
        return int(match[1]), sizes[-1] if match[3] else 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", text):
        sizes = [(axis, int(size)) for axis, size in re.findall(r"'(\w+)'=(\d+)", match[1])]
        used = [i for i, (axis, _) in enumerate(sizes) if f"'{axis}'" in match[2]]
        group = math.prod(sizes[i][1] for i in used)
        return group, math.prod(size for _, size in sizes[used[-1] + 1 :])
    return 1, 1
