"""The multi-instance sampler (InstanceDiffusion, "Multi-instance Sampler"): less attribute leakage between instances.

    1. For the first M steps, denoise each instance separately, with its own caption and location, and also the image's
       global latent, with the whole layout. All start from the image's noise, and what a stochastic solver adds on the
       way is the image's too (noise of each row's own would lose variance in the mean).
    2. Merge each image's latents into one: their mean, or each instance cropped to its box and pasted.
    3. Denoise the merged latent with the whole layout for the other steps, with the global row's solver history.

A latent being denoised is a row. All rows of all images run as one batch; rows.py packs them, plan.py says which
evaluations run on which rows. The UNet comes in as a function, see loop.py.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float, Int, UInt32

from instdiff_jax.diffusion.loop import FUSER_GROUP, DenoiseState, EpsFn, Evaluations, Inpaint, denoise, start_state
from instdiff_jax.diffusion.plan import Piece, SamplingPlan
from instdiff_jax.diffusion.rows import ImageRows, Rows, RowSet, join_rows, pack_rows
from instdiff_jax.diffusion.solvers import Coefficients
from instdiff_jax.parallel.rows import beside, count_devices, replicated, settled, spread, take

EVENT_EVALUATIONS = 5  # evaluations between two progress events


class SamplerInputs(NamedTuple):
    """What a batch of images is sampled from.

    Attributes:
        latents: each image's start: noise, or an image noised to the table's first timestep.
        conditions: groups of trees of [unique, …]; over a mesh, sharded or not.
        images: the rows of each image.
        inpaint: regions to keep, one per image.
        keys: of each image's noise on the way (`loop.noise_key`); only stochastic solvers draw it.
    """

    latents: Float[Array, "images h w c"]
    conditions: Mapping[str, Any]
    images: Sequence[ImageRows]
    inpaint: Inpaint | None = None
    keys: UInt32[np.ndarray, "images 2"] | None = None


class Placement(NamedTuple):
    """Where rows run: split over a mesh, at most `max_rows` at a time (the rest in further chunks of one program)."""

    max_rows: int | None = None
    sharding: NamedSharding | None = None


class ProgressEvent(NamedTuple):
    """Evaluations of some rows in progress.

    Attributes:
        evaluations: their number, without padding.
        ready: ready when they are; whether each row is finite.
        segment: the image that each row belongs to, see `Rows`.
        start, stop: the solver's evaluations: start … stop−1.
    """

    evaluations: int
    ready: Bool[Array, "rows"]
    segment: Int[np.ndarray, "rows"]
    start: int
    stop: int


def sample_rows(
    eps_fn: EpsFn,
    params: Any,
    inputs: SamplerInputs,
    plan: SamplingPlan,
    placement: Placement = Placement(),
    events: list[ProgressEvent] | None = None,
) -> Float[Array, "images h w c"]:
    """Samples latents for images with any number of instances each. Returns before they are ready.

    Args:
        eps_fn: the UNet, see loop.py.
        params: its parameters; over a mesh, a copy on every device.
        inputs: the images.
        plan: solver, settings and the pieces to run.
        placement: where rows run.
        events: receives an event every few evaluations of some rows, which then run one after another.

    Returns:
        float32 latents of each image.
    """
    if not any(image.instances for image in inputs.images):
        plan = plan.without_instances()
    run = _Run.on_devices(eps_fn, params, inputs, plan, placement, events)
    state = spread(beside(params, start_state(inputs.latents, inputs.keys)), placement.sharding)

    separate = [piece for piece in plan.pieces if piece.rows != "image"]
    merged = [piece for piece in plan.pieces if piece.rows == "image"]
    if separate:
        by_rows = itertools.groupby(separate, lambda piece: piece.rows)
        finished = [run.denoise_rows(which, list(pieces), state) for which, pieces in by_rows]
        state = merge_images(finished, plan.settings.merge, placement.sharding)
        del finished
    if merged:
        _, parts = run.denoise_rows("image", merged, state)
        parts = settled([part.latents for part in parts], placement.sharding)
        return settled(_first(parts, len(inputs.images)), placement.sharding)
    return settled(state.latents[: len(inputs.images)], placement.sharding)


def merge_images(
    finished: Sequence[tuple[Rows, list[DenoiseState]]], merge: Literal["mean", "crop"], sharding: NamedSharding | None
) -> DenoiseState:
    """Merges each image's rows into one state. Over a mesh, it is padded as in `spread`."""
    rows = join_rows([rows for rows, _ in finished])
    parts = settled([part for _, parts in finished for part in parts], sharding)
    height, width = parts[0].latents.shape[1:3]
    weights = mean_weights(rows) if merge == "mean" else crop_weights(rows, height, width)
    global_rows = np.flatnonzero(rows.slot == 0)
    global_rows = np.pad(global_rows, (0, -len(global_rows) % count_devices(sharding)))
    merged = _merge(parts, jnp.asarray(rows.segment), jnp.asarray(global_rows), jnp.asarray(weights), sharding)
    return settled(merged, sharding)


def merge_rows(
    latents: Float[Array, "rows h w c"],
    segment: Int[Array, "rows"],
    num_images: int,
    weights: Float[Array, "rows h2 w2 1"],
) -> Float[Array, "images h w c"]:
    """Weighted sum of each image's rows. Rows with segment `num_images` (padding) are ignored."""
    return jax.ops.segment_sum(weights * latents, segment, num_images)


def mean_weights(rows: Rows) -> Float[np.ndarray, "rows 1 1 1"]:
    """Weights of the plain mean of an image's rows, the global row included (as released)."""
    share = 1.0 / np.maximum(np.bincount(rows.segment, minlength=rows.num_images + 1), 1)
    return share[rows.segment].astype(np.float32)[:, None, None, None]


def crop_weights(rows: Rows, height: int, width: int) -> Float[np.ndarray, "rows h w 1"]:
    """Weights that paste each instance, cropped to its box, onto its image's global latent.

    Instances are pasted in order: later ones are on top. Boxes are rounded (half to even) to the latent grid; an empty
    box is not pasted. (As in the paper; in the official code it is switched off, with x and y swapped.)
    """
    x0, y0, x1, y1 = np.rint(rows.boxes * [width, height, width, height]).astype(int).T[:, :, None, None]
    row, column = np.arange(height)[None, :, None], np.arange(width)[None, None, :]
    slot = rows.slot[:, None, None]
    covers = (y0 <= row) & (row < y1) & (x0 <= column) & (column < x1) | (slot == 0)
    layer = np.where(covers, slot, -1)
    top = np.full((rows.num_images + 1, height, width), -1)
    np.maximum.at(top, rows.segment, layer)
    return ((layer == top[rows.segment]) & covers).astype(np.float32)[..., None]


@dataclasses.dataclass(frozen=True, eq=False)
class _Run:
    """One call of `sample_rows`, with its arrays on their devices."""

    eps_fn: EpsFn
    params: Any
    inputs: SamplerInputs
    plan: SamplingPlan
    placement: Placement
    coefficients: Coefficients
    guidance_scale: Float[Array, ""]
    events: list[ProgressEvent] | None

    @classmethod
    def on_devices(cls, eps_fn, params, inputs, plan, placement, events) -> "_Run":
        sharding = placement.sharding
        conditions, inpaint = spread((inputs.conditions, inputs.inpaint), sharding)
        numbers = plan.table.coefficients, np.float32(plan.settings.guidance_scale)
        numbers = jax.device_put(numbers, None if sharding is None else replicated(sharding))
        inputs = inputs._replace(conditions=conditions, inpaint=inpaint)
        return cls(eps_fn, params, inputs, plan, placement, *numbers, events)

    def denoise_rows(
        self, which: RowSet, pieces: Sequence[Piece], state: DenoiseState
    ) -> tuple[Rows, list[DenoiseState]]:
        """Runs pieces on one set of rows, chunk by chunk, from the images' state."""
        max_rows, sharding = self.placement
        rows = pack_rows(self.inputs.images, which, devices=count_devices(sharding), max_rows=max_rows)
        conditions = _select(self.inputs.conditions, any(piece.use_fusers for piece in pieces))
        parts = []
        for chunk in rows.chunks():
            part, inpaint = take((state, self.inputs.inpaint), rows.image[chunk], sharding)
            indices = rows.conditions[chunk]
            gathered = {
                guided: take(conditions, indices[:, : 1 + guided], sharding)
                for guided in {piece.guided for piece in pieces}
            }
            count = min(rows.count - chunk.start, rows.chunk)
            for piece in pieces:
                given = _select(gathered[piece.guided], piece.use_fusers)
                part = self._denoise_piece(piece, part, given, inpaint, (count, rows.segment[chunk]))
            parts.append(settled(part, sharding))
        return rows, parts

    def _denoise_piece(
        self,
        piece: Piece,
        part: DenoiseState,
        conditions: dict[str, Any],
        inpaint: Inpaint | None,
        marks: tuple[int, Int[np.ndarray, "rows"]],
    ) -> DenoiseState:
        """Runs one piece on one chunk. `marks`, for events: how many rows are not padding, and the image of each."""
        count, segment = marks
        reuse = self.plan.settings.reuse
        for start, stop in self._bounds(piece):
            evaluations = Evaluations(
                self.coefficients,
                jnp.int32(start),
                jnp.int32(stop),
                self.guidance_scale,
                None if reuse == 1 else jnp.int32(reuse),
            )
            options = dict(use_fusers=piece.use_fusers, inpaint=inpaint, sharding=self.placement.sharding)
            part = denoise(self.eps_fn, self.params, part, conditions, evaluations, **options)
            if self.events is not None:
                made = (1 + piece.guided) * (stop - start) * count
                self.events.append(ProgressEvent(made, _finite(part.latents), segment, start, stop))
        return part

    def _bounds(self, piece: Piece) -> Iterable[tuple[int, int]]:
        """The piece's evaluations, cut where there are progress events."""
        if self.events is None:
            return [(piece.start, piece.stop)]
        # Each call computes fresh features first, so cuts at multiples of `reuse` change no result.
        stride = max(EVENT_EVALUATIONS // self.plan.settings.reuse, 1) * self.plan.settings.reuse
        return itertools.pairwise([*range(piece.start, piece.stop, stride), piece.stop])


def _select(conditions: dict[str, Any], use_fusers: bool) -> dict[str, Any]:
    """The groups that the UNet reads with or without fusers."""
    return {name: tree for name, tree in conditions.items() if use_fusers or name != FUSER_GROUP}


@jax.jit
def _finite(latents: Float[Array, "rows h w c"]) -> Bool[Array, " rows"]:
    """Whether each row is finite: a small array that is ready when the latents are, and survives their donation."""
    return jnp.isfinite(latents).all(axis=(1, 2, 3))


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
    state = DenoiseState(latents, rows.anchor[global_rows], rows.history[global_rows], rows.keys[global_rows])
    return state if sharding is None else jax.lax.with_sharding_constraint(state, sharding)


@functools.partial(jax.jit, static_argnames="count")
def _first(parts: list[Float[Array, "rows h w c"]], count: int) -> Float[Array, "images h w c"]:
    return jnp.concatenate(parts)[:count]
