"""Decoding in tiles: equal to the whole where a tile's edge is not in sight."""

import jax.numpy as jnp
import numpy as np
import pytest

from instdiff_jax.errors import InputError
from instdiff_jax.sampling.tiles import check_tile, decode_tiles

STRIDE = 4


def larger(x):
    return jnp.repeat(jnp.repeat(x[..., :3], STRIDE, axis=1), STRIDE, axis=2)


def blurred(x):
    """Each pixel sees one latent around its own; off the latents are zeros."""
    padded = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1:3]
    return larger(sum(padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)) / 9)


@pytest.fixture(scope="module")
def latents():
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, 24, 40, 4), dtype=np.float32))


def test_what_sees_one_latent_is_not_changed(latents):
    found = decode_tiles(larger, latents, 16)
    assert found.shape == (2, 96, 160, 3)
    np.testing.assert_allclose(found, larger(latents), atol=2e-6)


def test_away_from_edges_tiles_equal_the_whole(latents):
    """Tiles of 16 latents begin at 0 and 8 of 24 rows, and at 0, 12 and 24 of 40 columns."""
    found, whole = np.asarray(decode_tiles(blurred, latents, 16)), np.asarray(blurred(latents))
    near = np.zeros((24, 40), bool)
    for edge in (8, 16):
        near[edge - 1 : edge + 1] = True
    for edge in (12, 16, 24, 28):
        near[:, edge - 1 : edge + 1] = True
    near = np.repeat(np.repeat(near, STRIDE, 0), STRIDE, 1)
    np.testing.assert_allclose(found[:, ~near], whole[:, ~near], atol=2e-6)
    # At its edge a tile has little weight.
    assert 1e-3 < np.abs(found - whole)[:, near].max() < 0.5 * np.abs(whole).max()


@pytest.mark.parametrize("tile", [24, 40, 64])
def test_one_tile_that_holds_all_is_the_whole(latents, tile):
    square = latents[:, :, :24]
    np.testing.assert_array_equal(decode_tiles(blurred, square, tile), blurred(square))


def test_sizes_of_tiles():
    assert check_tile(None, 8) is None and check_tile(512, 8) == 64
    for tile in (63, 12, 0, 64.0, True):
        with pytest.raises(InputError, match="tile: expected a multiple of 8 pixels, at least 64"):
            check_tile(tile, 8)
