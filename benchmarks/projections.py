"""Projections, convolutions and feed-forwards on a CPU: XLA's, ours and PyTorch's in turn in one process.

    python -m benchmarks.projections
    python -m benchmarks.projections --dtype bfloat16

The shapes are the full model's at 512×512: two latents, as guidance has them. XLA's flags change the products of ours,
for example XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=invalid.
"""

import argparse
import functools
from collections.abc import Callable
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import torch

from benchmarks.processes import alternate, cores, seconds
from benchmarks.tables import machine_line
from instdiff_jax.models import layers
from instdiff_jax.models.kernels import cpu

# Tokens of two latents and channels, by level.
LEVELS = ((8192, 320), (2048, 640), (512, 1280))
# Tokens, channels in and out: attention's, and those of the feed-forward; then the text's keys and values.
PRODUCTS = [(n, i * c, o * c) for n, c in LEVELS for i, o in ((1, 1), (1, 8), (4, 1))] + [(154, 768, 1280)]
# Latents, side, channels in and out.
CONVOLUTIONS = [(2, 64, 320, 320), (2, 64, 960, 320), (2, 32, 640, 640), (2, 32, 1920, 640), (2, 16, 1280, 1280)]
CONVOLUTIONS += [(2, 16, 2560, 1280), (2, 8, 1280, 1280)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="runs of each; the median is printed")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of all sides")
    args = parser.parse_args()
    repeats, dtype = args.repeats, jnp.dtype(args.dtype)
    torch.set_num_threads(cores())
    print(f"{machine_line()}; {dtype}\n")
    for title, shapes, make in (
        ("tokens × in × out", PRODUCTS, product),
        ("3×3 convolution, latents × side² × in × out", CONVOLUTIONS, convolution),
    ):
        print(f"| {title} | XLA, ms | ours, ms | PyTorch, ms | ours / PyTorch |\n| --- | --- | --- | --- | --- |")
        total = np.zeros(3)
        for shape in shapes:
            taken = np.asarray(in_turn(make(*shape, dtype), repeats))
            total += taken
            print(_line(" × ".join(map(str, shape)), taken), flush=True)
        print(f"{_line('sum', total)}\n")
    head = "| feed-forward, tokens × channels | at once, ms | ours, ms | PyTorch, at once, ms | ours / PyTorch |"
    print(f"{head}\n| --- | --- | --- | --- | --- |")
    for n, c in LEVELS:
        whole, ours, pytorch = in_turn(feed_forward(n, c, dtype), repeats)
        print(f"| {n} × {c} | {whole:.1f} | {ours:.1f} | {pytorch:.1f} | {ours / pytorch:.2f} |", flush=True)


def _line(name: str, taken: np.ndarray) -> str:
    xla, ours, pytorch = taken
    return f"| {name} | {xla:.1f} | {ours:.1f} | {pytorch:.1f} | {ours / pytorch:.2f} |"


def in_turn(sides: list[Callable[[], object]], repeats: int) -> list[float]:
    """Median milliseconds of each, run one after the other `repeats` times."""
    for side in sides:
        side()  # compiles
    turns = {str(number): functools.partial(seconds, side) for number, side in enumerate(sides)}
    return [1e3 * taken for taken in alternate(turns, repeats).values()]


def product(n: int, i: int, o: int, dtype: jnp.dtype) -> list[Callable[[], object]]:
    rng = np.random.default_rng(0)
    x, weights, bias = (rng.standard_normal(size, np.float32) for size in ((n, i), (i, o), (o,)))
    layer, params = layers.Dense(o, dtype=dtype), {"params": {"kernel": weights, "bias": bias}}
    return [*xla_and_ours(layer, params, x.astype(dtype)), theirs(torch.nn.Linear(i, o), x, dtype)]


def convolution(b: int, side: int, i: int, o: int, dtype: jnp.dtype) -> list[Callable[[], object]]:
    rng = np.random.default_rng(0)
    x, weights, bias = (rng.standard_normal(size, np.float32) for size in ((b, side, side, i), (3, 3, i, o), (o,)))
    layer, params = layers.Conv(o, (3, 3), dtype=dtype), {"params": {"kernel": weights, "bias": bias}}
    pytorch = theirs(torch.nn.Conv2d(i, o, 3, padding=1), np.ascontiguousarray(x.transpose(0, 3, 1, 2)), dtype)
    return [*xla_and_ours(layer, params, x.astype(dtype)), pytorch]


def xla_and_ours(layer: nn.Module, params: dict, x: np.ndarray) -> list[Callable[[], object]]:
    """The layer without the CPU's own kernels, and as it runs; parameters of the type that it computes in."""
    params = jax.tree.map(lambda leaf: leaf.astype(x.dtype), params)
    with mock.patch.object(cpu, "is_used", lambda: False):
        xla = ours(layer.apply, params, x)
    return [xla, ours(layer.apply, params, x)]


def feed_forward(n: int, c: int, dtype: jnp.dtype) -> list[Callable[[], object]]:
    x = np.random.default_rng(0).standard_normal((2, n // 2, c), np.float32).astype(dtype)
    layer = layers.GEGLU(c, dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), layer.init(jax.random.key(0), x))
    with mock.patch.object(layers, "feeds_in_parts", lambda shape: False):
        whole = ours(layer.apply, params, x)

    class GEGLU(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside, self.outside = torch.nn.Linear(c, 8 * c), torch.nn.Linear(4 * c, c)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            value, gate = self.inside(x).chunk(2, dim=-1)
            return self.outside(value * torch.nn.functional.gelu(gate))

    return [whole, ours(layer.apply, params, x), theirs(GEGLU(), x.astype(np.float32), dtype)]


def ours(function: Callable, *given: object) -> Callable[[], object]:
    """A call of the compiled function."""
    arrays = jax.tree.map(jnp.asarray, given)
    run = jax.jit(lambda *args: function(*args)).lower(*arrays).compile()
    return lambda: jax.block_until_ready(run(*arrays))


def theirs(module: torch.nn.Module, x: np.ndarray, dtype: jnp.dtype) -> Callable[[], object]:
    kind = getattr(torch, dtype.name)
    module, given = module.to(kind), torch.from_numpy(x).to(kind)

    @torch.no_grad()
    def run() -> object:
        return module(given)

    return run


if __name__ == "__main__":
    main()
