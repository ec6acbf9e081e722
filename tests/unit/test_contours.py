"""Contours are skimage's, point for point."""

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter
from skimage.measure import find_contours

from instdiff_jax.geometry.contours import trace_contours


@pytest.mark.parametrize("smooth", [0.0, 0.7, 2.0, 5.0])
def test_contours_equal_skimage(smooth):
    """Random masks from noise to blobs: gaps one pixel wide, holes, single pixels, touching corners."""
    rng = np.random.default_rng(int(10 * smooth))
    for _ in range(60):
        height, width = rng.integers(1, 60, 2)
        field = gaussian_filter(rng.normal(size=(height, width)), smooth)
        mask = np.pad(field > np.quantile(field, rng.uniform(0.1, 0.9)), 1)
        expected, actual = find_contours(mask.astype(np.uint8), 0), trace_contours(mask)
        assert len(actual) == len(expected)
        for ours, theirs in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_empty_mask_has_no_contour():
    assert trace_contours(np.zeros((5, 5), bool)) == []
