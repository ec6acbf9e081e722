"""The multi-instance sampler (paper, section 3.4) as rows of one batch.

A row is one latent being denoised: an image's global one, or one instance's. For the first M steps all
rows of all images are one batch; then each image's rows are merged, and the remaining steps run on one
row an image, with the global row's solver history. Where there is no guidance, rows have no negative
entry. The UNet comes in as a function, see loop.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Float, Int

from instdiff_jax.diffusion.loop import FUSER_GROUP, DenoiseState, EpsFn, Inpaint, denoise, start_state
from instdiff_jax.diffusion.solvers import SolverTable
from instdiff_jax.parallel.rows import beside, count_devices, replicated, settled, spread, take

EXACT_ROWS = 8  # a device: up to here a batch is never padded
WASTE = 1.2  # above, a batch grows to at most this many times its rows

# Rows that run together. Before the merge: every row, or global ones and instances' apart; after it one an image.
RowSet = Literal["all", "global", "instances", "image"]


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
        conditions: unique conditions, the conditional one and the negative one.
        count: rows that are not padding; they come first.
        chunk: rows of one call of the compiled program.
    """

    image: Int[np.ndarray, "rows"]
    segment: Int[np.ndarray, "rows"]
    slot: Int[np.ndarray, "rows"]
    boxes: Float[np.ndarray, "rows 4"]
    conditions: Int[np.ndarray, "rows 2"]
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
    images: Sequence[ImageRows], which: RowSet = "all", *, devices: int = 1, max_rows: int | None = None
) -> Rows:
    """Packs images into rows.

    Args:
        images: each with any number of instances.
        which: of an image's rows; "global" and "image" are both its first one.
        devices: the size of a chunk is a multiple of this.
        max_rows: the most rows of a chunk (at least one a device); None for no bound.
    """
    rows = []
    for i, image in enumerate(images):
        boxes = list(image.boxes) or [(0.0,) * 4] * len(image.instances)
        if which != "instances":
            rows.append((i, i, 0, (0.0,) * 4, (image.layout, image.negative)))
        if which in ("all", "instances"):
            for slot, (entry, box) in enumerate(zip(image.instances, boxes, strict=True), start=1):
                rows.append((i, i, slot, box, (entry, image.negative)))
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


def join_rows(sets: Sequence[Rows]) -> Rows:
    """Sets of rows one after the other, as they are merged."""
    arrays = ("image", "segment", "slot", "boxes", "conditions")
    joined = {name: np.concatenate([getattr(rows, name) for rows in sets]) for name in arrays}
    return dataclasses.replace(sets[0], count=sum(rows.count for rows in sets), **joined)


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
    share = 1.0 / np.maximum(np.bincount(rows.segment, minlength=rows.num_images + 1), 1)
    return share[rows.segment].astype(np.float32)[:, None, None, None]


def crop_weights(rows: Rows, height: int, width: int) -> Float[np.ndarray, "rows h w 1"]:
    """Weights that paste each instance, cropped to its box, onto its image's global latents.

    Instances are pasted in order, so a later one lies on top. Boxes are rounded (half to even) on the latent
    grid; one that is empty there is not pasted. (Paper, section 3.4; the official code has it switched off, with
    x and y exchanged.)
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
    """Evaluations start … stop−1 of some rows, run by one program."""

    start: int
    stop: int
    rows: RowSet
    use_fusers: bool
    guided: bool


def plan_pieces(
    table: SolverTable,
    mis_steps: int,
    *,
    guidance_interval: Sequence[float] = (0.0, 1.0),
    mis_guidance: bool = True,
) -> list[Piece]:
    """The runs of `denoise`, split where rows are merged, where α becomes 0 and where guidance begins and ends.

    Args:
        table: the solver.
        mis_steps: M, the steps that instances are denoised on their own for.
        guidance_interval: between which fractions of the steps there is guidance (Kynkäänniemi et al. 2024, who give
            noise levels); products with the number of steps are truncated, as α's are. (0, 0) is no guidance.
        mis_guidance: False leaves the guidance out of instances' rows. The global row keeps its own: it is the one
            whose solver history goes on, and an image without instances has to be the same in any batch.
    """
    merge, unfused = table.evaluation_of_step(mis_steps), table.fused_evaluations
    first, last = (table.evaluation_of_step(int(fraction * table.steps)) for fraction in guidance_interval)
    if first == last:
        first = last = 0

    def split(rows: RowSet, start: int, stop: int, first: int = first, last: int = last) -> list[Piece]:
        cuts = sorted({start, stop, *(cut for cut in (unfused, first, last) if start < cut < stop)})
        return [Piece(a, b, rows, a < unfused, first <= a < last) for a, b in itertools.pairwise(cuts)]

    if mis_guidance or first == last:
        pieces = split("all", 0, merge)
    else:
        pieces = split("global", 0, merge) + split("instances", 0, merge, 0, 0)
    return pieces + split("image", merge, table.evaluations)


def count_evaluations(pieces: Sequence[Piece], images: Sequence[ImageRows], guided: bool = True) -> int:
    """UNet evaluations of single latents that sampling takes, padding aside; `guided`: with a scale that is not 1."""
    instances = sum(len(image.instances) for image in images)
    rows = {"all": len(images) + instances, "global": len(images), "instances": instances, "image": len(images)}
    return sum((1 + (guided and piece.guided)) * rows[piece.rows] * (piece.stop - piece.start) for piece in pieces)


def count_fresh(pieces: Sequence[Piece], images: Sequence[ImageRows], reuse: int, guided: bool = True) -> int:
    """Those of `count_evaluations` that compute deep features, where every `reuse`-th does."""
    fresh = [piece._replace(start=0, stop=-(-(piece.stop - piece.start) // reuse)) for piece in pieces]
    return count_evaluations(fresh, images, guided)


class Mark(NamedTuple):
    """Some evaluations that are to run: how many, padding aside, and an array that is ready when they are done."""

    evaluations: int
    ready: Array


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
    guidance_interval: Sequence[float] = (0.0, 1.0),
    mis_guidance: bool = True,
    merge: Literal["mean", "crop"] = "mean",
    inpaint: Inpaint | None = None,
    max_rows: int | None = None,
    sharding: NamedSharding | None = None,
    marks: list[Mark] | None = None,
    stride: int = 5,
    reuse: int = 1,
) -> Float[Array, "images h w c"]:
    """Samples latents for a batch of images with any numbers of instances; returns before they are ready.

    Args:
        eps_fn: the UNet, see the top of the file.
        params: its parameters; with `sharding`, a copy on every device of its mesh.
        noise: where each image starts: noise, or an image noised to the table's first timestep.
        conditions: groups of trees of [unique, …]; with `sharding`, split over it or still to be.
        images: what each image is sampled under.
        table: the solver.
        mis_steps: M, the steps that instances are denoised on their own for.
        guidance_scale: 1 leaves out the unconditional entries.
        guidance_interval, mis_guidance: where else they are left out, see `plan_pieces`.
        merge: how rows become one: mean, or crop-and-paste.
        inpaint: regions to keep, one an image.
        max_rows: above it rows run in chunks of one program, merged once at the end.
        sharding: splits the rows axis over a mesh, one part a device.
        marks: is given a mark for every `stride` evaluations of some rows, which then run one after the other.
        stride: evaluations between two marks.
        reuse: deep features are computed in every `reuse`-th evaluation of rows that run together, see loop.py.

    Returns:
        float32 latents of each image.
    """
    alone = not any(image.instances for image in images)
    if alone and reuse == 1:
        mis_steps = 0  # otherwise features are computed anew there, as in a batch with instances
    interval = (0.0, 0.0) if guidance_scale == 1 else guidance_interval
    pieces = plan_pieces(table, mis_steps, guidance_interval=interval, mis_guidance=mis_guidance or alone)

    # A run begins with fresh features: between marks lie whole rounds of them, so that a mark changes no result.
    stride = max(stride // reuse, 1) * reuse
    coefficients, scale = table.coefficients, np.float32(guidance_scale)
    coefficients, scale = jax.device_put((coefficients, scale), None if sharding is None else replicated(sharding))
    state = beside(params, start_state(noise))
    state, conditions, inpaint = spread((state, conditions, inpaint), sharding)
    devices = count_devices(sharding)

    finished: list[tuple[Rows, list[DenoiseState]]] = []  # before the merge
    for which, todo in itertools.groupby(pieces, lambda piece: piece.rows):
        if which == "image" and finished:
            state, finished = _merged(finished, merge, sharding), []
        todo = list(todo)
        needed = _groups(conditions, any(piece.use_fusers for piece in todo))
        rows = pack_rows(images, which, devices=devices, max_rows=max_rows)
        parts = []
        for begin in range(0, len(rows.image), rows.chunk):
            chunk = slice(begin, begin + rows.chunk)
            part, known = take((state, inpaint), rows.image[chunk], sharding)
            entries = rows.conditions[chunk]
            gathered = {kind: take(needed, entries[:, : 1 + kind], sharding) for kind in {p.guided for p in todo}}
            for piece in todo:
                given = _groups(gathered[piece.guided], piece.use_fusers)
                for start in range(piece.start, piece.stop, piece.stop - piece.start if marks is None else stride):
                    stop = piece.stop if marks is None else min(start + stride, piece.stop)
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
                        reuse=None if reuse == 1 else jnp.int32(reuse),
                    )
                    if marks is not None:
                        evaluations = (1 + piece.guided) * (stop - start) * min(rows.count - begin, rows.chunk)
                        marks.append(Mark(evaluations, _corner(part.latents)))
            parts.append(settled(part, sharding))
        finished.append((rows, parts))
    if which == "image":
        return settled(_first(settled([part.latents for part in parts], sharding), len(images)), sharding)
    return settled(_merged(finished, merge, sharding).latents[: len(images)], sharding)


def _groups(conditions: dict[str, Any], use_fusers: bool) -> dict[str, Any]:
    """The groups that are read with fusers, or without."""
    return {name: tree for name, tree in conditions.items() if use_fusers or name != FUSER_GROUP}


@jax.jit
def _corner(latents: Float[Array, "rows h w c"]) -> Float[Array, " rows"]:
    """What is ready when the latents are, and stays when they are donated."""
    return latents[:, 0, 0, 0]


def _merged(
    finished: Sequence[tuple[Rows, list[DenoiseState]]],
    merge: Literal["mean", "crop"],
    sharding: NamedSharding | None,
) -> DenoiseState:
    """The images' state from that of all their rows; over a mesh padded as `spread` does it."""
    rows = join_rows([rows for rows, _ in finished])
    parts = [part for _, parts in finished for part in parts]
    height, width = parts[0].latents.shape[1:3]
    weights = mean_weights(rows) if merge == "mean" else crop_weights(rows, height, width)
    global_rows = np.flatnonzero(rows.slot == 0)
    global_rows = np.pad(global_rows, (0, -len(global_rows) % count_devices(sharding)))
    parts = settled(parts, sharding)
    merged = _merge(parts, jnp.asarray(rows.segment), jnp.asarray(global_rows), jnp.asarray(weights), sharding)
    return settled(merged, sharding)


@functools.partial(jax.jit, static_argnames="sharding")
def _merge(
    parts: list[DenoiseState],
    segment: Int[Array, "rows"],
    global_rows: Int[Array, "images"],
    weights: Float[Array, "rows h2 w2 1"],
    sharding: NamedSharding | None,
) -> DenoiseState:
    rows = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *parts)
    latents = merge_rows(rows.latents, segment, len(global_rows), weights)
    state = DenoiseState(latents, rows.anchor[global_rows], rows.history[global_rows])
    return state if sharding is None else jax.lax.with_sharding_constraint(state, sharding)


@functools.partial(jax.jit, static_argnames="count")
def _first(parts: list[Float[Array, "rows h w c"]], count: int) -> Float[Array, "images h w c"]:
    return jnp.concatenate(parts)[:count]
