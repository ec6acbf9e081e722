"""The Fréchet distance between two sets of pictures, in whatever features describe them.

FID (Heusel et al. 2017) has it in the features of an Inception network; with other features the numbers compare
only with each other.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from instdiff_jax.errors import InputError


class Gaussian(NamedTuple):
    """Mean and covariance of features, in float64."""

    mean: Float[np.ndarray, " d"]
    covariance: Float[np.ndarray, "d d"]


def fit_gaussian(features: Float[np.ndarray, "n d"], where: str = "features") -> Gaussian:
    """The Gaussian of features (covariance over n - 1); InputError for fewer than two, or numbers not finite."""
    features = np.asarray(features, np.float64)
    if features.ndim != 2 or len(features) < 2 or not np.isfinite(features).all():
        raise InputError(f"{where}: expected finite numbers of shape [2 or more pictures, d], got {features.shape}")
    mean = features.mean(axis=0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|m₁ − m₂|² + tr(S₁ + S₂ − 2 (S₁ S₂)^½), at least 0.

    (S₁ S₂)^½ has the trace of (S₁^½ S₂ S₁^½)^½, a root of a symmetric matrix: eigenvalues alone, and no imaginary
    part to drop as from a general matrix's root. Covariances without full rank are allowed.
    """
    if a.mean.shape != b.mean.shape:
        raise InputError(f"features: expected the same number in both sets, got {len(a.mean)} and {len(b.mean)}")
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = root @ b.covariance @ root
    shared = np.sqrt(np.maximum(np.linalg.eigvalsh((product + product.T) / 2), 0)).sum()
    distance = ((a.mean - b.mean) ** 2).sum() + np.trace(a.covariance) + np.trace(b.covariance) - 2 * shared
    return max(float(distance), 0.0)
