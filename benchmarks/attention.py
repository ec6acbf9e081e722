"""One layer of attention on a CPU: ours, the chunked kernel and PyTorch's, in turn in one process.

    python -m benchmarks.attention
    python -m benchmarks.attention --dtype bfloat16

The shapes are the full model's at 512×512: two latents, as guidance has them. Without region bits.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.processes import cores
from benchmarks.tables import machine_line
from instdiff_jax.models.kernels import chunked, cpu, flash_bf16, flash_cpu

# b, n, m, h, d: self-attention in a fuser, in a transformer block, on text; then the deeper levels.
SHAPES = (
    (2, 4096, 4280, 8, 40),
    (2, 4096, 4096, 8, 40),
    (2, 4096, 77, 8, 40),
    (2, 1024, 1208, 8, 80),
    (2, 256, 440, 8, 160),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each; the median is printed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all sides")
    args = parser.parse_args()
    repeats, dtype = args.repeats, jnp.dtype(args.dtype)
    kernel = flash_cpu if dtype == jnp.float32 else flash_bf16
    torch.set_num_threads(cores())
    print(f"{machine_line()}; {dtype}")
    if not (cpu.is_available() if kernel is flash_cpu else cpu.has_bf16()):
        parser.exit(2, f"error: {kernel.__name__} does not run here: no C++ compiler, or no such processor\n")
    print("| queries, keys, heads x width | ours, ms | chunked, ms | PyTorch, ms | ours / PyTorch | difference |")
    print("| --- | --- | --- | --- | --- | --- |")
    for b, n, m, h, d in SHAPES:
        rng = np.random.default_rng(0)
        arrays = [rng.normal(size=(b, length, h, d)).astype(np.float32) for length in (n, m, m)]
        sides = [_ours(module.attention, arrays, dtype) for module in (kernel, chunked)] + [_pytorch(arrays, dtype)]
        outputs = [_wide(side()) for side in sides]  # and a warm-up
        times: list[list[float]] = [[] for _ in sides]
        for _ in range(repeats):
            for side, taken in zip(sides, times, strict=True):
                start = time.perf_counter()
                side()
                taken.append(1e3 * (time.perf_counter() - start))
        ours, chunks, pytorch = map(statistics.median, times)
        far = np.abs(outputs[0] - outputs[2]).max()
        ratio = statistics.median(a / b for a, b in zip(times[0], times[2], strict=True))
        name = f"{n}, {m}, {h} x {d}"
        print(f"| {name} | {ours:.1f} | {chunks:.1f} | {pytorch:.1f} | {ratio:.2f} | {far:.1e} |", flush=True)


def _wide(x: jax.Array | torch.Tensor) -> np.ndarray:
    return x.float().numpy() if isinstance(x, torch.Tensor) else np.asarray(x, np.float32)


def _ours(kernel: Callable, arrays: list[np.ndarray], dtype: jnp.dtype) -> Callable[[], jax.Array]:
    run, given = jax.jit(kernel), [jnp.asarray(x, dtype) for x in arrays]
    return lambda: jax.block_until_ready(run(*given))


def _pytorch(arrays: list[np.ndarray], dtype: jnp.dtype) -> Callable[[], torch.Tensor]:
    given = [torch.from_numpy(x).to(getattr(torch, dtype.name)).transpose(1, 2) for x in arrays]

    @torch.no_grad()
    def run() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(*given).transpose(1, 2)

    return run


if __name__ == "__main__":
    main()
