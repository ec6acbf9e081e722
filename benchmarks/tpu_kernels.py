"""Time of attention kernels on TPUs, from the compiler alone; no TPU is needed.

    pip install libtpu
    python -m benchmarks.tpu_kernels
    python -m benchmarks.tpu_kernels --topologies v5e:2x2

Every kernel runs one layer of the UNet on one chip. Its own time is read from the compiler's schedule (bundles times
turns, over the clock), without waiting for main memory. The time of what the compiler puts around it (padding,
transposing) is its own estimate, with inputs in whatever layout suits the kernel. The bound is the arithmetic at the
chip's peak rate.

libtpu 0.0.52 spaces products of 16 rows 11 bundles apart on a v5e, where the peak rate means 16. By the peak rate
flash_tpu's products, with their padding, take 2.0 ms forward and 4.6 ms backward in the fuser at 64×64: the schedule's
2.4 ms forward is possible, its 4.4 ms backward is a few percent too low.
"""

import argparse
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout

from instdiff_jax.analysis.chips import CHIPS
from instdiff_jax.analysis.hlo import analyze
from instdiff_jax.analysis.kernel_schedule import DUMP_FLAGS, read_dump
from instdiff_jax.aot.programs import topology_devices

LANES = 128


class Case(NamedTuple):
    """One layer's attention: rows of the batch, heads and their width, queries and keys."""

    name: str
    rows: int
    heads: int
    width: int
    queries: int
    keys: int

    def flops(self, backward: bool) -> float:
        """Of the products: two forward, and five more backward, where the logits are computed again."""
        one = 2 * self.rows * self.heads * self.queries * self.keys * self.width
        return one * (7 if backward else 2)

    def arrays(self, masked: bool) -> list[jax.ShapeDtypeStruct]:
        """q, k and v, and region bits if `masked`."""
        lengths = (self.queries, self.keys, self.keys)
        shapes = [jax.ShapeDtypeStruct((self.rows, n, self.heads, self.width), jnp.bfloat16) for n in lengths]
        return shapes + [jax.ShapeDtypeStruct((self.rows, n), jnp.uint32) for n in lengths[: 2 * masked]]


CASES = (
    Case("64×64, self", 8, 8, 40, 4096, 4096),
    Case("64×64, fuser", 8, 8, 40, 4096, 4280),
    Case("64×64, text", 8, 8, 40, 4096, 77),
    Case("32×32, fuser", 8, 8, 80, 1024, 1208),
    Case("16×16, fuser", 8, 8, 160, 256, 440),
)


def with_gradient(kernel: Callable) -> Callable:
    """Output and gradients; the output stands in for the gradient that comes in."""

    def run(q, k, v, *bits):
        out, pull = jax.vjp(lambda q, k, v: kernel(q, k, v, *bits), q, k, v)
        return out, pull(out)

    return run


def library_flash(q, k, v):
    """jax's flash attention, with the blocks that suit it best; heads and keys are padded in main memory."""
    from jax.experimental.pallas.ops.tpu.flash_attention import BlockSizes, SegmentIds, flash_attention

    (_, n, _, d), m = q.shape, k.shape[1]
    block, chunk = min(1024, n), min(512, _round(m, LANES))
    q, k, v = _pad(q, block), _pad(k, chunk), _pad(v, chunk)
    ids = None
    if k.shape[2] != m:
        is_padding = (jnp.arange(k.shape[2]) >= m).astype(jnp.int32)
        ids = SegmentIds(
            jnp.zeros((q.shape[0], q.shape[2]), jnp.int32), jnp.broadcast_to(is_padding, (k.shape[0], k.shape[2]))
        )
    sizes = BlockSizes(block_q=block, block_k_major=chunk, block_k=chunk, block_b=1)
    out = flash_attention(q, k, v, segment_ids=ids, sm_scale=d**-0.5, block_sizes=sizes)
    return jnp.swapaxes(out[:, :, :n, :d], 1, 2)


def library_splash(q, k, v):
    """jax's splash attention; heads and keys are padded in main memory."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash

    (_, n, heads, d), m = q.shape, k.shape[1]
    q = q * jnp.asarray(d**-0.5, q.dtype)
    block, chunk = min(1024, n), min(512, _round(m, LANES))
    q, k, v = _pad(q, block), _pad(k, chunk), _pad(v, chunk)
    mask = splash.MultiHeadMask([splash.FullMask((q.shape[2], k.shape[2]))] * heads)
    sizes = splash.BlockSizes(block_q=block, block_kv=chunk, block_kv_compute=chunk)
    kernel = splash.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    ids = splash.SegmentIds(jnp.zeros(q.shape[2], jnp.int32), (jnp.arange(k.shape[2]) >= m).astype(jnp.int32))
    out = jax.vmap(lambda q, k, v: kernel(q, k, v, ids))(q, k, v)
    return jnp.swapaxes(out[:, :, :n, :d], 1, 2)


def _pad(x: jax.Array, multiple: int) -> jax.Array:
    """[b, n, h, d] to [b, h, n, d] with whole blocks of tokens and heads of 128, as the library's kernels want."""
    n, d = x.shape[1], x.shape[3]
    padding = ((0, 0), (0, _round(n, multiple) - n), (0, 0), (0, _round(d, LANES) - d))
    return jnp.swapaxes(jnp.pad(x, padding), 1, 2)


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


class Kernel(NamedTuple):
    """A function of q, k, v, of region bits too if `masked`, and whether it has the gradient too.

    `skips`: whether chunks of keys are skipped, as `seen_share` says; else every query sees a key of every chunk.
    """

    name: str
    run: Callable
    masked: bool
    backward: bool
    skips: bool = False


def kernels() -> list[Kernel]:
    from instdiff_jax.models.kernels import chunked, flash_tpu

    return [
        Kernel("flash_tpu, forward", flash_tpu.attention, False, False),
        Kernel("flash_tpu, forward, masked", flash_tpu.attention, True, False),
        Kernel("flash_tpu, forward, one box over a quarter", flash_tpu.attention, True, False, True),
        Kernel("flash_tpu, with gradient", with_gradient(flash_tpu.attention), False, True),
        Kernel("flash_tpu, with gradient, masked", with_gradient(flash_tpu.attention), True, True),
        Kernel("jax flash, forward", library_flash, False, False),
        Kernel("jax splash, forward", library_splash, False, False),
        Kernel("chunked, forward", chunked.attention, False, False),
        Kernel("chunked, with gradient", with_gradient(chunked.attention), False, True),
    ]


def measure(kernel: Kernel, case: Case, device: jax.Device, folder: Path) -> tuple[float, float]:
    """Milliseconds of the kernels, and of what is around them."""
    for path in folder.iterdir():
        path.unlink()
    jax.clear_caches()  # what is compiled already would not be written again
    mesh = jax.sharding.Mesh([device], "x")
    anything = Format(Layout.AUTO, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        lowered = jax.jit(kernel.run, in_shardings=anything, out_shardings=anything).lower(*case.arrays(kernel.masked))
    costs = analyze(lowered.compile().as_text())
    clock = CHIPS[chip_of(device)].clock
    from instdiff_jax.models.kernels import flash_tpu

    blocks = flash_tpu.BLOCKS[device.device_kind]
    cycles = 0.0
    for _, schedule in read_dump(folder):
        if kernel.skips:
            *others, main = schedule.loops
            main = main._replace(turns=round(main.turns * seen_share(case, blocks.queries, blocks.keys)))
            schedule = schedule._replace(loops=(*others, main))
        # What is guarded runs for a head's first block of queries.
        cycles += schedule.cycles(guarded=1 / math.ceil(case.queries / blocks.queries))
    return 1e3 * cycles / clock, 1e3 * costs.cycles / clock


def seen_share(case: Case, block: int, chunk: int) -> float:
    """Of pairs of a block of queries and a chunk of keys, those that are not skipped beside one box.

    Its sides are half of the canvas, and it is in the middle. Keys after those of the visual tokens are seen by all.
    """
    side = math.isqrt(case.queries)
    box = np.zeros((side, side), bool)
    box[side // 4 : 3 * side // 4, side // 4 : 3 * side // 4] = True
    keys = np.concatenate([box.ravel(), np.zeros(case.keys - case.queries, bool)])
    tokens = np.arange(case.keys) >= case.queries
    starts = range(0, case.keys, chunk)
    seen = [
        (queries.any() and keys[start : start + chunk].any()) or tokens[start : start + chunk].any()
        for queries in np.split(box.ravel(), range(block, case.queries, block))
        for start in starts
    ]
    return float(np.mean(seen))


def chip_of(device: jax.Device) -> str:
    return {"TPU v5 lite": "v5e", "TPU v5": "v5p", "TPU v6 lite": "v6e"}[device.device_kind]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
    args = parser.parse_args(argv)
    folder = Path(tempfile.mkdtemp())
    os.environ["LIBTPU_INIT_ARGS"] = DUMP_FLAGS.format(folder=folder)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    columns = ("chip", "attention of 8 rows", "kernel", "kernel, ms", "around it, ms", "total, ms", "bound, ms")
    print(f"| {' | '.join(columns)} |\n{'| --- ' * len(columns)}|")
    for topology in args.topologies:
        device = topology_devices(topology)[0]
        chip = chip_of(device)
        for case in CASES:
            for kernel in kernels():
                if (kernel.masked and case.keys < case.queries) or (kernel.skips and case.name != "64×64, fuser"):
                    continue
                inside, around = measure(kernel, case, device, folder)
                numbers = (inside, around, inside + around, 1e3 * case.flops(kernel.backward) / CHIPS[chip].flops)
                print(f"| {' | '.join([chip, case.name, kernel.name, *(f'{x:.2f}' for x in numbers)])} |", flush=True)
    shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
