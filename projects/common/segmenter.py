"""A small segmentation network that finds the instances of rendered scenes: the evaluation's detector.

The network predicts category, attributes (such as colour) and the offset to the instance's centre for every pixel, and
a heat map of centres for every category. Pixels of a category are assigned to the nearest centre of that category
(Panoptic-DeepLab, arXiv 1911.10194). Centres are per category, as in CenterNet: a part and its host have the same
centre. `train_segmenter.py` trains the network on rendered scenes. Its folder names the categories and attributes.

Axes: b batch, H W image, c channels.
"""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

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
from projects.common.segmentation_network import (
    Classes,
    PixelMaps,
    SegmentationNetwork,
    SegmenterConfig,
    enlarge,
    init_shapes,
    scale_of,
)

# In images of 64 pixels or less, and in proportion in larger ones: a centre is the highest pixel at most 2 pixels away,
# and a pixel belongs to a centre at most 6 pixels from where its offset points.
_NEAR, _REACH = 2, 6.0
# A centre is at least this high.
_PEAK_HEIGHT = 0.2
# Instances of fewer pixels are dropped.
_MIN_PIXELS = 9
# Images per call of a compiled program.
_CHUNK = 32


@dataclasses.dataclass(frozen=True)
class _Sizes(Settings):
    channels: tuple[int, ...] = (24, 32, 64, 96)
    outlines: bool = True


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
            with jax.default_matmul_precision("highest"):  # what it finds should not depend on the device
                found = jax.device_get(program(self._network, self.params, padded))
            yield found, len(part)

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
