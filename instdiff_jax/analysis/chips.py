"""Peak rates of TPU chips, and the time of a compiled program predicted from them.

The numbers are from Google Cloud's pages on TPU v5e, v5p and v6e (docs.cloud.google.com/tpu/docs), per chip.
"""

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from instdiff_jax.analysis.hlo import Collective, ProgramCosts, ring_bytes


@dataclasses.dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        flops: peak dense bfloat16 FLOP/s.
        memory_gib: main memory; the compiler reserves 0.25 to 0.75 GiB of it.
        memory_bandwidth: bytes/s.
        interconnect: bytes/s to and from all neighbours, both directions added.
        ports: neighbours; 4 in a two-dimensional torus, 6 in a three-dimensional one.
        dcn: bytes/s that a chip sends over the data-centre network, its share of the pod's or the host's.
        clock: Hz, from peak FLOP/s = matrix units · side² · 2 · clock (v5e 4 of 128², v5p 8 of 128², v6e 4 of 256²).
    """

    flops: float
    memory_gib: int
    memory_bandwidth: float
    interconnect: float
    ports: int
    clock: float
    dcn: float

    @property
    def ring_bandwidth(self) -> float:
        """Bytes/s that a chip sends in a ring along one mesh axis, in both directions: half of two ports' bandwidth."""
        return self.interconnect / self.ports


CHIPS = {
    "v5e": Chip(197e12, 16, 819e9, 400e9, 4, 1.5e9, 3.125e9),
    "v5p": Chip(459e12, 95, 2765e9, 1200e9, 6, 1.75e9, 6.25e9),
    "v6e": Chip(918e12, 32, 1640e9, 800e9, 4, 1.75e9, 12.5e9),
}


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Seconds of one step: for each possible bound, and in total.

    Attributes:
        compute: the arithmetic at the peak rate.
        memory: the traffic at full bandwidth.
        kernels: the compiler's estimates of its kernels, one after the other.
        interconnect: all collectives in a slice as rings, one after the other.
        dcn: all collectives between slices, in the same way.
        best: the largest of compute, memory, interconnect and dcn: perfect overlap.
        step: the largest of compute, memory and kernels, plus interconnect and dcn: no overlap.
    """

    compute: float
    memory: float
    kernels: float
    interconnect: float
    dcn: float = 0.0

    @property
    def best(self) -> float:
        return max(self.compute, self.memory, self.interconnect, self.dcn)

    @property
    def step(self) -> float:
        return max(self.compute, self.memory, self.kernels) + self.interconnect + self.dcn

    def to_dict(self) -> dict[str, float]:
        return dataclasses.asdict(self) | dict(best=self.best, step=self.step)


def predict(chip: Chip, flops: float, costs: ProgramCosts) -> Prediction:
    """The time of a program with `flops` operations per chip."""
    return Prediction(
        compute=flops / chip.flops,
        memory=costs.memory_bytes / chip.memory_bandwidth,
        kernels=(costs.cycles + costs.pallas_cycles) / chip.clock,
        interconnect=sum(one.sent for one in costs.collectives if not one.dcn) / chip.ring_bandwidth,
        dcn=sum(one.sent for one in costs.collectives if one.dcn) / chip.dcn,
    )


def scaling(
    chip: Chip, prediction: Prediction, collectives: tuple[Collective, ...], mesh: Mapping[str, int], batch: int
) -> list[dict[str, Any]]:
    """Efficiency from 1 chip to a slice, and to all slices, in steps of four, at a constant number of images per chip.

    Arithmetic and memory traffic per chip stay the same; the collectives depend on the sizes of the axes. The axis
    `fsdp` fills first. A sum over `data` is of arrays that `fsdp` has split, so it grows as `fsdp` shrinks. Efficiency
    is the time of one chip divided by the time of the mesh, without overlap.

    Args:
        collectives: of the program compiled for `mesh`.
        mesh: sizes of the axes `slice`, `data` and `fsdp`, from the outermost.
        batch: images per step on the whole mesh.
    """
    total, slices = mesh["data"] * mesh["fsdp"], mesh.get("slice", 1)
    counts = [4**k for k in range(total.bit_length()) if 4**k < total] + sorted({total, total * slices})
    local = prediction.step - prediction.interconnect - prediction.dcn
    rows = []
    for chips in counts:
        fsdp = min(mesh["fsdp"], chips)
        sizes = {"fsdp": fsdp, "data": max(min(chips, total) // fsdp, 1), "both": min(chips, total)}
        seconds = prediction.dcn if chips > total else 0.0
        for collective in collectives:
            if collective.dcn:
                continue
            axis = _axis(collective, mesh)
            payload = collective.payload * (mesh["fsdp"] / fsdp if axis == "data" else 1)
            seconds += ring_bytes(collective.kind, payload, sizes[axis]) / chip.ring_bandwidth
        step = local + seconds
        rows.append(
            dict(
                chips=chips,
                interconnect=seconds,
                step=step,
                images_per_second=batch * chips / (total * slices) / step,
                efficiency=local / step,
                efficiency_hidden=local / max(local, seconds),
            )
        )
    return rows


def _axis(collective: Collective, mesh: Mapping[str, int]) -> str:
    if collective.group == 1:
        return "data" if mesh["data"] == 1 else "fsdp"
    if collective.group == mesh["data"] * mesh["fsdp"]:
        return "both" if mesh["data"] > 1 else "fsdp"
    return "data" if collective.stride > 1 or mesh["fsdp"] == 1 else "fsdp"


def processor_name() -> str:
    """Name of this machine's processor on Linux; its architecture elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
