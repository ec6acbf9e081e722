"""A small segmentation network that finds shapes in images: the evaluation's detector.

The network predicts shape, colour, texture and the offset to the instance's centre for every pixel, and a heat map of
centres for every shape. Pixels of a shape are assigned to the nearest centre of that shape (Panoptic-DeepLab,
arXiv 1911.10194). Centres are per class, as in CenterNet: a part and its host have the same centre.
`train_segmenter.py` trains the network on rendered scenes.

Axes: b batch, H W image, h w half of it, c channels.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8
from scipy.ndimage import maximum_filter

from instdiff_jax.config import Settings
from instdiff_jax.errors import InputError
from instdiff_jax.evaluation.detect import Detection
from instdiff_jax.files import read_json, recover_folder, replace_folder, write_json
from instdiff_jax.paths import check_regular
from instdiff_jax.tree import flatten, unflatten
from projects.shapes.drawing import COLOURS, SHAPES, TEXTURES

# A centre is the highest pixel within a window of this many pixels, and at least this high.
_PEAK_WINDOW, _PEAK_HEIGHT = 5, 0.2
# A pixel belongs to a centre at most this far (in pixels) from where its offset points.
_REACH = 6.0
# Instances of fewer pixels are dropped.
_MIN_PIXELS = 9
# Images per call of a compiled program.
_CHUNK = 32
_CHANNELS = {
    "shape": 1 + len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "centre": len(SHAPES),
    "offset": 2,
}


@dataclasses.dataclass(frozen=True)
class SegmenterConfig(Settings):
    """Channels at full, 1/2, 1/4 and 1/8 resolution."""

    channels: tuple[int, ...] = (24, 32, 64, 96)


class PixelMaps(NamedTuple):
    """Per pixel: logits of shape, colour, texture and centres, and the offset (y, x) to the centre in pixels."""

    shape: Float[Array, "b H W shapes+1"]
    colour: Float[Array, "b H W colours"]
    texture: Float[Array, "b H W textures"]
    centre: Float[Array, "b H W shapes"]
    offset: Float[Array, "b H W 2"]


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    channels: int

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w c"]:
        y = nn.Conv(self.channels, (3, 3))(nn.silu(nn.GroupNorm(8)(x)))
        y = nn.Conv(self.channels, (3, 3))(nn.silu(nn.GroupNorm(8)(y)))
        return (x if x.shape[-1] == self.channels else nn.Dense(self.channels)(x)) + y


class SegmentationNetwork(nn.Module):
    """A U-Net at half resolution, with one block at full resolution. Sides must be multiples of 8 pixels."""

    config: SegmenterConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b H W 3"]) -> tuple[PixelMaps, Float[Array, "b c"]]:
        """Takes images in [−1, 1]; returns the maps, and the mean of each image's deepest features."""
        whole, first, second, third = self.config.channels
        fine = _Block(first)(nn.Conv(first, (3, 3))(_space_to_depth(image)))
        middle = _Block(second)(nn.Conv(second, (3, 3), strides=2)(fine))
        coarse = nn.Conv(third, (3, 3), strides=2)(middle)
        coarse = _Block(third)(_Block(third)(coarse))
        middle = _Block(second)(jnp.concatenate([middle, _double(nn.Dense(second)(coarse))], axis=-1))
        fine = _Block(first)(jnp.concatenate([fine, _double(nn.Dense(first)(middle))], axis=-1))
        # For outlines: 88% of the outermost pixels of real instances are right with this block, 86% without.
        pixels = nn.Conv(whole, (3, 3))(image) + _depth_to_space(nn.Dense(4 * whole)(fine))
        maps = nn.Dense(sum(_CHANNELS.values()))(nn.silu(nn.GroupNorm(8)(_Block(whole)(pixels))))
        cuts = np.cumsum(list(_CHANNELS.values()))[:-1]
        return PixelMaps(*jnp.split(maps, cuts, axis=-1)), coarse.mean((1, 2))


def _space_to_depth(x: Float[Array, "b H W c"]) -> Float[Array, "b h w 4*c"]:
    b, height, width, c = x.shape
    x = x.reshape(b, height // 2, 2, width // 2, 2, c)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, height // 2, width // 2, 4 * c)


def _depth_to_space(x: Float[Array, "b h w 4*c"]) -> Float[Array, "b H W c"]:
    b, height, width, c = x.shape
    x = x.reshape(b, height, width, 2, 2, c // 4)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(b, 2 * height, 2 * width, c // 4)


def _double(x: Float[Array, "b h w c"]) -> Float[Array, "b 2*h 2*w c"]:
    return x.repeat(2, axis=1).repeat(2, axis=2)


def find_instances(maps: PixelMaps) -> list[Detection]:
    """The instances of one image.

    Args:
        maps: of one image, without the batch axis: probabilities of shape, colour and texture, centre heights from 0 to
            1, and offsets.

    Returns:
        Instances, highest score first. The score is the centre's height times the mean probability of its shape.
    """
    shape, colour, texture, centre, offset = (np.asarray(part) for part in maps)
    label = shape.argmax(-1)
    rows, columns = np.indices(label.shape)
    seen = np.stack([rows + offset[..., 0], columns + offset[..., 1]], axis=-1)
    found = []
    for number, name in enumerate(SHAPES):
        heights = centre[..., number]
        pixels = np.argwhere(label == number + 1)
        if not len(pixels) or heights.max() < _PEAK_HEIGHT:
            continue
        peaks = (heights == maximum_filter(heights, _PEAK_WINDOW)) & (heights >= _PEAK_HEIGHT)
        points = np.argwhere(peaks)
        distance = np.linalg.norm(seen[tuple(pixels.T)][:, None] - points[None], axis=-1)
        nearest = np.where(distance.min(1) <= _REACH, distance.argmin(1), -1)
        for k, point in enumerate(points):
            mine = pixels[nearest == k]
            if len(mine) < _MIN_PIXELS:
                continue
            mask = np.zeros(label.shape, bool)
            mask[tuple(mine.T)] = True
            (y0, x0), (y1, x1) = mine.min(0), mine.max(0) + 1
            attributes = {
                "colour": tuple(COLOURS)[colour[mask].mean(0).argmax()],
                "texture": TEXTURES[texture[mask].mean(0).argmax()],
            }
            score = float(heights[tuple(point)] * shape[mask, number + 1].mean())
            box = (float(x0), float(y0), float(x1 - x0), float(y1 - y0))
            found.append(Detection(name, score, box, mask, attributes))
    return sorted(found, key=lambda detection: -detection.score)


@functools.partial(jax.jit, static_argnums=0)
def _find(network: SegmentationNetwork, params: Any, images: UInt8[Array, "b H W 3"]) -> PixelMaps:
    maps, _ = network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
    soft = [jax.nn.softmax(part) for part in maps[:3]]
    return PixelMaps(*soft, jax.nn.sigmoid(maps.centre), maps.offset)


@functools.partial(jax.jit, static_argnums=0)
def _describe(network: SegmentationNetwork, params: Any, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b c"]:
    # The compiler removes the half of the network that makes the maps.
    return network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)[1]


class Segmenter:
    """A trained network, as a detector and featurizer for the evaluation.

    Attributes:
        fingerprint: of the files it was loaded from; empty if it was not loaded.
    """

    def __init__(self, config: SegmenterConfig, params: dict[str, Any], fingerprint: str = ""):
        self.config, self.params, self.fingerprint = config, params, fingerprint
        self._network = SegmentationNetwork(config)

    def detect(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[list[Detection]]:
        """The instances of each image. Sides must be multiples of 8 pixels."""
        found = []
        for maps, count in self._chunks(_find, images):
            found += [find_instances(PixelMaps(*(part[i] for part in maps))) for i in range(count)]
        return found

    def features(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b c"]:
        """The mean of each image's deepest features, for the Fréchet distance."""
        return np.concatenate([features[:count] for features, count in self._chunks(_describe, images)])

    def _chunks(self, program: Callable, images: UInt8[np.ndarray, "b H W 3"]) -> Iterator[tuple[Any, int]]:
        """Runs a program on chunks of images; yields its output and the number of images in the chunk."""
        for first in range(0, len(images), _CHUNK):
            part = np.asarray(images[first : first + _CHUNK])
            if part.shape[1] % 8 or part.shape[2] % 8:
                raise InputError(f"image: expected sides that are multiples of 8 pixels, got {part.shape[1:3]}")
            # The last chunk is padded, so that one program serves any number of images.
            padded = np.concatenate([part, np.repeat(part[-1:], _CHUNK - len(part), axis=0)])
            yield jax.device_get(program(self._network, self.params, padded)), len(part)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Loads a folder that `save` wrote.

        Raises:
            InputError: if a file is missing or damaged, or its shapes do not fit the config.
        """
        folder = Path(folder)
        recover_folder(folder)
        config = _read_config(folder / "config.json")
        leaves = _read_arrays(folder / "params.npz")
        expected = {key: leaf.shape for key, leaf in flatten(init_shapes(config)).items()}
        found = {key: leaf.shape for key, leaf in leaves.items()}
        if expected != found:
            key = min(key for key in {*expected, *found} if expected.get(key) != found.get(key))
            where = f"{folder / 'params.npz'}: {'/'.join(key)}"
            raise InputError(f"{where}: expected shape {expected.get(key)}, got {found.get(key)}")
        files = b"".join((folder / name).read_bytes() for name in ("config.json", "params.npz"))
        return cls(config, unflatten(leaves), hashlib.sha256(files).hexdigest()[:32])

    def save(self, folder: str | Path, facts: dict[str, Any]) -> None:
        """Writes config.json (with `facts` added) and params.npz (float16), replacing the folder as a whole."""
        arrays = {"/".join(key): np.asarray(leaf, np.float16) for key, leaf in flatten(self.params).items()}
        with replace_folder(folder) as new:
            write_json(new / "config.json", {"network": self.config.to_dict(), "classes": _classes(), **facts})
            np.savez(new / "params.npz", **arrays)


def _read_config(path: Path) -> SegmenterConfig:
    values = read_json(path)
    if not isinstance(values, dict) or "network" not in values:
        raise InputError(f"{path}: network: missing; expected the config of a segmenter")
    config = SegmenterConfig.from_dict(values["network"], f"{path}: network")
    if len(config.channels) != 4 or any(n < 8 or n % 8 for n in config.channels):
        raise InputError(f"{path}: network.channels: expected four multiples of 8, got {list(config.channels)}")
    if values.get("classes") != _classes():
        raise InputError(f"{path}: classes: expected the shapes, colours and textures of projects/shapes/drawing.py")
    return config


def _read_arrays(path: Path) -> dict[tuple[str, ...], Float[np.ndarray, "..."]]:
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {tuple(name.split("/")): file[name].astype(np.float32) for name in file.files}
    except Exception as error:  # zipfile and zlib have errors of their own for damaged files
        raise InputError(f"{path}: expected arrays as np.savez writes them ({error})") from error


def init_params(config: SegmenterConfig, key: jax.Array) -> dict[str, Any]:
    """Random initial parameters."""
    return SegmentationNetwork(config).init(key, jnp.zeros((1, 8, 8, 3)))["params"]


def init_shapes(config: SegmenterConfig) -> dict[str, Any]:
    """The shapes of the parameters."""
    return jax.eval_shape(functools.partial(init_params, config), jax.eval_shape(lambda: jax.random.key(0)))


def _classes() -> dict[str, list[str]]:
    return {"shape": list(SHAPES), "colour": list(COLOURS), "texture": list(TEXTURES)}
