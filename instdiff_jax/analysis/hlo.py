"""What a compiled program costs: collectives, memory traffic and the compiler's estimate of cycles.

XLA's own cost analysis counts a loop's body once and lists no collectives. Here a body counts for each iteration.
All numbers are per device, in bytes.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

from instdiff_jax.analysis.hlo_text import Instruction, collective_group, parse_program, slice_transfer
from instdiff_jax.analysis.modules import operation_module

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
# What the compiler writes where it has no estimate.
_NO_ESTIMATE = 2**63 - 1
# These move no data: they name, group or wait for results. A loop's traffic is that of its body.
_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "after-all"}
_FREE |= {"partition-id", "replica-id", "opt-barrier", "custom-call", "async-update"}
_SLICES = ("dynamic-slice", "slice", "gather")


class Found(NamedTuple):
    """One collective in the text. A `chain` is one collective, repeated in each kernel that runs beside it."""

    kind: str
    group: int
    stride: int
    payload: float
    chain: str | None
    dcn: bool = False


@dataclasses.dataclass(frozen=True)
class Collective:
    """All collectives of one kind over groups of one shape.

    Attributes:
        group: number of devices in each; `stride` is the distance between neighbours in the mesh's order.
        count: runs per step; `looped` of them in loops.
        payload: bytes of the whole array: gathered, reduced, or sent.
        sent: bytes that each device sends, by the ring algorithm.
        dcn: whether it runs between slices, over the data-centre network; `group` is then the number of slices.
    """

    kind: str
    group: int
    stride: int
    count: int
    looped: int
    payload: float
    sent: float
    dcn: bool = False


class ProgramCosts(NamedTuple):
    """What one call of a program costs a device.

    `cycles` sums the compiler's estimates for its fused kernels, 0 if it gives none; `open_loops` are loops with an
    unknown number of iterations, counted once. `pallas_cycles` are those of Pallas kernels, by their schedules;
    `unscheduled_kernels` are runs of Pallas kernels whose schedule is not known, which count as nothing. `modules` are
    both kinds of cycles by the module's path.
    """

    collectives: tuple[Collective, ...]
    memory_bytes: float
    cycles: int
    open_loops: int
    pallas_cycles: float = 0.0
    unscheduled_kernels: int = 0
    modules: Mapping[str, float] = MappingProxyType({})


def analyze(text: str, kernel_cycles: Mapping[str, float] | None = None) -> ProgramCosts:
    """Costs of a compiled program, from `compiled.as_text()`.

    Args:
        text: of the program.
        kernel_cycles: cycles of Pallas kernels by the name of one instruction that runs them, as
            `kernel_schedule.read_dump` gives them: the compiler schedules equal kernels once.
    """
    program = _Program(text)
    bodies = program.kernel_cycles(kernel_cycles or {})
    pallas_cycles, unscheduled = 0.0, 0
    collectives: dict[tuple[str, int, int, bool], list[float]] = defaultdict(lambda: [0, 0, 0.0, 0.0])
    memory, cycles = 0.0, 0
    modules: dict[str, float] = defaultdict(float)
    chains = set()
    for computation, times, looped in program.runs:
        for instruction in program.computations[computation].values():
            memory += times * program.traffic(computation, instruction)
            estimate, kernel = times * _estimate(instruction), 0.0
            if (body := _kernel_body(instruction)) is not None:
                kernel = times * bodies.get(body, 0.0)
                unscheduled += times * (body not in bodies)
            cycles, pallas_cycles = cycles + estimate, pallas_cycles + kernel
            if estimate or kernel:
                modules[_module(instruction)] += estimate + kernel
            for one in program.collectives_of(computation, instruction):
                if one.chain is not None and one.chain in chains:
                    continue
                chains.add(one.chain)
                total = collectives[one.kind, one.group, one.stride, one.dcn]
                for i, value in enumerate((1, looped, one.payload, ring_bytes(one.kind, one.payload, one.group))):
                    total[i] += times * value
    found = []
    for (kind, group, stride, dcn), (count, looped, payload, sent) in sorted(collectives.items()):
        found.append(Collective(kind, group, stride, int(count), int(looped), payload, sent, dcn))
    return ProgramCosts(tuple(found), memory, cycles, program.open_loops, pallas_cycles, unscheduled, dict(modules))


def _estimate(instruction: Instruction) -> int:
    """The compiler's estimate of an instruction's cycles."""
    estimates = map(int, re.findall(r'"estimated_cycles":"(\d+)"', instruction.text))
    return sum(estimate for estimate in estimates if estimate < _NO_ESTIMATE)


def _module(instruction: Instruction) -> str:
    name = re.search(r'op_name="([^"]*)"', instruction.text)
    return operation_module(name[1]) if name else ""


def _kernel_body(instruction: Instruction) -> str | None:
    """The code of the Pallas kernel that an instruction runs; None for any other instruction."""
    if 'custom_call_target="tpu_custom_call"' not in instruction.text:
        return None
    body = re.search(r'"body":"([^"]*)"', instruction.text)
    return instruction.name if body is None else body[1]


def ring_bytes(kind: str, payload: float, group: int) -> float:
    """Bytes that each of `group` devices sends for a collective over `payload` bytes in all, in a ring."""
    if kind == "collective-permute":
        return payload
    once = payload * (group - 1) / group
    return 2 * once if kind == "all-reduce" else once


class _Program:
    """The parsed program, and how often each computation runs."""

    def __init__(self, text: str):
        self.open_loops = 0
        self.computations, entry = parse_program(text)
        self.runs = list(self._walk(entry, 1, False)) if entry else []

    def kernel_cycles(self, by_name: Mapping[str, float]) -> dict[str, float]:
        """Cycles of each Pallas kernel's code."""
        instructions = [one for computation in self.computations.values() for one in computation.values()]
        found = [(_kernel_body(one), by_name[one.name]) for one in instructions if one.name in by_name]
        return {body: cycles for body, cycles in found if body is not None}

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
        """Iterations of a loop from 0 to the only constant in its condition; 1 if there is no such constant."""
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
            group, stride = collective_group(instruction.text)
            scope = self.computations[computation]
            payload = sum(array.size for name in instruction.operands for array in scope[name].types)
            # A fusion of this name keeps only this device's part of the sum.
            if kind == "all-reduce" and computation.startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            chain = re.search(r'chain_id="(\d+)"', instruction.text)
            payload *= group if kind == "all-gather" else 1
            yield Found(kind, group, stride, payload, chain and chain[1])
        elif instruction.opcode == "send" and (between := slice_transfer(instruction.text)):
            kind, group = between
            payload = sum(
                array.size for name in instruction.operands for array in self.computations[computation][name].types
            )
            payload *= group if kind == "all-gather" else 1
            yield Found(kind, group, 1, payload, None, dcn=True)
        if instruction.opcode in ("fusion", "async-start"):
            for name in instruction.called.get("calls", ()):
                for inner in self.computations[name].values():
                    yield from self.collectives_of(name, inner)

    def traffic(self, computation: str, instruction: Instruction) -> float:
        """Bytes that an instruction moves to and from main memory; on-chip memory does not count."""
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
        """Bytes of operand `index` that a fusion reads: the slices it takes, or inf for all of it."""
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
        """Bytes that a fusion writes: its results, or the slices that it updates in place."""
        root = next(i for i in fused.values() if i.is_root)
        outputs = [fused[name] for name in root.operands] if root.opcode == "tuple" else [root]
        total = 0.0
        for output in outputs:
            source = fused[output.operands[1]] if output.opcode == "dynamic-update-slice" else output
            total += sum(array.padded for array in source.types)
        return total
