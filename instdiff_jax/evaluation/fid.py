"""The Fréchet distance between two sets of images, with any features.

FID (Heusel et al. 2017) uses the features of an Inception network. Distances with other features can only be
compared with each other.
"""

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from instdiff_jax.data.arrays import DAMAGED_ZIP
from instdiff_jax.errors import InputError
from instdiff_jax.paths import read_file

_LARGEST = 1e50  # of a feature


class Gaussian(NamedTuple):
    """Mean and covariance of features, in float64."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def fit_gaussian(features: Float[np.ndarray, "n d"], where: str = "features") -> Gaussian:
    """Fits a Gaussian (covariance over n - 1); InputError for fewer than two rows or non-finite numbers."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not features.shape[1]:
        raise InputError(f"{where}: expected numbers of shape [2 or more images, d], got {list(features.shape)}")
    if not np.abs(features).max() <= _LARGEST:  # NaN fails too
        raise InputError(f"{where}: expected finite numbers of at most {_LARGEST:g}, for their squares and products")
    mean = features.mean(axis=0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½), at least 0.

    (S₁ S₂)^½ has the same trace as (S₁^½ S₂ S₁^½)^½, the root of a symmetric matrix: it needs only eigenvalues and
    has no imaginary part. Covariances need not have full rank.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features: expected the same number in both sets, got {len(a.mean)} and {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ b.covariance @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(float(distance), 0.0)


def distance_to(drawn: Float[np.ndarray, "n d"], real: Gaussian, fewest: int) -> tuple[float, list[str]]:
    """The distance of generated to real images, and a remark if `fewest`, the number of images, is too small."""
    distance = frechet_distance(fit_gaussian(drawn, "features of the generated images"), real)
    if fewest > drawn.shape[1]:
        return distance, []
    return distance, [f"FID: {fewest} images for {drawn.shape[1]} features; it is biased upwards with so few."]


def fid_of_file(path: str | Path) -> tuple[float, list[str]]:
    """The Fréchet distance of precomputed features: an .npz with arrays `generated` and `real`, each [n, d]."""
    try:
        with np.load(io.BytesIO(read_file(path)), allow_pickle=False) as arrays:
            found = {name: arrays[name] for name in ("generated", "real")}
            for name, array in found.items():
                if array.dtype.kind not in "fiu":  # casting drops imaginary parts, and reads text as numbers
                    raise ValueError(f"{name} has the type {array.dtype}")
            drawn, real = (array.astype(np.float64) for array in found.values())
            if drawn.ndim != 2:
                raise ValueError(f"generated has shape {drawn.shape}, not [n, d]")
    except DAMAGED_ZIP as error:
        raise InputError(f"--features: {path}: expected an .npz with arrays generated and real ({error})") from error
    gaussian = fit_gaussian(real, f"--features: {path}: real")
    return distance_to(drawn, gaussian, min(len(drawn), len(real)))
