"""Reads a compiled program's text: collectives, memory traffic and the compiler's own estimate of cycles.

XLA's cost analysis takes a loop's body once and names no collective. Here a body counts as often as its loop runs.
Everything is per device, in bytes.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "bf16": 2, "f16": 2, "token": 0, "opaque": 0}
# What the compiler writes where it has no estimate.
_NO_ESTIMATE = 2**63 - 1
# These move nothing: they name, group or wait for what others make. A loop's traffic is its body's.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "custom-call", "async-update"}
_SLICES = ("dynamic-slice", "slice", "gather")

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_INSTRUCTION = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_CALLED = re.compile(r"(body|condition|to_apply|calls|branch_computations|called_computations)=(\{[^}]*\}|%?[\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")
_NAMES = re.compile(r"[\w.\-]+")


class ArrayType(NamedTuple):
    """One array: its bytes, those it takes with its layout's padding, and whether it lies in main memory."""

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


class Found(NamedTuple):
    """One collective in the text. Those of one `chain` are one, written in every kernel that it runs beside."""

    kind: str
    group: int
    stride: int
    payload: float
    chain: str | None


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one shape.

    Attributes:
        group: devices that take part in each; `stride` is the distance between neighbours in the mesh's order.
        count: how often a step runs one; `looped` of them in loops.
        payload: bytes of the whole array: gathered, reduced, or sent.
        sent: bytes that each device sends, by the ring algorithm.
    """

    kind: str
    group: int
    stride: int
    count: int
    looped: int
    payload: float
    sent: float


class ProgramCosts(NamedTuple):
    """What one call of a program costs a device.

    `cycles` sums the compiler's estimates for its fused kernels, 0 where it gives none; `open_loops` are loops
    whose number of turns the text does not tell, counted once.
    """

    collectives: tuple[Collective, ...]
    memory_bytes: float
    cycles: int
    open_loops: int


def analyze(text: str) -> ProgramCosts:
    """Costs of a compiled program, from `compiled.as_text()`."""
    program = _Program(text)
    collectives: dict[tuple[str, int, int], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    memory, cycles = 0.0, 0
    chains = set()
    for computation, times, looped in program.runs:
        for instruction in program.computations[computation].values():
            memory += times * program.traffic(computation, instruction)
            estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', instruction.text))
            cycles += times * sum(estimate for estimate in estimates if estimate < _NO_ESTIMATE)
            for one in program.collectives_of(computation, instruction):
                if one.chain is not None and one.chain in chains:
                    continue
                chains.add(one.chain)
                total = collectives[one.kind, one.group, one.stride]
                for i, value in enumerate((1, looped, one.payload, ring_bytes(one.kind, one.payload, one.group))):
                    total[i] += times * value
    found = []
    for (kind, group, stride), (count, looped, payload, sent) in sorted(collectives.items()):
        found.append(Collective(kind, group, stride, int(count), int(looped), payload, sent))
    return ProgramCosts(tuple(found), memory, cycles, program.open_loops)


def ring_bytes(kind: str, payload: float, group: int) -> float:
    """Bytes that each of `group` devices sends for a collective over a whole of `payload` bytes, in a ring."""
    if kind == "collective-permute":
        return payload
    once = payload * (group - 1) / group
    return 2 * once if kind == "all-reduce" else once


class _Program:
    """The parsed text, and which computations run how often."""

    def __init__(self, text: str):
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.open_loops = 0
        entry, current = None, None
        for line in text.splitlines():
            if current is None:
                header = _COMPUTATION.match(line)
                if header:
                    current = self.computations[header[2]] = {}
                    entry = header[2] if header[1] else entry
            elif line.startswith("}"):
                current = None
            elif match := _INSTRUCTION.match(line):
                instruction = _parse(match)
                current[instruction.name] = instruction
        self.runs = list(self._walk(entry, 1, False)) if entry else []

    def _walk(self, computation: str, times: int, looped: bool) -> Iterator[tuple[str, int, bool]]:
        yield computation, times, looped
        for instruction in self.computations[computation].values():
            called = instruction.called
            if instruction.opcode == "while":
                turns = self._turns(called["condition"][0])
                for name in called["body"] + called["condition"]:
                    yield from self._walk(name, times * turns, True)
            elif instruction.opcode == "conditional":
                names = called.get("branch_computations") or called.get("called_computations", ())
                for name in names[:1]:
                    yield from self._walk(name, times, looped)
            elif instruction.opcode == "call":
                yield from self._walk(called["to_apply"][0], times, looped)

    def _turns(self, condition: str) -> int:
        """Turns of a loop from 0 to the one constant in its condition; 1 where there is no such constant."""
        bounds = set()
        for name in (condition, *self._inner(condition)):
            for instruction in self.computations[name].values():
                bounds.update(re.findall(r"[su]32\[\]\S* constant\((\d+)\)", instruction.text))
        if len(bounds) != 1:
            self.open_loops += 1
            return 1
        return int(bounds.pop())

    def _inner(self, computation: str) -> list[str]:
        names = [n for i in self.computations[computation].values() for n in i.called.get("calls", ())]
        return names + [deeper for name in names for deeper in self._inner(name)]

    def collectives_of(self, computation: str, instruction: Instruction) -> Iterator[Found]:
        """The collective that an instruction is, and those fused into it."""
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            group, stride = _groups(instruction.text)
            scope = self.computations[computation]
            payload = sum(array.size for name in instruction.operands for array in scope[name].types)
            # A fusion of this name keeps only this device's part of the sum.
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            chain = re.search(r'chain_id="(\d+)"', instruction.text)
            payload *= group if kind == "all-gather" else 1
            yield Found(kind, group, stride, payload, chain and chain[1])
        if instruction.opcode in ("fusion", "async-start"):
            for name in instruction.called.get("calls", ()):
                for inner in self.computations[name].values():
                    yield from self.collectives_of(name, inner)

    def traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes an instruction moves to and from main memory; what stays on the chip counts nothing."""
        if instruction.opcode in _FREE or instruction.opcode.endswith("-done"):
            return 0.0
        scope = self.computations[computation]
        called = instruction.called.get("calls", ())
        fused = self.computations[called[0]] if instruction.opcode == "fusion" and called else None
        total = 0.0
        for index, name in enumerate(instruction.operands):
            arrays = scope[name].types if name in scope else ()
            whole = sum(array.padded for array in arrays if array.in_main_memory)
            if instruction.opcode in _SLICES and index == 0:
                whole = min(whole, sum(array.padded for array in instruction.types))
            elif instruction.opcode == "slice-start":
                whole = min(whole, instruction.types[1].padded)
            elif instruction.opcode == "dynamic-update-slice" and index == 0:
                whole = 0.0
            elif fused is not None:
                whole = min(whole, self._read(fused, index))
            total += whole
        results = instruction.types
        if instruction.opcode.endswith("-start"):
            results = results[len(instruction.operands) :] if instruction.opcode != "copy-start" else results[:1]
        if instruction.opcode == "dynamic-update-slice":
            results = scope[instruction.operands[1]].types
        written = sum(array.padded for array in results if array.in_main_memory)
        return total + (min(written, self._written(fused)) if fused is not None else written)

    def _read(self, fused: dict[str, Instruction], index: int) -> float:
        """Bytes of its index-th operand that a fusion reads: the slices it takes, or inf for all."""
        return sum(
            self._used(fused, i.name)
            for i in fused.values()
            if i.opcode == "parameter" and f" parameter({index})" in i.text
        )

    def _used(self, fused: dict[str, Instruction], name: str) -> float:
        total = 0.0
        for user in fused.values():
            for position, operand in enumerate(user.operands):
                if operand != name:
                    continue
                if user.opcode in _SLICES and position == 0:
                    total += sum(array.padded for array in user.types)
                elif user.opcode == "bitcast":
                    total += self._used(fused, user.name)
                elif user.opcode == "fusion":
                    total += self._read(self.computations[user.called["calls"][0]], position)
                elif user.opcode != "dynamic-update-slice" or position > 0:
                    return math.inf
        return total

    def _written(self, fused: dict[str, Instruction]) -> float:
        """Bytes that a fusion writes: its results, or the slices it updates in place."""
        root = next(i for i in fused.values() if i.is_root)
        outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0.0
        for output in outputs:
            source = fused[output.operands[1]] if output.opcode == "dynamic-update-slice" else output
            total += sum(array.padded for array in source.types)
        return total


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


def _groups(text: str) -> tuple[int, int]:
    """Devices in a collective's group, and the distance between its first two."""
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
