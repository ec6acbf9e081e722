"""What a compiled program needs: memory, operations, traffic, collectives and the predicted time."""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax

from instdiff_jax.analysis.chips import CHIPS, Chip, predict, scaling
from instdiff_jax.analysis.hlo import analyze
from instdiff_jax.analysis.modules import format_modules, module_rows
from instdiff_jax.aot.blocks import Kind
from instdiff_jax.aot.programs import Program


def memory_table(stats: Any) -> dict[str, int]:
    """Bytes per chip, from `compiled.memory_analysis()`; the total counts donated arguments once."""
    table = dict(
        arguments=stats.argument_size_in_bytes,
        outputs=stats.output_size_in_bytes,
        aliased=stats.alias_size_in_bytes,
        temporary=stats.temp_size_in_bytes,
        code=stats.generated_code_size_in_bytes,
    )
    total = sum(table.values()) - 2 * table["aliased"]
    return table | dict(total=total)


def xla_counts(compiled: Any) -> Mapping[str, float]:
    """The compiler's counts of operations and bytes; empty where jax cannot read the program back."""
    try:
        return compiled.cost_analysis()
    except jax.errors.JaxRuntimeError:
        return {}


# Evaluations of a row, with guidance, for one image of 50 PLMS steps (docs/sampling.md, "What they cost").
_EVALUATIONS = {"images_per_second": 51, "images_per_second_mis": 165}


class Outcome(NamedTuple):
    """What the compiler made of a program.

    Attributes:
        text: the compiled program.
        memory: bytes a chip, see `memory_table`.
        xla: the compiler's own counts; empty where jax cannot read the program back.
        seconds: processor time of compiling.
        kernel_cycles: those of Pallas kernels, see `hlo.analyze`.
    """

    text: str
    memory: dict[str, int]
    xla: Mapping[str, float]
    seconds: float
    kernel_cycles: Mapping[str, float]


def make_report(program: Program, topology: str, outcome: Outcome) -> dict[str, Any]:
    """Everything about a compiled program as plain values: bytes, FLOPs and seconds of one chip."""
    chip, xla = chip_of(topology), outcome.xla
    costs = analyze(outcome.text, outcome.kernel_cycles)
    prediction = predict(chip, program.flops, costs)
    mesh = dict(program.mesh.shape)
    rows = scaling(chip, prediction, costs.collectives, mesh, program.batch)
    if program.name == "sample":
        for row in rows:
            row["rows_per_second"] = row["images_per_second"]
            row |= {name: row["rows_per_second"] / count for name, count in _EVALUATIONS.items()}
    return dict(
        program=program.name,
        topology=topology,
        mesh=mesh,
        batch=program.batch,
        compile_seconds=outcome.seconds,
        optimization_level=jax.config.jax_optimization_level,
        memory=outcome.memory,
        flops=program.flops,
        xla_flops=xla.get("flops"),
        memory_bytes=costs.memory_bytes,
        xla_memory_bytes=xla.get("bytes accessed"),
        collectives=[dataclasses.asdict(collective) for collective in costs.collectives],
        open_loops=costs.open_loops,
        pallas_seconds=costs.pallas_cycles / chip.clock,
        unscheduled_kernels=costs.unscheduled_kernels,
        prediction=prediction.to_dict(),
        scaling=rows,
        modules=module_rows(
            {path: cycles / chip.clock for path, cycles in costs.modules.items()}, program.module_flops, chip.flops
        ),
    )


def make_block_report(kind: Kind, program: Program, topology: str, outcome: Outcome) -> dict[str, Any]:
    """One kind of block's pass as plain values: the estimate and its arithmetic, in seconds, and bytes of memory."""
    chip, costs = chip_of(topology), analyze(outcome.text, outcome.kernel_cycles)
    estimate, compute = (costs.cycles + costs.pallas_cycles) / chip.clock, program.flops / chip.flops
    return dict(
        block=kind.label,
        names=list(kind.names),
        number=len(kind.names),
        seconds=estimate,
        pallas_seconds=costs.pallas_cycles / chip.clock,
        unscheduled_kernels=costs.unscheduled_kernels,
        compute=compute,
        ratio=estimate / compute if compute else None,
        temporary=outcome.memory["temporary"],
        compile_seconds=outcome.seconds,
        modules=module_rows(
            {path: cycles / chip.clock for path, cycles in costs.modules.items()}, program.module_flops, chip.flops
        ),
    ) | {"pass": program.name}


def _scaled(count: float | None, unit: float) -> str:
    return "none" if count is None else f"{count / unit:.2f}"


def chip_of(topology: str) -> Chip:
    return CHIPS[topology.partition(":")[0]]


def format_report(values: dict[str, Any]) -> str:
    """A report as text."""
    noun = "images" if values["program"] == "train" else "rows, one evaluation"
    mesh = ", ".join(f"{axis} {size}" for axis, size in values["mesh"].items())
    lines = [
        f"{values['program']} on {values['topology']} (mesh {mesh}), {values['batch']} {noun}; "
        f"compiled in {values['compile_seconds']:.0f} s of processor time",
        "  memory per chip, GB: "
        + ", ".join(f"{key} {size / 1e9:.2f}" for key, size in values["memory"].items())
        + f" ({values['memory']['total'] / 2**30:.2f} GiB)",
        f"  TFLOP per chip: {values['flops'] / 1e12:.2f} (XLA's count: {_scaled(values['xla_flops'], 1e12)})",
        f"  memory traffic per chip: {values['memory_bytes'] / 1e9:.1f} GB "
        f"(XLA's count: {_scaled(values['xla_memory_bytes'], 1e9)}); loops of unknown length: {values['open_loops']}",
    ]
    kernels = (
        f'  Pallas kernels, by the compiler\'s schedule: {values["pallas_seconds"] * 1e3:.1f} ms of "kernels" below'
    )
    if values["unscheduled_kernels"]:
        kernels += f"; NOT counted: {values['unscheduled_kernels']} runs of kernels without a schedule"
    lines.append(kernels)
    for one in values["collectives"]:
        where = f"{one['group']} slices (DCN)" if one["dcn"] else f"{one['group']} (stride {one['stride']})"
        lines.append(
            f"  {one['kind']} over {where}: {one['count']}, {one['looped']} in loops; "
            f"{one['payload'] / 1e6:.1f} MB, sent {one['sent'] / 1e6:.1f} MB"
        )
    times = ", ".join(f"{key} {seconds * 1e3:.1f}" for key, seconds in values["prediction"].items())
    lines.append(f"  predicted ms: {times}")
    for row in values["scaling"]:
        speed = f"{row['images_per_second']:.1f} images per second, "
        if "rows_per_second" in row:
            speed += f"with MIS for 6 instances {row['images_per_second_mis']:.1f} (50 steps), "
        lines.append(
            f"  {row['chips']:4d} chips: {row['step'] * 1e3:.1f} ms, {speed}"
            f"efficiency {row['efficiency']:.3f}, with collectives hidden {row['efficiency_hidden']:.3f}"
        )
    return "\n".join([*lines, "", format_modules(values["modules"]), ""])
