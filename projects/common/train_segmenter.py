"""Trains the network of `segmentation_network.py`, the detector's, on rendered scenes of any world.

The scenes have seed 9, which no training data of the diffusion models has. Images are slightly blurred, tinted and
noised, as generated images come from an autoencoder. Every 200 steps the state is saved beside the output; the same
command goes on from there.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from instdiff_jax.config import Settings
from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from instdiff_jax.files import write_file
from instdiff_jax.parallel.runtime import keep_step_memory
from projects.common.coco_folder import Picture, World
from projects.common.segmentation_network import (
    Classes,
    PixelMaps,
    SegmentationNetwork,
    SegmenterConfig,
    init_params,
    scale_of,
)
from projects.common.segmenter import Segmenter

TRAIN_SEED = 9
# Standard deviation in pixels of a centre's Gaussian in the heat map, in images of 64 pixels or less.
_SIGMA = 1.5
# Largest number of instances of a scene.
_MOST = 32
_SAVE_EVERY = 200


class Scenes(NamedTuple):
    """What is known of rendered scenes, in little memory.

    Attributes:
        owner: 0 for the background, else 1 + index of the instance.
        category: of each instance.
        attributes: of each instance and kind; −1 where it has none.
        centre: (y, x) of each instance in pixels; far outside for those that do not exist.
    """

    owner: UInt8[np.ndarray, "*b H W"]
    category: Int[np.ndarray, "*b n"]
    attributes: Int[np.ndarray, "*b kinds n"]
    centre: Int[np.ndarray, "*b n 2"]


class Targets(NamedTuple):
    """What a perfect network predicts for each pixel: labels (−1: anything), centre heights, and offsets (y, x)."""

    category: Int[Array, "b H W"]
    attributes: Int[Array, "b kinds H W"]
    centre: Float[Array, "b H W categories"]
    offset: Float[Array, "b H W 2"]


def describe(picture: Picture, classes: Classes) -> Scenes:
    """One scene."""
    owner = np.zeros(picture.image.shape[:2], np.uint8)
    category, centre = np.zeros(_MOST, np.int16), np.full((_MOST, 2), -10_000, np.int16)
    attributes = np.full((len(classes) - 1, _MOST), -1, np.int8)
    for k, row in enumerate(picture.rows):
        owner[row.mask] = k + 1
        category[k] = classes[0][1].index(row.category)
        centre[k] = [round(float(axis.mean())) for axis in np.nonzero(row.mask)]
        for i, (kind, names) in enumerate(classes[1:]):
            attributes[i, k] = names.index(row.attributes[kind]) if kind in row.attributes else -1
    return Scenes(owner, category, attributes, centre)


def thin_out(owner: UInt8[np.ndarray, "b H W"], stride: int, rng: np.random.Generator) -> UInt8[np.ndarray, "b h w"]:
    """One pixel of each stride × stride square; which one of them is drawn for each image.

    An instance has it as often as it covers the square, so maps that are interpolated have their outlines in the right
    place.
    """
    corners = rng.integers(stride, size=(len(owner), 2))
    return np.stack([one[y::stride, x::stride] for one, (y, x) in zip(owner, corners, strict=True)])


def make_targets(scenes: Scenes, categories: int, stride: int = 1) -> Targets:
    """The maps of a batch of scenes, whose `owner` has every `stride`-th pixel; offsets are in pixels of the image."""
    owner = jnp.asarray(scenes.owner, jnp.int32)
    b, height, width = owner.shape
    rows, columns = (stride * jnp.arange(side) + (stride - 1) / 2 for side in (height, width))
    rows, columns = rows[:, None], columns[None]
    batch, inside = jnp.arange(b)[:, None, None], owner > 0
    own = jnp.maximum(owner - 1, 0)
    centre = jnp.asarray(scenes.centre, jnp.float32)
    offset = centre[batch, own] - jnp.stack(jnp.broadcast_arrays(rows, columns), -1)
    width2 = 2 * (_SIGMA * scale_of(stride * max(height, width))) ** 2
    y, x = centre[..., 0, None, None], centre[..., 1, None, None]
    bumps = jnp.exp(-((rows - y) ** 2 + (columns - x) ** 2) / width2)
    category = jnp.asarray(scenes.category, jnp.int32)
    heights = jnp.zeros((b, categories, height, width)).at[jnp.arange(b)[:, None], category].max(bumps)
    kinds = [jnp.where(inside, kind[batch, own], -1) for kind in jnp.moveaxis(jnp.asarray(scenes.attributes), 1, 0)]
    attributes = jnp.stack(kinds, 1) if kinds else jnp.zeros((b, 0, height, width), jnp.int8)
    label = jnp.where(inside, category[batch, own] + 1, 0)
    return Targets(label, attributes, heights.transpose(0, 2, 3, 1), jnp.where(inside[..., None], offset, 0))


def render(
    world: World, classes: Classes, seed: int, count: int, size: int, settings: Settings
) -> tuple[UInt8[np.ndarray, "n H W 3"], Scenes]:
    """Images of scenes 0 to count − 1 of a seed, and what is known of them."""
    images, scenes = [], []
    for index in tqdm(range(count), desc="scenes", unit="scene", disable=None):
        picture = world.render(seed, index, size, settings)
        images.append(picture.image)
        scenes.append(describe(picture, classes))
    return np.stack(images), Scenes(*(np.stack(part) for part in zip(*scenes, strict=True)))


def augment(images: UInt8[np.ndarray, "b H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "b H W 3"]:
    """Blurs, tints and noises each image a little."""
    out = []
    for image in images.astype(np.float32):
        blur = max(float(rng.uniform(-0.4, 1.0)), 0.0)
        if blur:
            image = gaussian_filter(image, (blur, blur, 0))
        image = image * rng.uniform(0.92, 1.08, 3) + rng.uniform(-10, 10, 3)
        out.append(image + rng.normal(0, rng.uniform(0, 8), image.shape))
    return np.clip(np.stack(out), 0, 255).astype(np.uint8)


def segmentation_loss(maps: PixelMaps, targets: Targets, stride: int = 1) -> Float[Array, ""]:
    """Cross-entropy of labels and of centre heights (centres weigh more), and L1 loss of offsets.

    Args:
        maps, targets: of a batch.
        stride: pixels of the image to one of the maps.
    """
    inside = (targets.category > 0).astype(jnp.float32)

    def labels(logits: Array, label: Array, weight: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(label, 0).astype(jnp.int32))
        return (losses * weight).sum() / jnp.maximum(weight.sum(), 1)

    heights = optax.sigmoid_binary_cross_entropy(maps.centre, targets.centre) * (1 + 20 * targets.centre)
    offset = jnp.abs(maps.offset - targets.offset).sum(-1) / scale_of(stride * max(targets.category.shape[1:]))
    attributes = [
        labels(logits, targets.attributes[:, k], (targets.attributes[:, k] >= 0).astype(jnp.float32))
        for k, logits in enumerate(maps.attributes)
    ]
    return (
        labels(maps.category, targets.category, jnp.ones_like(inside))
        + 0.5 * sum(attributes, jnp.zeros(()))
        # Ten shapes had this weight; each category has its own map.
        + maps.centre.shape[-1] * heights.mean()
        + 0.05 * (offset * inside).sum() / jnp.maximum(inside.sum(), 1)
    )


class Training(NamedTuple):
    """How long to train, and with what."""

    steps: int
    batch_size: int = 24
    seed: int = 0
    learning_rate: float = 2e-3
    dtype: str = "float32"


def train(
    images: UInt8[np.ndarray, "n H W 3"],
    scenes: Scenes,
    config: SegmenterConfig,
    training: Training,
    state_file: Path | None = None,
) -> tuple[dict[str, Any], list[float]]:
    """Trains on rendered scenes; returns the parameters, and the loss of each step of this call.

    With `state_file`, the state is saved there every 200 steps, and training goes on from it.
    """
    steps, batch_size, seed, peak, dtype = training
    network, categories = SegmentationNetwork(config, jnp.dtype(dtype)), len(config.classes[0][1])
    params = init_params(config, jax.random.key(seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, peak, min(50, steps // 10 + 1), steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))
    state, first = (params, optimizer.init(params)), 0
    if state_file is not None and state_file.exists():
        first, state = _read_state(state_file, state)

    @jax.jit
    def step(state, images, scenes):
        def loss(params):
            maps, _ = network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
            return segmentation_loss(maps, make_targets(scenes, categories, config.stride), config.stride)

        value, gradient = jax.value_and_grad(loss)(state[0])
        updates, adam = optimizer.update(gradient, state[1], state[0])
        return (optax.apply_updates(state[0], updates), adam), value

    losses = []
    for number in (bar := tqdm(range(first, steps), desc="training", unit="step", disable=None, mininterval=5)):
        rng = np.random.default_rng((seed, number))
        chosen = rng.integers(len(images), size=batch_size)
        batch = Scenes(*(part[chosen] for part in scenes))
        pictures = augment(images[chosen], rng)
        if config.stride > 1:
            batch = batch._replace(owner=thin_out(batch.owner, config.stride, rng))
        state, value = step(state, pictures, batch)
        losses.append(float(value))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
        if state_file is not None and (number + 1) % _SAVE_EVERY == 0:
            saved = flax.serialization.to_bytes((number + 1, jax.device_get(state)))
            write_file(state_file, lambda file, saved=saved: file.write(saved))
    return jax.device_get(state[0]), losses


def _read_state(path: Path, like: Any) -> tuple[int, Any]:
    try:
        number, state = flax.serialization.from_bytes((0, like), path.read_bytes())
    except Exception as error:  # msgpack and flax have errors of their own
        raise InputError(f"{path}: expected the state of this training ({error}); remove it to start anew") from error
    shapes = [jax.tree.map(np.shape, tree) for tree in (like, state)]
    if shapes[0] != shapes[1]:
        raise InputError(f"{path}: expected the state of a network of this size; remove it to start anew")
    return int(number), state


def check_args(args: argparse.Namespace, multiple: int) -> None:
    """Raises InputError for flags out of range, or an output that cannot be written."""
    for name, least in (("scenes", 1), ("steps", 1), ("size", 32), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name}: expected a whole number of at least {least}, got {getattr(args, name)}")
    if args.size % multiple:
        raise InputError(f"--size: expected a multiple of {multiple} pixels, got {args.size}")
    if args.output.exists() and not (args.output / "params.npz").exists():
        raise InputError(f"--output: {args.output}: expected a segmenter's folder, or a path that does not exist")
    try:  # before minutes of training
        args.output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=args.output.parent).cleanup()
    except OSError as error:
        raise InputError(f"--output: {args.output}: cannot be written: {error.strerror}") from error


def training_parser(module: str, worlds: Mapping[str, Settings], size: int) -> ArgumentParser:
    """The flags that all worlds have; `size` is the default side of the images in pixels."""
    parser = ArgumentParser(
        prog=f"python -m {module}", description="Train the detector on rendered scenes", allow_abbrev=False
    )
    default = next(iter(worlds))
    parser.add_argument("--output", type=Path, required=True, help="folder to write; a segmenter there is replaced")
    parser.add_argument("--scenes", type=int, default=5000, help="scenes to train on (default 5000)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default 1500)")
    parser.add_argument("--world", choices=worlds, default=default, help=f"settings of the scenes (default {default})")
    parser.add_argument("--size", type=int, default=size, help=f"side of the images in pixels (default {size})")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and batches (default 0)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the wide layers")
    return parser


def run(
    parser: ArgumentParser,
    argv: Sequence[str] | None,
    worlds: Mapping[str, Settings],
    config: SegmenterConfig,
    find_world: Callable[[argparse.Namespace], World],
) -> None:
    """Trains as the flags say and writes the folder.

    Args:
        parser: of `training_parser`, perhaps with more flags.
        argv: the flags; those of the process by default.
        worlds: settings of scenes by name.
        config: of the network.
        find_world: parsed flags → the world that renders scenes.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    keep_step_memory()
    with exit_on_input_error():
        args = parser.parse_args(argv)
        check_args(args, config.multiple)
        world = find_world(args)
        images, scenes = render(world, config.classes, TRAIN_SEED, args.scenes, args.size, worlds[args.world])
        state_file = args.output.with_name(f"{args.output.name}.training")
        params, losses = train(
            images, scenes, config, Training(args.steps, seed=args.seed, dtype=args.dtype), state_file
        )
        facts = {"command": f"{parser.prog} {shlex.join(argv)}", "loss": round(losses[-1], 4) if losses else None}
        Segmenter(config, params).save(args.output, facts)
        state_file.unlink(missing_ok=True)
        print(f"wrote {args.output}: loss {facts['loss']}")
