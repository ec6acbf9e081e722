"""Flash attention for TPUs in Pallas: logits and weights live in VMEM alone, forward and backward.

Axes: b batch, h heads, n queries, m keys, d head width.

The kernels take [b, h, d, n], tokens last. XLA's projections write and read that layout without a transpose, and heads
of 40 have no padding in main memory. One call walks over (b, h, blocks of queries); all keys and values of a head are
in VMEM meanwhile. Region bits mask logits as they are made, and chunks of keys that no query of a block may see are
skipped. `flash_tpu_bodies` has the arithmetic; `benchmarks/tpu_kernels.py` measures.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, UInt32

from instdiff_jax.models.kernels import flash_tpu_bodies as bodies
from instdiff_jax.models.layers import kept, platform
from instdiff_jax.models.regions import EVERYWHERE

LANES = 128
# Keys in a chunk at most: more of them leave the schedule as it is.
MAX_CHUNK = 512
# Bytes of VMEM for a block's logits, weights and sums, and for all of a call. A v5p has 64 MiB, the others 128.
BLOCK_VMEM, MAX_VMEM = 24 << 20, 64 << 20


class Blocks(NamedTuple):
    """Queries in a block at most, and keys in a chunk beside so many queries."""

    queries: int
    keys: int
    backward_keys: int


# By the compiler's schedule for 4,096 queries, 4,280 keys and heads of 40. Blocks of 4,096 queries take 7% less time,
# but one of them sees more of the keys.
BLOCKS = {
    "TPU v5 lite": Blocks(2048, 128, 256),
    "TPU v5": Blocks(2048, 128, 256),
    "TPU v6 lite": Blocks(2048, 256, 256),
}


def attention(
    q: Float[Array, "b n h d"],
    k: Float[Array, "b m h d"],
    v: Float[Array, "b m h d"],
    query_bits: UInt32[Array, "b n"] | None = None,
    key_bits: UInt32[Array, "b m"] | None = None,
    blocks: Blocks | None = None,
) -> Float[Array, "b n h d"]:
    """`plain.attention`; on another platform the kernels are interpreted, slowly. `blocks`: by default the chip's."""
    tokens_last = (jnp.transpose(x, (0, 2, 3, 1)) for x in (q, k, v))
    out = _flash(blocks or _chip_blocks(), *tokens_last, query_bits, key_bits)
    return jnp.transpose(out, (0, 3, 1, 2))


def supports(queries: tuple[int, ...], keys: tuple[int, ...], dtype: jnp.dtype) -> bool:
    """Whether queries [b, n, h, d] and keys [b, m, h, d] fit the kernels: whole sublanes, and VMEM for all keys.

    Not the autoencoder's one head of 512, which needs no flash attention.
    """
    (_, n, _, d), m = queries, keys[1]
    return d % 8 == 0 and d <= 256 and _vmem(d, max(n, m), jnp.dtype(dtype)) <= MAX_VMEM


def _chip_blocks() -> Blocks:
    device = jax.sharding.get_abstract_mesh().abstract_device or jax.local_devices()[0]
    return BLOCKS.get(device.device_kind, BLOCKS["TPU v5 lite"])


def _vmem(width: int, keys: int, dtype: jnp.dtype) -> int:
    """About the bytes that the backward kernel needs: k, v, dk and dv in two buffers, and its scratch."""
    rows, lanes = _round(width + bodies.SPARE, 16), _round(width + bodies.SPARE, LANES)
    per_key = (9 * rows + 2 * lanes) * dtype.itemsize + 2 * rows * 4 + LANES * 4
    return per_key * _round(keys, bodies.FILL) + BLOCK_VMEM


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(blocks: Blocks, q, k, v, query_bits, key_bits) -> Float[Array, "b h d n"]:
    return _forward(blocks, q, k, v, query_bits, key_bits, save=False)[0]


def _flash_forward(blocks: Blocks, q, k, v, query_bits, key_bits):
    out, lse = map(kept, _forward(blocks, q, k, v, query_bits, key_bits, save=True))
    return out, (q, k, v, query_bits, key_bits, out, lse)


def _forward(blocks: Blocks, q, k, v, query_bits, key_bits, save: bool) -> list[Array]:
    """The output, and the logsumexp [b, h, 1, n] in base 2 if `save`."""
    call = _Call(q, k, query_bits, key_bits, blocks.queries, blocks.keys)
    d, rows = call.sizes.width, call.sizes.width + bodies.SPARE
    per_query, per_key = call.per_query(d), call.per_key(d)
    outputs = [(per_query, jax.ShapeDtypeStruct(q.shape, q.dtype))]
    if save:
        lse = jax.ShapeDtypeStruct((*q.shape[:2], 1, q.shape[3]), jnp.float32)
        outputs.append((call.per_query(1), lse))
    scratch = [
        pltpu.VMEM((rows, call.block), q.dtype),
        pltpu.VMEM((call.padded_keys, _round(rows, LANES)), q.dtype),
        pltpu.VMEM((rows, call.padded_keys), q.dtype),
        pltpu.VMEM((1, call.block), jnp.float32),
        pltpu.VMEM((rows, call.block), jnp.float32),
    ]
    inputs = [(per_query, q), (per_key, k), (per_key, v)]
    return call.run(functools.partial(bodies.forward, save=save), "flash_forward", inputs, outputs, scratch)


def _flash_backward(blocks: Blocks, saved, gradient) -> tuple[Array | None, ...]:
    """Gradients of q, k and v; region bits have none."""
    q, k, v, query_bits, key_bits, out, lse = saved
    call = _Call(q, k, query_bits, key_bits, blocks.queries, blocks.backward_keys)
    d, rows = call.sizes.width, call.sizes.width + bodies.SPARE
    per_query, per_key = call.per_query(d), call.per_key(d)
    inputs = [(per_query, q), (per_query, out), (per_query, gradient), (call.per_query(1), lse)]
    inputs += [(per_key, k), (per_key, v)]
    outputs = [
        (spec, jax.ShapeDtypeStruct(x.shape, x.dtype)) for spec, x in ((per_query, q), (per_key, k), (per_key, v))
    ]
    scratch = [
        pltpu.VMEM((rows, call.block), q.dtype),
        pltpu.VMEM((call.padded_keys, _round(rows, LANES)), q.dtype),
        pltpu.VMEM((call.padded_keys, _round(d, LANES)), q.dtype),
        pltpu.VMEM((d, call.padded_keys), q.dtype),
        pltpu.VMEM((d, call.block), jnp.float32),
        pltpu.VMEM((d, call.padded_keys), jnp.float32),
        pltpu.VMEM((d, call.padded_keys), jnp.float32),
    ]
    return *call.run(bodies.backward, "flash_backward", inputs, outputs, scratch), None, None


_flash.defvjp(_flash_forward, _flash_backward)


class _Call:
    """Sizes, grid and region bits that both kernels share."""

    def __init__(self, q, k, query_bits, key_bits, queries: int, keys: int):
        b, h, d, n = q.shape
        m = k.shape[3]
        # Even blocks: fewer queries that are padding.
        self.block = _round(pl.cdiv(n, pl.cdiv(n, queries)), LANES)
        self.grid = (b, h, pl.cdiv(n, self.block))
        self.sizes = bodies.Sizes(n, m, d, _chunk(keys * max(1, queries // self.block), m), key_bits is not None)
        # With region bits there is a key for every query, real or padding.
        padded = _round(m if key_bits is None else max(m, self.grid[2] * self.block), self.sizes.chunk)
        self.padded_keys = padded if padded <= bodies.FILL else _round(padded, bodies.FILL)
        self.bits = () if key_bits is None else self._prepare_bits(query_bits, key_bits)

    def _prepare_bits(self, query_bits, key_bits) -> tuple[Array, ...]:
        """int32 arrays for `bodies.Masks`; padding has no bits."""
        queries = _pad(query_bits | EVERYWHERE, self.grid[2] * self.block)
        keys = _pad(key_bits, self.padded_keys)
        arrays = (_union(queries, self.block), _union(keys, self.sizes.chunk), queries[:, None], keys[:, None])
        return tuple(jax.lax.bitcast_convert_type(x, jnp.int32) for x in arrays)

    def per_query(self, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, rows, self.block), lambda b, h, i, *_: (b, h, 0, i))

    def per_key(self, rows: int) -> pl.BlockSpec:
        return pl.BlockSpec((1, 1, rows, self.padded_keys), lambda b, h, i, *_: (b, h, 0, 0))

    def run(self, body, name: str, inputs: list, outputs: list, scratch: list) -> list[Array]:
        """Calls a kernel; inputs and outputs are pairs of a BlockSpec and an array or its shape."""
        masked = self.sizes.masked
        if masked:
            queries = pl.BlockSpec((1, 1, self.block), lambda b, h, i, *_: (b, 0, i))
            keys = pl.BlockSpec((1, 1, self.padded_keys), lambda b, h, i, *_: (b, 0, 0))
            inputs = [(queries, self.bits[2]), (keys, self.bits[3]), *inputs]
            scratch = [pltpu.VMEM((self.padded_keys, LANES), jnp.int32), *scratch]
        in_specs, arrays = zip(*inputs, strict=True)
        out_specs, out_shapes = zip(*outputs, strict=True)
        return pl.pallas_call(
            functools.partial(_unpack, body, self.sizes, len(arrays) + len(outputs)),
            grid_spec=pltpu.PrefetchScalarGridSpec(
                num_scalar_prefetch=2 if masked else 0,
                grid=self.grid,
                in_specs=in_specs,
                out_specs=list(out_specs),
                scratch_shapes=scratch,
            ),
            out_shape=list(out_shapes),
            compiler_params=pltpu.CompilerParams(
                # In order where heads share the bits that the first of them spreads.
                dimension_semantics=("parallel", "arbitrary" if masked else "parallel", "arbitrary"),
                vmem_limit_bytes=_vmem(self.sizes.width, self.padded_keys, arrays[-1].dtype),
            ),
            interpret=platform() != "tpu",
            name=name,
        )(*self.bits[:2], *arrays)


def _unpack(body, sizes: bodies.Sizes, scratch: int, *refs) -> None:
    """Runs a body; `scratch` is the number of references before the scratch ones, scalars not counted."""
    if not sizes.masked:
        return body(sizes, refs, None)
    masks = bodies.Masks(*refs[:4], refs[2 + scratch])
    return body(sizes, (*refs[4 : 2 + scratch], *refs[3 + scratch :]), masks)


def _chunk(keys: int, m: int) -> int:
    """Keys in a chunk: about `keys`, fewer where that leaves much less padding after the last of `m`."""
    chunk = min(keys, MAX_CHUNK, _round(m, LANES))
    while chunk > LANES and _round(m, chunk) - _round(m, chunk // 2) > m // 16:
        chunk //= 2
    return chunk


def _round(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple


def _pad(bits: UInt32[Array, "b l"], length: int) -> UInt32[Array, "b length"]:
    return jnp.pad(bits, ((0, 0), (0, length - bits.shape[1])))


def _union(bits: UInt32[Array, "b l"], size: int) -> UInt32[Array, "b blocks"]:
    """The bits that any token of a block has."""
    return jnp.bitwise_or.reduce(bits.reshape(bits.shape[0], -1, size), axis=2)
