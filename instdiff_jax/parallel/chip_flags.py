"""Compiler flags per chip for training on many of them: collectives run beside compute.

    eval "$(python -m instdiff_jax.parallel.chip_flags v5e)"

prints what a shell exports. Nothing in the package sets them: without this line, and on CPUs, there are none. Values
that the environment has already stay, and come last, where they win.
"""

import sys
from collections.abc import Sequence

from instdiff_jax.errors import InputError, exit_on_input_error

# Gathers of parameters over `fsdp` and sums of gradients beside compute.
_GATHERS = ("--xla_enable_async_all_gather=true",)
_FUSED = (
    "--xla_tpu_enable_async_collective_fusion=true",
    "--xla_tpu_enable_async_collective_fusion_fuse_all_gather=true",
    "--xla_tpu_enable_async_collective_fusion_multiple_steps=true",
    "--xla_tpu_overlap_compute_collective_tc=true",
)
# Sums over `data` and `slice` may be of many sizes; they wait for nothing but the update.
_SUMS = ("--xla_tpu_enable_data_parallel_all_reduce_opt=true", "--xla_tpu_data_parallel_opt_different_sized_ops=true")

# By chip: the variable that its runtime reads, and the flags.
CHIP_FLAGS: dict[str, tuple[str, tuple[str, ...]]] = {
    "cpu": ("XLA_FLAGS", ()),
    "gpu": ("XLA_FLAGS", ("--xla_gpu_enable_latency_hiding_scheduler=true",)),
    "v5e": ("LIBTPU_INIT_ARGS", _GATHERS + _FUSED + _SUMS),
    # Their compiler refuses the fusion of collectives as unsafe.
    "v5p": ("LIBTPU_INIT_ARGS", _GATHERS + _SUMS),
    "v6e": ("LIBTPU_INIT_ARGS", _GATHERS + _SUMS),
}


def export_line(chip: str) -> str:
    """A line for the shell that sets the chip's flags; empty where it has none.

    Raises:
        InputError: for an unknown chip.
    """
    if chip not in CHIP_FLAGS:
        raise InputError(f"chip: expected one of {', '.join(CHIP_FLAGS)}, got {chip!r}")
    name, flags = CHIP_FLAGS[chip]
    return f'export {name}="{" ".join(flags)} ${{{name}:-}}"' if flags else ""


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if len(argv) != 1:
        raise InputError(f"expected one chip: {', '.join(CHIP_FLAGS)}")
    print(export_line(argv[0]))


if __name__ == "__main__":
    with exit_on_input_error():
        main()
