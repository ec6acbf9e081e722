"""A small segmentation network that finds the instances of rendered scenes: the evaluation's detector.

The network predicts category, attributes (such as colour) and the offset to the instance's centre for every pixel, and
a heat map of centres for every category. Pixels of a category are assigned to the nearest centre of that category
(Panoptic-DeepLab, arXiv 1911.10194). Centres are per category, as in CenterNet: a part and its host have the same
centre. `train_segmenter.py` trains the network on rendered scenes. Its folder names the categories and attributes.

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
from instdiff_jax.models.layers import Conv, Dense
from instdiff_jax.paths import check_regular
from instdiff_jax.tree import flatten, unflatten

# In images of 64 pixels or less, and in proportion in larger ones: a centre is the highest pixel at most 2 pixels away,
# and a pixel belongs to a centre at most 6 pixels from where its offset points.
_NEAR, _REACH = 2, 6.0
# A centre is at least this high.
_PEAK_HEIGHT = 0.2
# Instances of fewer pixels are dropped.
_MIN_PIXELS = 9
# Images per call of a compiled program.
_CHUNK = 32

# Kinds and their names. The first kind is the category, the others are attributes.
Classes = tuple[tuple[str, tuple[str, ...]], ...]


@dataclasses.dataclass(frozen=True)
class _Sizes(Settings):
    channels: tuple[int, ...] = (24, 32, 64, 96)
    outlines: bool = True


class SegmenterConfig(NamedTuple):
    """What the network tells apart, and its sizes.

    Attributes:
        classes: kinds and their names.
        channels: at full, 1/2, 1/4, ... resolution (three levels or more).
        outlines: a last block at full resolution makes the maps. Without it they are made at half resolution, at a
            fraction of the work, and interpolated.
    """

    classes: Classes
    channels: tuple[int, ...] = (24, 32, 64, 96)
    outlines: bool = True

    @property
    def outputs(self) -> tuple[int, ...]:
        """Channels of the maps: category and background, each attribute, centres, and the offset."""
        categories, *attributes = (len(names) for _, names in self.classes)
        return (1 + categories, *attributes, categories, 2)

    @property
    def stride(self) -> int:
        """Pixels of the image to one of the maps, along each side."""
        return 1 if self.outlines else 2

    @property
    def multiple(self) -> int:
        """Sides of images must be multiples of this many pixels."""
        return 2 ** (len(self.channels) - 1)


class PixelMaps(NamedTuple):
    """Per pixel: logits of categories, attributes and centres, and the offset (y, x) to the centre in image pixels."""

    category: Float[Array, "b H W categories+1"]
    attributes: tuple[Float[Array, "b H W values"], ...]
    centre: Float[Array, "b H W categories"]
    offset: Float[Array, "b H W 2"]


def scale_of(side: int) -> float:
    """How much wider distances are than in images of 64 pixels."""
    return max(1.0, side / 64)


class GroupNorm(nn.Module):
    """`nn.GroupNorm` of 8 groups with its parameters and numbers, in two thirds of its time on a CPU.

    Sums over space come first, so channels stay the minor axis; statistics are float32.
    """

    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        flat = x.astype(jnp.float32).reshape(len(x), -1, channels)

        def mean(values: Float[Array, "b n c"]) -> Float[Array, "b 1 c"]:
            groups = values.mean(axis=1).reshape(len(x), 8, -1).mean(axis=2)
            return jnp.repeat(groups, channels // 8, axis=1)[:, None]

        centre = mean(flat)
        factor = jax.lax.rsqrt(jnp.maximum(mean(jnp.square(flat)) - jnp.square(centre), 0) + 1e-6) * scale
        return (flat * factor + (bias - centre * factor)).reshape(x.shape).astype(self.dtype)


class _Block(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x))))))."""

    channels: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x: Float[Array, "b h w in"]) -> Float[Array, "b h w c"]:
        dtype = self.dtype
        y = Conv(self.channels, (3, 3), dtype=dtype)(nn.silu(GroupNorm(dtype)(x)))
        y = Conv(self.channels, (3, 3), dtype=dtype)(nn.silu(GroupNorm(dtype)(y)))
        return (x if x.shape[-1] == self.channels else Dense(self.channels, dtype=dtype)(x)) + y


class SegmentationNetwork(nn.Module):
    """A U-Net from half resolution down, with one block at full resolution if `config.outlines`.

    Its wide layers compute in `dtype`; maps and features are float32. One pixel of the maps stands for `config.stride`
    of the image along each side; offsets are in pixels of the image.
    """

    config: SegmenterConfig
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, image: Float[Array, "b H W 3"]) -> tuple[PixelMaps, Float[Array, "b c"]]:
        """Takes images in [−1, 1]; returns the maps, and the mean of each image's deepest features."""
        (whole, *levels, deepest), dtype = self.config.channels, self.dtype
        # Few channels and strides of 2 stay in float32: XLA is slow with them in bfloat16 on a CPU.
        x = _Block(levels[0], dtype)(nn.Conv(levels[0], (3, 3))(_space_to_depth(image)))
        skips = [x]
        for channels in levels[1:]:
            x = _Block(channels, dtype)(nn.Conv(channels, (3, 3), strides=2, dtype=jnp.float32)(x))
            skips.append(x)
        x = nn.Conv(deepest, (3, 3), strides=2, dtype=jnp.float32)(x)
        # Named in this order, as in the folders that exist: the second one is applied first.
        last, first = _Block(deepest, dtype), _Block(deepest, dtype)
        coarse = x = last(first(x))
        for channels, skip in zip(reversed(levels), reversed(skips), strict=True):
            x = jnp.concatenate([skip, _double(Dense(channels, dtype=dtype)(x))], axis=-1)
            x = _Block(channels, dtype)(x)
        if self.config.outlines:
            # For outlines: 88% of the outermost pixels of real shapes are right with this block, 86% without.
            x = _depth_to_space(Dense(4 * whole, dtype=dtype)(x))
            x = _Block(whole, dtype)(nn.Conv(whole, (3, 3))(image) + x)
        maps = Dense(sum(self.config.outputs), dtype=dtype)(nn.silu(GroupNorm(dtype)(x)))
        parts = jnp.split(maps.astype(jnp.float32), np.cumsum(self.config.outputs)[:-1], axis=-1)
        category, *attributes, centre, offset = parts
        return PixelMaps(category, tuple(attributes), centre, offset), coarse.astype(jnp.float32).mean((1, 2))


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


def find_instances(maps: PixelMaps, classes: Classes) -> list[Detection]:
    """The instances of one image.

    Args:
        maps: of one image, without the batch axis: probabilities of category and attributes, centre heights from 0 to
            1, and offsets.
        classes: what the channels mean.

    Returns:
        Instances, highest score first. The score is the centre's height times the mean probability of its category.
    """
    category, attributes, centre, offset = jax.tree.map(np.asarray, maps)
    scale = scale_of(max(category.shape[:2]))
    window = 2 * round(_NEAR * scale) + 1
    label = category.argmax(-1)
    rows, columns = np.indices(label.shape)
    seen = np.stack([rows + offset[..., 0], columns + offset[..., 1]], axis=-1)
    found = []
    for number, name in enumerate(classes[0][1]):
        heights = centre[..., number]
        pixels = np.argwhere(label == number + 1)
        if not len(pixels) or heights.max() < _PEAK_HEIGHT:
            continue
        peaks = (heights == maximum_filter(heights, window)) & (heights >= _PEAK_HEIGHT)
        points = np.argwhere(peaks)
        distance = np.linalg.norm(seen[tuple(pixels.T)][:, None] - points[None], axis=-1)
        nearest = np.where(distance.min(1) <= _REACH * scale, distance.argmin(1), -1)
        for k, point in enumerate(points):
            mine = pixels[nearest == k]
            if len(mine) < _MIN_PIXELS:
                continue
            mask = np.zeros(label.shape, bool)
            mask[tuple(mine.T)] = True
            (y0, x0), (y1, x1) = mine.min(0), mine.max(0) + 1
            named = {
                kind: names[values[mask].mean(0).argmax()]
                for (kind, names), values in zip(classes[1:], attributes, strict=True)
            }
            score = float(heights[tuple(point)] * category[mask, number + 1].mean())
            box = (float(x0), float(y0), float(x1 - x0), float(y1 - y0))
            found.append(Detection(name, score, box, mask, named))
    return sorted(found, key=lambda detection: -detection.score)


def enlarge(maps: PixelMaps, size: tuple[int, int]) -> PixelMaps:
    """The maps of a batch, interpolated to this height and width."""
    return jax.tree.map(lambda part: jax.image.resize(part, (len(part), *size, part.shape[-1]), "linear"), maps)


@functools.partial(jax.jit, static_argnums=0)
def _find(network: SegmentationNetwork, params: Any, images: UInt8[Array, "b H W 3"]) -> PixelMaps:
    maps, _ = network.apply({"params": params}, images.astype(jnp.float32) / 127.5 - 1)
    maps = enlarge(maps, images.shape[1:3])
    soft = jax.tree.map(jax.nn.softmax, (maps.category, maps.attributes))
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
        """The instances of each image. Sides must be multiples of `config.multiple` pixels."""
        found = []
        for maps, count in self._chunks(_find, images):
            ones = (jax.tree.map(lambda part, i=i: part[i], maps) for i in range(count))
            found += [find_instances(one, self.config.classes) for one in ones]
        return found

    def features(self, images: UInt8[np.ndarray, "b H W 3"]) -> Float[np.ndarray, "b c"]:
        """The mean of each image's deepest features, for the Fréchet distance."""
        return np.concatenate([features[:count] for features, count in self._chunks(_describe, images)])

    def _chunks(self, program: Callable, images: UInt8[np.ndarray, "b H W 3"]) -> Iterator[tuple[Any, int]]:
        """Runs a program on chunks of images; yields its output and the number of images in the chunk."""
        for first in range(0, len(images), _CHUNK):
            part = np.asarray(images[first : first + _CHUNK])
            least = self.config.multiple
            if part.shape[1] % least or part.shape[2] % least:
                raise InputError(f"image: expected sides that are multiples of {least} pixels, got {part.shape[1:3]}")
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
            sizes = {"channels": self.config.channels, "outlines": self.config.outlines}
            known = {"network": sizes, "classes": dict(self.config.classes)}
            write_json(new / "config.json", known | facts)
            np.savez(new / "params.npz", **arrays)


def _read_config(path: Path) -> SegmenterConfig:
    values = read_json(path)
    if not isinstance(values, dict) or "network" not in values:
        raise InputError(f"{path}: network: missing; expected the config of a segmenter")
    sizes = _Sizes.from_dict(values["network"], f"{path}: network")
    channels = sizes.channels
    if len(channels) < 3 or any(n < 8 or n % 8 for n in channels):
        raise InputError(f"{path}: network.channels: expected three multiples of 8 or more, got {list(channels)}")
    classes = values.get("classes")
    if not isinstance(classes, dict) or not classes or not all(_are_names(names) for names in classes.values()):
        raise InputError(f"{path}: classes: expected lists of names by kind, as a segmenter's folder has them")
    return SegmenterConfig(tuple((kind, tuple(names)) for kind, names in classes.items()), channels, sizes.outlines)


def _are_names(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) for name in value)


def _read_arrays(path: Path) -> dict[tuple[str, ...], Float[np.ndarray, "..."]]:
    check_regular(path)
    try:
        with np.load(path, allow_pickle=False) as file:
            return {tuple(name.split("/")): file[name].astype(np.float32) for name in file.files}
    except Exception as error:  # zipfile and zlib have errors of their own for damaged files
        raise InputError(f"{path}: expected arrays as np.savez writes them ({error})") from error


def init_params(config: SegmenterConfig, key: jax.Array) -> dict[str, Any]:
    """Random initial parameters."""
    # Compiled in one piece: one operation at a time takes several times as long.
    init = jax.jit(SegmentationNetwork(config).init)
    return init(key, jnp.zeros((1, config.multiple, config.multiple, 3)))["params"]


def init_shapes(config: SegmenterConfig) -> dict[str, Any]:
    """The shapes of the parameters."""
    return jax.eval_shape(functools.partial(init_params, config), jax.eval_shape(lambda: jax.random.key(0)))
