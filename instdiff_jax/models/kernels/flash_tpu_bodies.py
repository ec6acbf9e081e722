"""What the kernels of `flash_tpu` do on a TPU core, for one block of queries of one head.

Axes: d head width, q a block's queries, k a chunk's keys, m all keys, padded to whole chunks.

Logits are kept transposed, [k, q]. Maxima over keys then run down sublanes, which costs nothing beside lanes, and
heads need no padding to 128 in the products with values: v [d, k] · p [k, q] streams d rows through the matrix unit.
"""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

# Logit of a key that is not seen. Finite: the difference of two is no NaN.
UNSEEN = -1e30
# Rows after the head's own in `queries` and `values`: one sublane tile, of which the first row is in use.
SPARE = 8
# Tokens transposed at a time, for which the latency of the transpose unit is hidden.
FILL = 512


class Sizes(NamedTuple):
    """Static sizes of a call; `queries` and `keys` count what is real, not the padding."""

    queries: int
    keys: int
    width: int
    chunk: int
    masked: bool

    @property
    def scale(self) -> float:
        """Softmax in base 2: exp2 is one instruction, and its factor joins the scale of the queries."""
        return self.width**-0.5 * math.log2(math.e)


class Masks(NamedTuple):
    """References to the region bits of a batch's row; None in a call without them.

    Attributes:
        query_blocks: int32 [b, blocks] in scalar memory: what the queries of a block may see, together.
        key_chunks: int32 [b, chunks] in scalar memory: the bits of a chunk's keys, together.
        queries: int32 [1, 1, q], what each query may see.
        keys: int32 [1, 1, m].
        spread: int32 [m, 128], scratch: the keys' bits down sublanes, the same in all lanes.
    """

    query_blocks: jax.Array
    key_chunks: jax.Array
    queries: jax.Array
    keys: jax.Array
    spread: jax.Array


def dot(a: jax.Array, b: jax.Array, contract: tuple[int, int]) -> jax.Array:
    """Matrix product in float32 over one axis of each."""
    precision = jax.lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return jax.lax.dot_general(a, b, dims, precision=precision, preferred_element_type=jnp.float32)


def real(x: jax.Array, first: jax.Array | int, count: int) -> jax.Array:
    """float32 of x [d, l], whose lanes are `first`, `first` + 1, …; 0 in those from `count` on, where memory ends."""
    lane = first + jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    return jnp.where(lane < count, x.astype(jnp.float32), 0.0)


def spare_row(shape: tuple[int, int], value: jax.Array | float) -> jax.Array:
    """SPARE rows of zeros, the first of them `value`."""
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    return jnp.where(row == 0, value, 0.0)


def chunk_slice(i: jax.Array, size: int) -> pl.Slice:
    return pl.ds(pl.multiple_of(i * size, size), size)


def transpose_tokens(sizes: Sizes, source, target, bias: bool) -> None:
    """target [m, d] from source [1, 1, d, m], zeros after the last key.

    With `bias`, column d is what is added to a key's logits: UNSEEN after the last key.
    """
    size = min(FILL, target.shape[0])

    def fill(i, _):
        first, where = i * size, chunk_slice(i, size)
        rows = real(source[0, 0, :, where], first, sizes.keys)
        if bias:
            lane = first + jax.lax.broadcasted_iota(jnp.int32, (SPARE, size), 1)
            rows = jnp.concatenate([rows, spare_row((SPARE, size), jnp.where(lane < sizes.keys, 0.0, UNSEEN))])
        target[where, : rows.shape[0]] = rows.T.astype(target.dtype)
        return _

    jax.lax.fori_loop(0, target.shape[0] // size, fill, 0)


def fill_queries(sizes: Sizes, q_ref, queries) -> None:
    """queries [d + SPARE, q], scaled; row d is 1, for the bias of the keys."""
    block = queries.shape[1]
    q = real(q_ref[0, 0], pl.program_id(2) * block, sizes.queries) * sizes.scale
    queries[...] = jnp.concatenate([q, spare_row((SPARE, block), 1.0)]).astype(queries.dtype)


def spread_bits(sizes: Sizes, masks: Masks) -> None:
    """Fills `masks.spread`."""

    def spread(i, _):
        where = chunk_slice(i, 128)
        masks.spread[where, :] = jnp.broadcast_to(masks.keys[0, :, where], (128, 128)).T
        return _

    jax.lax.fori_loop(0, pl.cdiv(sizes.keys, 128), spread, 0)


def fold_chunks(sizes: Sizes, masks: Masks | None, step, carry, refs):
    """carry = step(i, carry) for each chunk of keys, but for those that no query of this block may see.

    `refs` hold the carry where chunks may be skipped: the compiler schedules that better than a `cond` with results.
    """
    chunks = pl.cdiv(sizes.keys, sizes.chunk)
    if masks is None:
        return jax.lax.fori_loop(0, chunks, step, carry)
    row, block = pl.program_id(0), pl.program_id(2)

    def store(carry):
        for ref, value in zip(refs, carry, strict=True):
            ref[...] = value

    def turn(i, _):
        some = (masks.query_blocks[row, block] & masks.key_chunks[row, i]) != 0
        pl.when(some)(lambda: store(step(i, tuple(ref[...] for ref in refs))))
        return _

    store(carry)
    jax.lax.fori_loop(0, chunks, turn, 0)
    return tuple(ref[...] for ref in refs)


def seen(masks: Masks, where: pl.Slice, block: int) -> jax.Array:
    """bool [k, q]: which queries of the block share a bit with which key of a chunk."""
    keys = masks.spread[where, :]
    return (jnp.concatenate([keys] * (block // 128), axis=1) & masks.queries[0]) != 0


def only_itself(masks: Masks, itself: pl.Slice) -> jax.Array:
    """bool [1, q]: the queries that see the key of their own token only by the rule that each token sees itself."""
    return (masks.keys[0, :, itself] & masks.queries[0]) == 0


def forward(sizes: Sizes, refs, masks: Masks | None, save: bool) -> None:
    """One block of queries.

    Args:
        refs: q [1, 1, d, q], k and v [1, 1, d, m] and out [1, 1, d, q]; then logsumexp [1, 1, 1, q], in base 2, if
            `save`; then scratch: queries [d + SPARE, q], keys [m, d + SPARE] and values [d + SPARE, m].
    """
    (q_ref, k_ref, v_ref, out_ref), rest = refs[:4], refs[4:]
    lse_ref, rest = (rest[0], rest[1:]) if save else (None, rest)
    queries, keys, values, *state = rest
    d, block = sizes.width, queries.shape[1]

    @pl.when(pl.program_id(2) == 0)
    def _():
        transpose_tokens(sizes, k_ref, keys, bias=True)
        v = real(v_ref[0, 0], 0, sizes.keys)
        # The row of ones makes `sums` hold the sum of the weights, after the d weighted sums of values.
        values[...] = jnp.concatenate([v, spare_row((SPARE, v.shape[1]), 1.0)]).astype(values.dtype)

    if masks is not None:
        pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))(functools.partial(spread_bits, sizes, masks))
    fill_queries(sizes, q_ref, queries)
    if masks is None:
        start = jnp.full((1, block), UNSEEN, jnp.float32), jnp.zeros((d + SPARE, block), jnp.float32)
    else:
        # Each token sees itself: that key comes first, with no weight where its bits are seen and it comes again.
        itself = chunk_slice(pl.program_id(2), block)
        q, k = queries[:d, :].astype(jnp.float32), k_ref[0, 0, :, itself].astype(jnp.float32)
        v = jnp.concatenate([v_ref[0, 0, :, itself].astype(jnp.float32), spare_row((SPARE, block), 1.0)])
        start = jnp.sum(q * k, axis=0, keepdims=True), jnp.where(only_itself(masks, itself), v, 0.0)

    def step(i, carry):
        before, sums = carry
        where = chunk_slice(i, sizes.chunk)
        logits = dot(keys[where, : d + SPARE], queries[...], (1, 0))
        if masks is not None:
            logits = jnp.where(seen(masks, where, block), logits, UNSEEN)
        after = jnp.maximum(before, logits.max(axis=0, keepdims=True))
        weights = jnp.exp2(logits - after).astype(values.dtype)
        return after, sums * jnp.exp2(before - after) + dot(values[:, where], weights, (1, 0))

    maximum, sums = fold_chunks(sizes, masks, step, start, state)
    total = sums[d : d + 1, :]
    out_ref[0, 0] = (sums[:d, :] / total).astype(out_ref.dtype)
    if save:
        lse_ref[0, 0] = maximum + jnp.log2(total)


def backward(sizes: Sizes, refs, masks: Masks | None) -> None:
    """One block of queries: its part of all three gradients.

    Args:
        refs: q, out and gradient of out [1, 1, d, q], logsumexp [1, 1, 1, q], k and v [1, 1, d, m]; then gradients
            dq [1, 1, d, q], dk and dv [1, 1, d, m]; then scratch: queries [d + SPARE, q], keys [m, d + SPARE], values
            [m, d], the keys [d, m] with zeros as padding, and in float32 sums of dq [d, q], dk and dv [d, m].
    """
    q_ref, out_ref, grad_ref, lse_ref, k_ref, v_ref, dq_ref, dk_ref, dv_ref = refs[:9]
    queries, keys, values, flat_keys, dq, dk, dv = refs[9:]
    d, block = sizes.width, queries.shape[1]
    first = pl.program_id(2) * block

    @pl.when(pl.program_id(2) == 0)
    def _():
        transpose_tokens(sizes, k_ref, keys, bias=True)
        flat_keys[...] = real(k_ref[0, 0], 0, sizes.keys).astype(flat_keys.dtype)
        transpose_tokens(sizes, v_ref, values, bias=False)
        dk[...] = jnp.zeros(dk.shape, jnp.float32)
        dv[...] = jnp.zeros(dv.shape, jnp.float32)

    if masks is not None:
        pl.when((pl.program_id(1) == 0) & (pl.program_id(2) == 0))(functools.partial(spread_bits, sizes, masks))
    fill_queries(sizes, q_ref, queries)
    grad = real(grad_ref[0, 0], first, sizes.queries)
    lse = real(lse_ref[0, 0], first, sizes.queries)
    # Σ over keys of a weight times its gradient.
    mean = jnp.sum(grad * real(out_ref[0, 0], first, sizes.queries), axis=0, keepdims=True)
    dtype, low = queries.dtype, grad.astype(queries.dtype)
    dq[...] = jnp.zeros(dq.shape, jnp.float32)

    def step(i, carry):
        where = chunk_slice(i, sizes.chunk)
        weights = jnp.exp2(dot(keys[where, : d + SPARE], queries[...], (1, 0)) - lse)
        if masks is not None:
            weights = jnp.where(seen(masks, where, block), weights, 0.0)
        dlogits = (weights * (dot(values[where, :d], low, (1, 0)) - mean)).astype(dtype)
        dq[...] += dot(flat_keys[:, where], dlogits, (1, 0))
        dk[:, where] += dot(queries[:d, :], dlogits, (1, 1))
        dv[:, where] += dot(low, weights.astype(dtype), (1, 1))
        return carry

    fold_chunks(sizes, masks, step, (), ())
    if masks is not None:
        itself = chunk_slice(pl.program_id(2), block)
        q = queries[:d, :].astype(jnp.float32)
        k, v = (real(ref[0, 0, :, itself], first, sizes.keys) for ref in (k_ref, v_ref))
        weight = jnp.exp2(jnp.sum(q * k, axis=0, keepdims=True) - lse)
        weight = jnp.where(only_itself(masks, itself), weight, 0.0)
        dlogit = weight * (jnp.sum(v * grad, axis=0, keepdims=True) - mean)
        dq[...] += dlogit * k
        dk[:, itself] += dlogit * q
        dv[:, itself] += weight * grad
    dq_ref[0, 0] = (dq[...] * sizes.width**-0.5).astype(dq_ref.dtype)

    @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
    def _():
        # `queries` carry log2(e) beside the scale.
        dk_ref[0, 0] = (dk[...] * math.log(2)).astype(dk_ref.dtype)
        dv_ref[0, 0] = dv[...].astype(dv_ref.dtype)
