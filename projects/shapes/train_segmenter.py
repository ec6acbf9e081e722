"""Trains the segmentation network of `segmenter.py` on rendered scenes.

    python -m projects.shapes.train_segmenter --output checkpoints/shapes_segmenter --world calm

The scenes have seed 9, which no training data of the diffusion model has. Images are slightly blurred, tinted and
noised, as generated images come from an autoencoder.
"""

import argparse
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int, UInt8
from scipy.ndimage import gaussian_filter
from tqdm import tqdm

from instdiff_jax.errors import ArgumentParser, InputError, exit_on_input_error
from projects.shapes.drawing import COLOURS, SHAPES, TEXTURES
from projects.shapes.scenes import Scene, render_scene
from projects.shapes.segmenter import PixelMaps, SegmentationNetwork, Segmenter, SegmenterConfig, init_params
from projects.shapes.worlds import WORLDS, SceneSettings

TRAIN_SEED = 9
# Standard deviation in pixels of a centre's Gaussian in the heat map.
_SIGMA = 1.5


class Targets(NamedTuple):
    """What the network should predict for each pixel; `offset` points to the instance's centre, where `centre` is 1."""

    shape: Int[np.ndarray, "*b H W"]
    colour: Int[np.ndarray, "*b H W"]
    texture: Int[np.ndarray, "*b H W"]
    centre: Float[np.ndarray, "*b H W shapes"]
    offset: Float[np.ndarray, "*b H W 2"]


def scene_targets(scene: Scene) -> Targets:
    """The maps that a perfect network would predict for a scene."""
    size = scene.image.shape[0]
    shape, colour, texture = (np.zeros((size, size), np.int8) for _ in range(3))
    centre = np.zeros((size, size, len(SHAPES)), np.float16)
    offset = np.zeros((size, size, 2), np.float16)
    rows, columns = np.indices((size, size))
    for item in scene.instances:
        number = SHAPES.index(item.shape)
        shape[item.mask] = number + 1
        colour[item.mask] = list(COLOURS).index(item.colour)
        texture[item.mask] = TEXTURES.index(item.texture)
        y, x = (round(float(axis.mean())) for axis in np.nonzero(item.mask))
        offset[item.mask] = np.stack([y - rows, x - columns], -1)[item.mask]
        bump = np.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * _SIGMA**2))
        centre[..., number] = np.maximum(centre[..., number], bump)
    return Targets(shape, colour, texture, centre, offset)


def render(seed: int, count: int, size: int, settings: SceneSettings) -> tuple[UInt8[np.ndarray, "n H W 3"], Targets]:
    """Images of scenes 0 to count − 1 of a seed, and their targets."""
    images, targets = [], []
    for index in tqdm(range(count), desc="scenes", unit="scene", disable=None):
        scene = render_scene(seed, index, size, settings)
        images.append(scene.image)
        targets.append(scene_targets(scene))
    return np.stack(images), Targets(*(np.stack(part) for part in zip(*targets, strict=True)))


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


def segmentation_loss(maps: PixelMaps, targets: Targets) -> Float[Array, ""]:
    """Cross-entropy of labels and of centre heights (centres weigh more), and L1 loss of offsets."""
    inside = (targets.shape > 0).astype(jnp.float32)

    def labels(logits: Array, label: Array, weight: Array) -> Array:
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, label.astype(jnp.int32))
        return (losses * weight).sum() / jnp.maximum(weight.sum(), 1)

    centre = targets.centre.astype(jnp.float32)
    heights = optax.sigmoid_binary_cross_entropy(maps.centre, centre) * (1 + 20 * centre)
    offset = jnp.abs(maps.offset - targets.offset.astype(jnp.float32)).sum(-1)
    return (
        labels(maps.shape, targets.shape, jnp.ones_like(inside))
        + 0.5 * labels(maps.colour, targets.colour, inside)
        + 0.5 * labels(maps.texture, targets.texture, inside)
        + 10 * heights.mean()
        + 0.05 * (offset * inside).sum() / jnp.maximum(inside.sum(), 1)
    )


def train(
    images: UInt8[np.ndarray, "n H W 3"],
    targets: Targets,
    steps: int,
    batch_size: int = 24,
    seed: int = 0,
    learning_rate: float = 2e-3,
    config: SegmenterConfig = SegmenterConfig(),
) -> tuple[dict[str, Any], list[float]]:
    """Trains on rendered scenes; returns the parameters, and the loss of each step."""
    network, rng = SegmentationNetwork(config), np.random.default_rng(seed)
    params = init_params(config, jax.random.key(seed))
    rate = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(50, steps // 10 + 1), steps + 1)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-4))
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, images, targets):
        def loss(params):
            maps, _ = network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
            return segmentation_loss(maps, targets)

        value, gradient = jax.value_and_grad(loss)(params)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, value

    losses = []
    for _ in (bar := tqdm(range(steps), desc="training", unit="step", disable=None, mininterval=5)):
        chosen = rng.integers(len(images), size=batch_size)
        batch = Targets(*(part[chosen] for part in targets))
        params, state, value = step(params, state, augment(images[chosen], rng), batch)
        losses.append(float(value))
        bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)
    return jax.device_get(params), losses


def check_args(args: argparse.Namespace) -> None:
    """Raises InputError for flags out of range, or an output that cannot be written."""
    for name, least in (("scenes", 1), ("steps", 1), ("size", 32), ("seed", 0)):
        if getattr(args, name) < least:
            raise InputError(f"--{name}: expected a whole number of at least {least}, got {getattr(args, name)}")
    if args.size % 8:
        raise InputError(f"--size: expected a multiple of 8 pixels, got {args.size}")
    if args.output.exists() and not (args.output / "params.npz").exists():
        raise InputError(f"--output: {args.output}: expected a segmenter's folder, or a path that does not exist")
    try:  # before minutes of training
        args.output.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryDirectory(dir=args.output.parent).cleanup()
    except OSError as error:
        raise InputError(f"--output: {args.output}: cannot be written: {error.strerror}") from error


def main(argv: Sequence[str] | None = None) -> None:
    """The command line; see the top of this file."""
    parser = ArgumentParser(
        prog="python -m projects.shapes.train_segmenter",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--output", type=Path, required=True, help="folder to write; a segmenter there is replaced")
    parser.add_argument("--scenes", type=int, default=5000, help="scenes to train on (default 5000)")
    parser.add_argument("--steps", type=int, default=1500, help="training steps (default 1500)")
    parser.add_argument("--world", choices=WORLDS, default="varied", help="settings of the scenes (default varied)")
    parser.add_argument("--size", type=int, default=64, help="side of the images in pixels (default 64)")
    parser.add_argument("--seed", type=int, default=0, help="seed of parameters and batches (default 0)")
    argv = sys.argv[1:] if argv is None else list(argv)
    with exit_on_input_error():
        args = parser.parse_args(argv)
        check_args(args)
        images, targets = render(TRAIN_SEED, args.scenes, args.size, WORLDS[args.world])
        params, losses = train(images, targets, args.steps, seed=args.seed)
        command = f"python -m projects.shapes.train_segmenter {shlex.join(argv)}"
        Segmenter(SegmenterConfig(), params).save(args.output, {"command": command, "loss": round(losses[-1], 4)})
        print(f"wrote {args.output}: loss {losses[0]:.3f} at first, {losses[-1]:.3f} at the end")


if __name__ == "__main__":
    main()
