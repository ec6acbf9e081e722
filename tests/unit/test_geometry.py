"""Masks and points: official numbers, decoding against pycocotools, and broken input."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pycocotools import mask as coco_mask
from skimage.measure import find_contours

from common import parity
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import RLE, box_from_mask, decode_mask, encode_mask, resize_map
from instdiff_jax.geometry.points import mask_points, normalize_points, resample_scribble, sample_scribble


def random_mask(rng, height=40, width=60):
    """A mask of a random kind: noise, blobs, thin lines, single pixels."""
    kind = rng.integers(4)
    if kind == 0:
        return rng.random((height, width)) < rng.uniform(0.02, 0.98)
    y, x = np.mgrid[:height, :width]
    mask = np.zeros((height, width), bool)
    for _ in range(rng.integers(1, 5)):
        cy, cx = rng.uniform(0, height), rng.uniform(0, width)
        if kind == 1:
            mask |= ((y - cy) / rng.uniform(2, 20)) ** 2 + ((x - cx) / rng.uniform(2, 20)) ** 2 < 1
        elif kind == 2:
            mask |= np.abs((y - cy) * rng.normal() + (x - cx) * rng.normal()) < 0.7
    if kind == 3 or not mask.any():
        mask[rng.integers(height), rng.integers(width)] = True
    return mask


def plain_mask_points(mask):
    """The rules of the official code, written out without any shortcut."""

    def norm(p):
        return np.sqrt(float(p[0]) ** 2 + float(p[1]) ** 2)

    contours = [c for c in find_contours(np.pad(mask, 1).astype(int), 0) if len(c) >= 3]
    boundary = np.concatenate(contours)[:, ::-1]
    boundary = boundary[[int(i) for i in np.linspace(0, len(boundary) - 1, 128)]]
    pixels = np.argwhere(mask)
    if len(pixels) < 128:  # drawn one by one; ours draws with this generator
        inside = [pixels[i][::-1] for i in np.random.default_rng(0).integers(0, len(pixels), 128)]
        return np.array(sorted([*inside, *boundary], key=norm), np.float32)
    center = pixels.mean(axis=0)
    pixels = sorted(pixels, key=lambda p: norm(p - center))
    step = len(pixels) // 128
    inside = [pixels[i * step + step // 2][::-1] for i in range(128)]
    return np.array(sorted([*inside, *boundary], key=norm), np.float32)


@pytest.mark.parametrize("index", range(9))
def test_mask_points_parity(index):
    data = parity("mask_points")
    points = mask_points(data[f"mask{index}"])
    assert points.dtype == np.float32 and points.shape == (256, 2)
    np.testing.assert_array_equal(points.ravel(), data[f"points256_{index}"])


@pytest.mark.parametrize("small", [False, True])
def test_mask_points_equal_the_plain_rules_on_random_masks(small):
    """Also of masks with fewer pixels than points inside, which no number of the official code covers."""
    rng = np.random.default_rng(int(small))
    done = 0
    while done < 40:
        mask = random_mask(rng)
        if (mask.sum() < 128) != small:
            continue
        np.testing.assert_array_equal(mask_points(mask), plain_mask_points(mask))
        done += 1


@pytest.mark.parametrize("shape", [(512, 512), (300, 200)])
def test_mask_points_of_a_full_canvas(shape):
    mask = np.ones(shape, bool)
    points = mask_points(mask)
    assert points.min() == 0 and points[:, 0].max() == shape[1] + 1 and points[:, 1].max() == shape[0] + 1
    assert normalize_points(points, shape[1], shape[0]).max() == 1
    if shape == (300, 200):
        np.testing.assert_array_equal(points, plain_mask_points(mask))


def test_mask_points_of_few_pixels_are_drawn_from_the_mask():
    mask = np.zeros((50, 40), bool)
    mask[10:13, 20:25] = True
    points = mask_points(mask)
    on_mask = [10 <= y < 13 and 20 <= x < 25 for x, y in points]
    assert sum(on_mask) >= 128
    assert (points.min(axis=0) >= (20, 10)).all() and (points.max(axis=0) <= (26, 14)).all()
    np.testing.assert_array_equal(points, mask_points(mask))
    other = mask_points(mask, np.random.default_rng(5))
    assert not np.array_equal(points, other)
    np.testing.assert_array_equal(other, mask_points(mask, np.random.default_rng(5)))


def test_mask_points_of_an_empty_mask_are_zeros():
    assert not mask_points(np.zeros((9, 9), bool)).any()
    assert not sample_scribble(np.zeros((9, 9), bool), np.random.default_rng(0)).any()


def test_run_lengths_hold_the_same_mask():
    """Whatever the format, and as an encoder writes them, so that equal masks have equal counts."""
    rng = np.random.default_rng(4)
    for _ in range(50):
        mask = random_mask(rng)
        height, width = mask.shape
        edges = np.flatnonzero(np.diff(np.concatenate([[False], mask.T.ravel(), [not mask[-1, -1]]])))
        runs = np.diff(np.concatenate([[0], edges])).tolist()
        odd = [*runs[:1], 0, 0, *runs[1:]]
        polygon = rng.uniform(-5, 65, 2 * rng.integers(3, 9)).tolist()
        for source in (encode_mask(mask), {"size": [height, width], "counts": odd}, [polygon], [polygon, polygon[:6]]):
            rle, expected = RLE.from_coco(source, height, width, "m"), decode_mask(source, height, width, "m")
            np.testing.assert_array_equal(rle.decode(), expected)
            assert rle == RLE.from_mask(expected) and rle.area == expected.sum() and rle.size == (height, width)
            assert rle.to_dict() == encode_mask(expected)


def test_mask_points_are_fast():
    """About 2 ms where measured; the bound leaves room for a loaded machine."""
    mask = parity("mask_points")["mask1"]
    times = []
    for _ in range(7):
        start = time.perf_counter()
        mask_points(mask)
        times.append(time.perf_counter() - start)
    assert min(times) < 0.02


def test_decode_equals_pycocotools():
    rng = np.random.default_rng(1)
    for _ in range(200):
        mask = random_mask(rng, *rng.integers(1, 60, 2))
        rle = coco_mask.encode(np.asfortranarray(mask, np.uint8))
        height, width = mask.shape
        np.testing.assert_array_equal(decode_mask(rle, height, width, "m"), mask)
        text = encode_mask(mask)
        assert text == {"size": [height, width], "counts": rle["counts"].decode()}
        np.testing.assert_array_equal(decode_mask(text, height, width, "m"), mask)
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        runs = np.diff([0, *edges, flat.size]).tolist()
        runs = [0, *runs] if flat[0] else runs
        plain = {"size": [height, width], "counts": runs}
        np.testing.assert_array_equal(decode_mask(plain, height, width, "m"), mask)


def test_decode_polygons():
    square, triangle = [10, 10, 30, 10, 30, 25, 10, 25], [40.5, 2, 55, 2, 50, 30.5]
    mask = decode_mask([square, triangle], 40, 60, "m")
    assert mask.shape == (40, 60) and mask[12, 12] and mask[5, 50] and not mask[35, 5]
    assert mask[10:25, 10:30].all()
    flat, nested = (decode_mask(polygons, 40, 60, "m") for polygons in (square, [square]))
    np.testing.assert_array_equal(flat, nested)
    out = decode_mask([[-20, -20, 100, -20, 100, 100, -20, 100]], 40, 60, "m")
    assert out.all()


BROKEN = [
    None,
    3,
    "abc",
    True,
    [],
    [[]],
    [[1, 2, 3, 4]],
    [[1, 2, 3, 4, 5]],
    [[1, 2, 3, 4, 5, float("nan")]],
    [[1, 2, 3, 4, 5, 1e12]],
    [[1, 2, 3, 4, 5, True]],
    [[1, 2, 3, 4, 5, "6"]],
    [[1, 2, 3, 4, 5, 10**400]],
    {},
    {"size": [8, 8]},
    {"size": [8, 8], "counts": None},
    {"size": [8, 8], "counts": ""},
    {"size": [8, 8], "counts": []},
    {"size": [8, 8], "counts": [63]},
    {"size": [8, 8], "counts": [-1, 65]},
    {"size": [8, 8], "counts": [True, 63]},
    {"size": [8, 8], "counts": [10**30]},
    {"size": [8, 8], "counts": "zzzzzzzz"},
    {"size": [8, 8], "counts": "é"},
    {"size": [8, 8], "counts": "o" * 40 + "0"},
    {"size": [8.0, 8], "counts": [64]},
    {"size": [8], "counts": [64]},
    {"size": "88", "counts": [64]},
    {"size": [8, 9], "counts": [72]},
]


@pytest.mark.parametrize("mask", BROKEN, ids=lambda mask: repr(mask)[:40])
def test_broken_masks_are_named(mask):
    with pytest.raises(InputError, match=r"^layout\.json: annos\[2\]\.mask") as error:
        decode_mask(mask, 8, 8, "layout.json: annos[2].mask")
    assert "\n" not in str(error.value) and len(str(error.value)) < 300


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.binary(max_size=30), st.text(alphabet=[chr(c) for c in range(48, 112)], max_size=30)))
def test_fuzzed_counts_end_in_a_mask_or_an_input_error(counts):
    try:
        mask = decode_mask({"size": [6, 7], "counts": counts}, 6, 7, "m")
    except InputError:
        return
    assert mask.shape == (6, 7) and mask.dtype == bool


def test_box_from_mask():
    mask = np.zeros((30, 50), bool)
    assert box_from_mask(mask) is None
    mask[4:9, 20] = True
    np.testing.assert_array_equal(box_from_mask(mask), [20, 4, 21, 9])


def test_sample_scribble():
    mask = np.zeros((30, 50), bool)
    mask[4:9, 20:40] = True
    points = sample_scribble(mask, np.random.default_rng(3))
    assert points.shape == (20, 2) and points.dtype == np.float32
    assert len({tuple(p) for p in points}) == 20
    assert all(mask[int(y), int(x)] for x, y in points)
    assert (np.diff(np.hypot(*points.T.astype(np.float64))) >= 0).all()
    mask[:] = False
    mask[3, 7] = True
    assert (sample_scribble(mask, np.random.default_rng(3)) == (7, 3)).all()


def test_resample_scribble_keeps_twenty_points_in_the_official_order():
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 1, (20, 2)) * (768, 512)
    expected = sorted((points / (768, 512)).tolist(), key=lambda p: np.linalg.norm(p))
    ours = resample_scribble(points, 20, (768, 512))
    np.testing.assert_allclose(ours / (768, 512), expected, rtol=1e-6)


def test_resample_scribble_spaces_points_evenly():
    path = np.array([[0, 0], [100, 0], [100, 90]])
    points = resample_scribble(path)
    assert points.shape == (20, 2)
    np.testing.assert_allclose(np.abs(np.diff(points, axis=0)).sum(axis=1), 10, rtol=1e-5)
    np.testing.assert_array_equal(points[[0, -1]], [[0, 0], [100, 90]])
    assert (resample_scribble(np.array([[5, 6]])) == (5, 6)).all()
    assert (resample_scribble(np.array([[5, 6], [5, 6]])) == (5, 6)).all()
    dense = resample_scribble(np.linspace((10, 20), (400, 300), 133))
    np.testing.assert_allclose(dense, np.linspace((10, 20), (400, 300), 20), rtol=1e-5)


def test_resize_map():
    mask = np.zeros((100, 200), bool)
    mask[:50, 100:] = True
    small = resize_map(mask, 64)
    assert small.shape == (64, 64) and small[:32, 32:].all() and small.sum() == 32 * 32
    np.testing.assert_array_equal(resize_map(small, 64), small)
