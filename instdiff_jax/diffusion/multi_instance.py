"""The multi-instance sampler (paper, section 3.4) as rows of one batch.

A row is one latent being denoised: an image's global one, or one instance's. For the first M steps all
rows of all images are one batch; then each image's rows are merged, and the remaining steps run on one
row an image, with the global row's solver history. The UNet comes in as a function

    eps_fn(params, latents [n h w c], timesteps [n], conditions, alpha) -> ε [n h w c]

that must be hashable and one object a model, since it is part of the compiled program's key. With
guidance n is rows · 2, each row's conditional and unconditional entry side by side: halves one after
the other would cost collectives when rows are sharded.

Conditions are a dict of groups, each a tree of arrays. All leaves have one leading axis of unique
entries, which rows point into. The group `grounding` is what only the fusers read; it is left out
wherever they are off.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from instdiff_jax.diffusion.solvers import HISTORY, Coefficients, SolverTable, update

FUSER_GROUP = "grounding"
EXACT_ROWS = 8  # a device: up to here a batch is never padded
WASTE = 1.2  # above, a batch grows to at most this many times its rows

EpsFn = Callable[[Any, Array, Array, Any, Array | None], Array]


class ImageRows(NamedTuple):
    """What one image is sampled under: numbers of unique conditions, and where its instances are."""

    layout: int
    negative: int
    instances: tuple[int, ...] = ()
    boxes: Sequence[Sequence[float]] = ()  # x0, y0, x1, y1 in [0, 1], one an instance; only the crop merge reads them


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """The rows of a batch, image by image with the global one first, padded to whole chunks.

    Attributes:
        image: the image whose noise and known region a row has (padding: image 0).
        segment: the image that a row is merged into; padding: `num_images`, which no merge reads.
        slot: 0 for a global row, i for an image's i-th instance, −1 for padding.
        boxes: the instance's box in [0, 1].
        conditions: unique conditions, conditional first, then the negative one if guided.
        count: rows that are not padding; they come first.
        chunk: rows of one call of the compiled program.
    """

    image: Int[np.ndarray, "rows"]
    segment: Int[np.ndarray, "rows"]
    slot: Int[np.ndarray, "rows"]
    boxes: Float[np.ndarray, "rows 4"]
    conditions: Int[np.ndarray, "rows groups"]
    num_images: int
    count: int
    chunk: int


def bucket_size(rows: int, devices: int = 1) -> int:
    """Rows of the compiled program that holds `rows` rows: a multiple of the number of devices.

    Exact up to 8 rows a device, then the sizes 10, 13, 16, 20, 25, 31, … a device, which pad by at most 20%.
    """
    each = -(-rows // devices)
    size = EXACT_ROWS
    while size < each:
        size = int(WASTE * (size + 1))
    return devices * (each if each <= EXACT_ROWS else size)


def pack_rows(
    images: Sequence[ImageRows], *, instances: bool, guided: bool, devices: int = 1, max_rows: int | None = None
) -> Rows:
    """Packs images into rows: one an image, and one an instance too if `instances`.

    Args:
        images: each with any number of instances.
        instances: whether instances get rows.
        guided: whether rows have a negative entry.
        devices: the size of a chunk is a multiple of this.
        max_rows: the most rows of a chunk (at least one a device); None for no bound.
    """
    rows = []
    for i, image in enumerate(images):
        entries = [image.layout, *(image.instances if instances else ())]
        boxes = list(image.boxes) or [(0.0,) * 4] * len(image.instances)
        for slot, entry in enumerate(entries):
            rows.append((i, i, slot, boxes[slot - 1] if slot else (0.0,) * 4, (entry, image.negative)[: 1 + guided]))
    cap = len(rows) if max_rows is None else max(max_rows // devices, 1) * devices
    chunks = -(-len(rows) // cap)
    chunk = bucket_size(-(-len(rows) // chunks), devices)
    if max_rows is not None:
        chunk = min(chunk, cap)
    count = len(rows)
    rows += [(0, len(images), -1, *rows[0][3:])] * (-count % chunk)
    image, segment, slot, boxes, conditions = zip(*rows, strict=True)
    return Rows(
        image=np.array(image, np.int32),
        segment=np.array(segment, np.int32),
        slot=np.array(slot, np.int32),
        boxes=np.array(boxes, np.float32),
        conditions=np.array(conditions, np.int32),
        num_images=len(images),
        count=count,
        chunk=chunk,
    )


class DenoiseState(NamedTuple):
    """What a solver carries, float32, rows (or images) first; see solvers.py."""

    latents: Float[Array, "rows h w c"]
    anchor: Float[Array, "rows h w c"]
    history: Float[Array, "rows 3 h w c"]


class Inpaint(NamedTuple):
    """An image of which a region is kept. Before each step that region becomes the image, noised to the step.

    `keep` is 1 in the region to keep and 0 where to paint (the `mask` of the official sampler).
    """

    latents: Float[Array, "rows h w c"]
    keep: Float[Array, "rows h w 1"]
    noise: Float[Array, "rows h w c"]


def start_state(latents: Float[Array, "rows h w c"]) -> DenoiseState:
    """The state before a solver's first evaluation."""
    latents = jnp.asarray(latents, jnp.float32)
    history = jnp.zeros((latents.shape[0], HISTORY, *latents.shape[1:]), jnp.float32)
    return DenoiseState(latents, jnp.zeros_like(latents), history)


@functools.partial(jax.jit, static_argnames=("eps_fn", "use_fusers", "sharding"), donate_argnames="state")
def denoise(
    eps_fn: EpsFn,
    params: Any,
    state: DenoiseState,
    conditions: Any,
    coefficients: Coefficients,
    start: Int[Array, ""] | int,
    stop: Int[Array, ""] | int,
    guidance_scale: Float[Array, ""] | float,
    *,
    use_fusers: bool,
    inpaint: Inpaint | None = None,
    sharding: NamedSharding | None = None,
) -> DenoiseState:
    """Runs evaluations start … stop−1 of a solver's table on every row, in one compiled loop.

    Only shapes, `eps_fn`, `use_fusers`, `sharding` and whether there is an `inpaint` decide the program.

    Args:
        eps_fn: the UNet, see the top of the file.
        params: its parameters.
        state: donated.
        conditions: tree of [rows, G, …]; G = 2 with guidance (conditional, negative), 1 without.
        coefficients: the table's.
        start: first evaluation.
        stop: end of the evaluations.
        guidance_scale: g of ε = u + g·(c − u) (classifier-free guidance); not read where G = 1.
        use_fusers: False passes alpha=None to `eps_fn`, which leaves the fusers out of the program.
        inpaint: a region to keep.
        sharding: how the rows axis is split over a mesh.
    """

    def run(params, state, conditions, coefficients, start, stop, guidance_scale, inpaint):
        groups = jax.tree.leaves(conditions)[0].shape[1]
        flat = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), conditions)

        def evaluate(i, state):
            c = jax.tree.map(lambda column: column[i], coefficients)
            x = state.latents
            if inpaint is not None:
                known = c.signal * inpaint.latents + c.sigma * inpaint.noise
                keep = jnp.where(c.blend, inpaint.keep, 0.0)
                x = keep * known + (1.0 - keep) * x
            pairs = jnp.repeat(x, groups, axis=0)
            alpha = c.alpha if use_fusers else None
            eps = eps_fn(params, pairs, jnp.broadcast_to(c.timestep, pairs.shape[:1]), flat, alpha)
            eps = eps.astype(jnp.float32).reshape(-1, groups, *x.shape[1:])
            if groups == 2:
                eps = eps[:, 1] + guidance_scale * (eps[:, 0] - eps[:, 1])
            else:
                eps = eps[:, 0]
            return DenoiseState(*update(c, x, state.anchor, state.history, eps))

        return jax.lax.fori_loop(start, stop, evaluate, state)

    numbers = jax.tree.map(jnp.asarray, (coefficients, start, stop, guidance_scale))
    arguments = (params, state, conditions, *numbers, inpaint)
    if sharding is None:
        return run(*arguments)
    # Every device runs its own rows. Left to itself XLA gathers them all wherever a network loops over its batch, as
    # attention's chunks do, and a network could not choose its chunks by the rows that it really has.
    rows, whole = sharding.spec, PartitionSpec()
    specs = (whole, rows, rows, whole, whole, whole, whole, rows)
    return jax.shard_map(run, mesh=sharding.mesh, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def merge_rows(
    latents: Float[Array, "rows h w c"],
    segment: Int[Array, "rows"],
    num_images: int,
    weights: Float[Array, "rows h2 w2 1"],
) -> Float[Array, "images h w c"]:
    """Weighted sum of each image's rows; rows of segment `num_images` (padding) take no part."""
    return jax.ops.segment_sum(weights * latents, segment, num_images)


def mean_weights(rows: Rows) -> Float[np.ndarray, "rows 1 1 1"]:
    """Weights that merge an image's rows to their plain mean, the global one included (as released)."""
    share = 1.0 / np.append(np.bincount(rows.segment[: rows.count]), 1.0)
    return share[rows.segment].astype(np.float32)[:, None, None, None]


def crop_weights(rows: Rows, height: int, width: int) -> Float[np.ndarray, "rows h w 1"]:
    """Weights that paste each instance, cropped to its box, onto its image's global latents.

    Instances are pasted in order, so a later one lies on top. Boxes are rounded (half to even) on the latent
    grid; one that is empty there, as that of an instance that has no box, is not pasted. (Paper, section 3.4;
    the official code has it switched off, with x and y exchanged.)
    """
    x0, y0, x1, y1 = np.rint(rows.boxes * [width, height, width, height]).astype(int).T[:, :, None, None]
    row, column = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    slot = rows.slot[:, None, None]
    covers = (y0 <= row) & (row < y1) & (x0 <= column) & (column < x1) | (slot == 0)
    layer = np.where(covers, slot, -1)
    top = np.full((rows.num_images + 1, height, width), -1)
    np.maximum.at(top, rows.segment, layer)
    return ((layer == top[rows.segment]) & covers).astype(np.float32)[..., None]


class Piece(NamedTuple):
    """Evaluations start … stop−1, run by one program."""

    start: int
    stop: int
    instances: bool
    use_fusers: bool


def plan_pieces(table: SolverTable, mis_steps: int) -> list[Piece]:
    """The at most three runs of `denoise`, split where the rows are merged and where α becomes 0."""
    merge, unfused = table.evaluation_of_step(mis_steps), table.fused_evaluations
    cuts = sorted({0, merge, unfused, table.evaluations})
    return [Piece(a, b, a < merge, a < unfused) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]


def count_evaluations(pieces: Sequence[Piece], images: Sequence[ImageRows], guided: bool) -> int:
    """UNet evaluations of single latents that sampling takes, padding aside."""
    rows = {True: sum(1 + len(image.instances) for image in images), False: len(images)}
    return (1 + guided) * sum(rows[piece.instances] * (piece.stop - piece.start) for piece in pieces)


def sample_rows(
    eps_fn: EpsFn,
    params: Any,
    noise: Float[Array, "images h w c"],
    conditions: dict[str, Any],
    images: Sequence[ImageRows],
    table: SolverTable,
    *,
    mis_steps: int = 0,
    guidance_scale: float = 7.5,
    merge: Literal["mean", "crop"] = "mean",
    inpaint: Inpaint | None = None,
    max_rows: int | None = None,
    sharding: NamedSharding | None = None,
    progress: Callable[[int, int], None] | None = None,
    stride: int = 5,
) -> Float[Array, "images h w c"]:
    """Samples latents for a batch of images with any numbers of instances.

    Args:
        eps_fn: the UNet, see the top of the file.
        params: its parameters; with `sharding`, already on its mesh.
        noise: where each image starts: noise, or an image noised to the table's first timestep.
        conditions: groups of trees of [unique, …].
        images: what each image is sampled under.
        table: the solver.
        mis_steps: M, the steps that instances are denoised on their own for.
        guidance_scale: 1 leaves out the unconditional entries.
        merge: how rows become one: mean, or crop-and-paste.
        inpaint: regions to keep, one an image.
        max_rows: above it rows run in chunks of one program, merged once at the end.
        sharding: splits the rows axis over a mesh, one part a device.
        progress: called from the host with the evaluations done and to do, padding aside.
        stride: evaluations between two calls of `progress`.

    Returns:
        float32 latents of each image.
    """
    guided = guidance_scale != 1
    if not any(image.instances for image in images):
        mis_steps = 0
    pieces = plan_pieces(table, mis_steps)
    done, total = 0, count_evaluations(pieces, images, guided)

    state, coefficients, scale = start_state(noise), table.coefficients, np.float32(guidance_scale)
    if sharding is None:
        devices = 1
        coefficients, scale = jax.device_put((coefficients, scale))
    else:
        devices, replicated = sharding.num_devices, NamedSharding(sharding.mesh, PartitionSpec())
        put = (state, conditions, inpaint, coefficients, scale)
        state, conditions, inpaint, coefficients, scale = jax.device_put(put, replicated)

    for phase in (True, False):
        todo = [piece for piece in pieces if piece.instances == phase]
        if not todo:
            continue
        rows = pack_rows(images, instances=phase, guided=guided, devices=devices, max_rows=max_rows)
        parts = []
        for begin in range(0, len(rows.image), rows.chunk):
            chunk = slice(begin, begin + rows.chunk)
            part, known = _gather((state, inpaint), jnp.asarray(rows.image[chunk]), sharding)
            for piece in todo:
                used = {name: tree for name, tree in conditions.items() if piece.use_fusers or name != FUSER_GROUP}
                given = _gather(used, jnp.asarray(rows.conditions[chunk]), sharding)
                for start in range(piece.start, piece.stop, stride if progress else piece.stop - piece.start):
                    stop = min(start + stride, piece.stop) if progress else piece.stop
                    part = denoise(
                        eps_fn,
                        params,
                        part,
                        given,
                        coefficients,
                        jnp.int32(start),
                        jnp.int32(stop),
                        scale,
                        use_fusers=piece.use_fusers,
                        inpaint=known,
                        sharding=sharding,
                    )
                    if progress:
                        part.latents.block_until_ready()
                        done += (1 + guided) * (stop - start) * min(rows.count - begin, rows.chunk)
                        progress(done, total)
                del given  # two pieces' conditions never sit in memory together
            parts.append(part)
        if phase:
            weights = mean_weights(rows) if merge == "mean" else crop_weights(rows, *noise.shape[1:3])
            state = _merge(parts, jnp.asarray(rows.segment), jnp.asarray(np.flatnonzero(rows.slot == 0)), weights)
        else:
            state = _first(parts, len(images))
    return state.latents


@functools.partial(jax.jit, static_argnames="sharding")
def _gather(tree: Any, index: Int[Array, "..."], sharding: NamedSharding | None) -> Any:
    taken = jax.tree.map(lambda a: a[index], tree)
    return taken if sharding is None else jax.lax.with_sharding_constraint(taken, sharding)


@jax.jit
def _merge(
    parts: list[DenoiseState],
    segment: Int[Array, "rows"],
    global_rows: Int[Array, "images"],
    weights: Float[Array, "rows h2 w2 1"],
) -> DenoiseState:
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    latents = merge_rows(rows.latents, segment, len(global_rows), weights)
    return DenoiseState(latents, rows.anchor[global_rows], rows.history[global_rows])


@functools.partial(jax.jit, static_argnames="count")
def _first(parts: list[DenoiseState], count: int) -> DenoiseState:
    return jax.tree.map(lambda *leaves: jnp.concatenate(leaves)[:count], *parts)
