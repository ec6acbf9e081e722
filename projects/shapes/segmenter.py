"""A small segmentation network that finds the shapes of `data/shapes.py` in pictures: the evaluation's detector.

Every pixel says which shape, colour and texture it shows and where the centre of its instance is; a map for each shape
says where centres are. Pixels of a shape belong to the nearest centre of that shape (Panoptic-DeepLab,
arXiv 1911.10194, with centres by class as in CenterNet, so that a part and its host, whose centres coincide, stay two).
`train_segmenter.py` trains it on rendered scenes.

Axes: b batch, H W picture, h w half of it, c channels.
"""

import dataclasses
import functools
import hashlib
import json
import os
import shutil
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
from instdiff_jax.tree import flatten, unflatten
from projects.shapes.drawing import COLOURS, TEXTURES
from projects.shapes.scenes import SHAPES

# A centre's neighbourhood in pixels, the least height of one, how far off a pixel may see it, the fewest pixels.
_PEAK_WINDOW, _PEAK_HEIGHT, _REACH, _FEWEST = 5, 0.2, 6.0, 9
_CHUNK = 32
_PARTS = {
    "shape": 1 + len(SHAPES),
    "colour": len(COLOURS),
    "texture": len(TEXTURES),
    "centre": len(SHAPES),
    "offset": 2,
}


@dataclasses.dataclass(frozen=True)
class SegmenterConfig(Settings):
    """Channels at the picture's whole side, a half, a quarter and an eighth of it."""

    channels: tuple[int, ...] = (24, 32, 64, 96)


class PixelMaps(NamedTuple):
    """What the network says of each pixel: logits, heights of centres (logits too), and offsets in pixels (y, x)."""

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
    """A U-Net over half the picture's side, with one block on whole pixels; sides are multiples of 8 of them."""

    config: SegmenterConfig

    @nn.compact
    def __call__(self, image: Float[Array, "b H W 3"]) -> tuple[PixelMaps, Float[Array, "b c"]]:
        """Takes pictures in [−1, 1]; gives the pixels' maps, and the deepest features' mean over each picture."""
        whole, first, second, third = self.config.channels
        fine = _Block(first)(nn.Conv(first, (3, 3))(_space_to_depth(image)))
        middle = _Block(second)(nn.Conv(second, (3, 3), strides=2)(fine))
        coarse = nn.Conv(third, (3, 3), strides=2)(middle)
        coarse = _Block(third)(_Block(third)(coarse))
        middle = _Block(second)(jnp.concatenate([middle, _double(nn.Dense(second)(coarse))], axis=-1))
        fine = _Block(first)(jnp.concatenate([fine, _double(nn.Dense(first)(middle))], axis=-1))
        # For outlines: of the outermost pixels of real things 88% are right with it, 86% without.
        pixels = nn.Conv(whole, (3, 3))(image) + _depth_to_space(nn.Dense(4 * whole)(fine))
        maps = nn.Dense(sum(_PARTS.values()))(nn.silu(nn.GroupNorm(8)(_Block(whole)(pixels))))
        cuts = np.cumsum(list(_PARTS.values()))[:-1]
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
    """The instances of one picture.

    Args:
        maps: one picture's, without the batch axis: probabilities of shape, colour and texture, heights of centres from
            0 to 1, and offsets.

    Returns:
        Instances, the surest first. The score is the centre's height times the mean probability of its shape.
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
            if len(mine) < _FEWEST:
                continue
            mask = np.zeros(label.shape, bool)
            mask[tuple(mine.T)] = True
            (y0, x0), (y1, x1) = mine.min(0), mine.max(0) + 1
            looks = {
                "colour": tuple(COLOURS)[colour[mask].mean(0).argmax()],
                "texture": TEXTURES[texture[mask].mean(0).argmax()],
            }
            score = float(heights[tuple(point)] * shape[mask, number + 1].mean())
            found.append(Detection(name, score, (float(x0), float(y0), float(x1 - x0), float(y1 - y0)), mask, looks))
    return sorted(found, key=lambda detection: -detection.score)


@functools.partial(jax.jit, static_argnums=0)
def _find(network: SegmentationNetwork, params: Any, images: UInt8[Array, "b H W 3"]) -> PixelMaps:
    maps, _ = network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
    soft = [jax.nn.softmax(part) for part in maps[:3]]
    return PixelMaps(*soft, jax.nn.sigmoid(maps.centre), maps.offset)


@functools.partial(jax.jit, static_argnums=0)
def _describe(network: SegmentationNetwork, params: Any, images: UInt8[Array, "b H W 3"]) -> Float[Array, "b c"]:
    # The half of the network that makes maps is not in this program.
    return network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)[1]


class Segmenter:
    """A trained network as the evaluation's detector and featurizer.

    Attributes:
        fingerprint: of the files it was loaded from; empty for one that was not.
    """

    def __init__(self, config: SegmenterConfig, params: dict[str, Any], fingerprint: str = ""):
        self.config, self.params, self.fingerprint = config, params, fingerprint
        self._network = SegmentationNetwork(config)

    def detect(self, images: UInt8[np.ndarray, "b H W 3"]) -> list[list[Detection]]:
        """The instances of each picture; sides are multiples of 8 pixels."""
        found = []
        for maps, count in self._chunks(_find, images):
            found += [find_instances(PixelMaps(*(part[i] for part in maps))) for i in range(count)]
        return found

    def features(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b c"]:
        """The deepest features' mean over each picture: what the Fréchet distance compares."""
        return np.concatenate([features[:count] for features, count in self._chunks(_describe, images)])

    def _chunks(self, program: Callable, images: UInt8[np.ndarray, "b H W 3"]) -> Iterator[tuple[Any, int]]:
        """What a program gives of some pictures at a time, and of how many it is true."""
        for first in range(0, len(images), _CHUNK):
            part = np.asarray(images[first : first + _CHUNK])
            if part.shape[1] % 8 or part.shape[2] % 8:
                raise InputError(f"picture: expected sides that are multiples of 8 pixels, got {part.shape[1:3]}")
            # The last chunk is filled up: one program for any number of pictures of a size.
            padded = np.concatenate([part, np.repeat(part[-1:], _CHUNK - len(part), axis=0)])
            yield jax.device_get(program(self._network, self.params, padded)), len(part)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Loads what `save` wrote.

        Raises:
            InputError: for a folder without the two files, or with others of other sizes.
        """
        folder = Path(folder)
        try:
            values = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{folder / 'config.json'}: expected the config of a segmenter ({error})") from error
        if not isinstance(values, dict) or "network" not in values:
            raise InputError(f"{folder / 'config.json'}: network: missing")
        config = SegmenterConfig.from_dict(values["network"], f"{folder / 'config.json'}: network")
        if len(config.channels) != 4 or any(n < 8 or n % 8 for n in config.channels):
            raise InputError(
                f"{folder / 'config.json'}: network.channels: expected four multiples of 8, got {list(config.channels)}"
            )
        if values.get("classes") != _classes():
            raise InputError(f"{folder / 'config.json'}: classes: expected those of data/shapes.py")
        path = folder / "params.npz"
        try:
            with np.load(path, allow_pickle=False) as file:
                leaves = {tuple(name.split("/")): file[name].astype(np.float32) for name in file.files}
        except (OSError, ValueError, EOFError, KeyError) as error:
            raise InputError(f"{path}: expected arrays by name ({error})") from error
        except Exception as error:  # zipfile and zlib have errors of their own for damaged files.
            raise InputError(f"{path}: damaged ({type(error).__name__})") from error
        wanted = {key: leaf.shape for key, leaf in flatten(init_shapes(config)).items()}
        found = {key: leaf.shape for key, leaf in leaves.items()}
        if wanted != found:
            key = min(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
            raise InputError(f"{path}: {'/'.join(key)}: expected shape {wanted.get(key)}, got {found.get(key)}")
        files = b"".join((folder / name).read_bytes() for name in ("config.json", "params.npz"))
        return cls(config, unflatten(leaves), hashlib.sha256(files).hexdigest()[:32])

    def save(self, folder: str | Path, facts: dict[str, Any]) -> None:
        """Writes config.json, with `facts` in it, and params.npz (float16); the folder appears whole or not at all."""
        folder = Path(folder)
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        values = {"network": self.config.to_dict(), "classes": _classes(), **facts}
        (partial / "config.json").write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
        arrays = {"/".join(key): np.asarray(leaf, np.float16) for key, leaf in flatten(self.params).items()}
        np.savez(partial / "params.npz", **arrays)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)


def init_params(config: SegmenterConfig, key: jax.Array) -> dict[str, Any]:
    """Fresh parameters."""
    return SegmentationNetwork(config).init(key, jnp.zeros((1, 8, 8, 3)))["params"]


def init_shapes(config: SegmenterConfig) -> dict[str, Any]:
    """Their shapes alone."""
    return jax.eval_shape(functools.partial(init_params, config), jax.eval_shape(lambda: jax.random.key(0)))


def _classes() -> dict[str, list[str]]:
    return {"shape": list(SHAPES), "colour": list(COLOURS), "texture": list(TEXTURES)}
