"""The training transform is the official one where that is right; locations agree with each other; dropout's odds."""

import io
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from official_data import official_record, unpack
from PIL import Image

from common import parity
from instdiff_jax.data.dataset import AnnotatedInstance, Record
from instdiff_jax.data.examples import DataConfig, choose_phrases, draw_formats, locate, select_instances, write_caption
from instdiff_jax.data.images import Crop
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import encode_mask
from instdiff_jax.grounding import FORMATS
from instdiff_jax.images import open_image

KEEP = DataConfig(keep_caption=1.0, instance_caption=0.0)


@pytest.mark.parametrize("flip", [0, 1])
@pytest.mark.parametrize("case", [0, 1, 2])
def test_equals_the_official_examples(case, flip):
    """640×427, 512×512 and 1000×700, flipped and not; scribbles are random there and not compared."""
    data, record = parity("training_examples"), official_record(case)
    expected = {key.split("_", 1)[1]: value for key, value in data.items() if key.startswith(f"c{case}f{flip}_")}
    crop = Crop(record.width, record.height, 512, bool(flip))
    canvas = crop.image(open_image(record.image)).astype(np.float32) / 127.5 - 1
    np.testing.assert_array_equal(canvas[::4, ::4].transpose(2, 0, 1), expected["image"])
    chosen = select_instances(record, crop, KEEP)
    arrays = locate(chosen, record, crop, 512, np.random.default_rng(0))
    np.testing.assert_array_equal(arrays["boxes"], expected["boxes"])
    np.testing.assert_array_equal(arrays["points"], expected["points"])
    np.testing.assert_array_equal(arrays["valid"], expected["masks"])
    np.testing.assert_array_equal(arrays["mask_points"], expected["polygons"])
    segments = np.unpackbits(expected["segs_packed"]).reshape(30, 512, 512).astype(bool)
    np.testing.assert_array_equal(unpack(arrays["maps"]), segments)
    instances = [instance for instance, _ in chosen]
    caption = write_caption(record, [item.category for item in instances], KEEP, np.random.default_rng(0))
    assert caption == str(expected["caption"])
    numbers = choose_phrases(instances, KEEP, np.random.default_rng(0))
    rows = np.where(numbers[:, None] >= 0, data[f"c{case}_text_embedding"][np.maximum(numbers, 0)], 0)
    np.testing.assert_array_equal(rows, expected["text_embeddings"])


def ellipse_record(width, height, boxes):
    instances = []
    yy, xx = np.mgrid[:height, :width] + 0.5
    for i, (x0, y0, x1, y1) in enumerate(boxes):
        mask = ((xx - (x0 + x1) / 2) / (x1 - x0)) ** 2 + ((yy - (y0 + y1) / 2) / (y1 - y0)) ** 2 <= 0.25
        counts = encode_mask(mask)["counts"].encode()
        instances.append(
            AnnotatedInstance((x0, y0, x1 - x0, y1 - y0), f"thing{i}", counts, phrase=i, caption_phrase=-1)
        )
    image = io.BytesIO()
    Image.new("RGB", (width, height), (9, 9, 9)).save(image, "PNG")
    return Record(image.getvalue(), width, height, 0, "ellipses", ("one", "two"), tuple(instances))


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_formats_of_an_instance_agree(data):
    """Box, point, scribble, mask points and map of an ellipse lie at one place on the canvas, flipped or not."""
    width, height = data.draw(st.integers(40, 300)), data.draw(st.integers(40, 300))
    size, flip = data.draw(st.sampled_from([48, 64, 96])), data.draw(st.booleans())
    x0, y0 = data.draw(st.integers(0, width - 20)), data.draw(st.integers(0, height - 20))
    x1, y1 = data.draw(st.integers(x0 + 16, width)), data.draw(st.integers(y0 + 16, height))
    record = ellipse_record(width, height, [(x0, y0, x1, y1)])
    crop = Crop(width, height, size, flip)
    chosen = select_instances(record, crop, DataConfig(image_size=size))
    arrays = locate(chosen, record, crop, size, np.random.default_rng(0))
    if not chosen:
        assert not any(array.any() for array in arrays.values())
        return
    pixel = max(crop.scale, 1.0) / size  # one pixel of the original or of the canvas, as a fraction of the canvas
    box = arrays["boxes"][0]
    assert (box >= 0).all() and (box <= 1).all() and (box[2:] > box[:2]).all()
    np.testing.assert_allclose(arrays["points"][0], (box[:2] + box[2:]) / 2, atol=1e-6)
    for name, slack in (("scribbles", 1), ("mask_points", 3)):
        points = arrays[name][0].reshape(-1, 2)
        assert (points >= box[:2] - slack * pixel).all() and (points <= box[2:] + slack * pixel).all()
    ys, xs = np.nonzero(unpack(arrays["maps"])[0])
    inside = (xs + 0.5 >= box[0] * size - 1 - pixel * size) & (xs + 0.5 <= box[2] * size + 1 + pixel * size)
    inside &= (ys + 0.5 >= box[1] * size - 1 - pixel * size) & (ys + 0.5 <= box[3] * size + 1 + pixel * size)
    assert inside.all()
    # An ellipse that is not cut off reaches to its box.
    if box.min() > 2 * pixel and box.max() < 1 - 2 * pixel:
        edges = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]) / size
        np.testing.assert_allclose(edges, box, atol=2.5 * pixel)


@settings(max_examples=25, deadline=None)
@given(st.integers(30, 400), st.integers(30, 400), st.sampled_from([32, 64, 100]), st.integers(0, 1000))
def test_flip_mirrors_everything(width, height, size, seed):
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
    plain, mirrored = Crop(width, height, size), Crop(width, height, size, True)
    image = Image.fromarray(pixels)
    np.testing.assert_array_equal(mirrored.image(image), plain.image(image)[:, ::-1])
    assert plain.image(image).shape == (size, size, 3)
    boxes = rng.uniform(0, min(width, height) / 2, (5, 4))
    (a, area_a), (b, area_b) = plain.boxes(boxes), mirrored.boxes(boxes)
    np.testing.assert_allclose(b[:, [2, 1, 0, 3]], np.abs([size, 0, size, 0] - a), atol=1e-9)
    np.testing.assert_array_equal(area_a, area_b)
    points = rng.uniform(0, 1, (7, 2)) * (width, height)
    np.testing.assert_allclose(mirrored.points(points), [size, 0] + plain.points(points) * [-1, 1], atol=1e-9)
    np.testing.assert_array_equal(mirrored.grid(size)[1], plain.grid(size)[1][::-1])


def test_crowds_small_ones_and_the_thirty_first():
    boxes = [(0, 0, 20 + i, 20 + i) for i in range(40)]
    record = ellipse_record(200, 200, [*boxes, (0, 0, 15, 15)])
    crop = Crop(200, 200, 64)
    chosen = select_instances(record, crop, DataConfig(image_size=64))
    assert [item.phrase for item, _ in chosen] == list(range(39, 9, -1))
    crowd = Record(b"", 200, 200, 0, "", (), (AnnotatedInstance((0, 0, 90, 90), "many", crowd=True),))
    assert not select_instances(crowd, crop, DataConfig())
    assert len(select_instances(crowd, crop, DataConfig(use_crowds=True))) == 1
    # A side of 20 is 1% of the image.
    for side, count in ((20.1, 1), (19.9, 0)):
        record = Record(b"", 200, 200, 0, "", (), (AnnotatedInstance((180 - side, 0, side, side), "small"),))
        assert len(select_instances(record, crop, DataConfig())) == count


def test_maps_of_another_size_follow_pytorch():
    """A 64-pixel canvas with 32- and 128-pixel maps: PyTorch's nearest interpolation of the canvas' map."""
    torch = pytest.importorskip("torch")
    record = ellipse_record(150, 110, [(10, 5, 120, 90), (60, 40, 149, 109)])
    crop = Crop(150, 110, 64, True)
    chosen = select_instances(record, crop, DataConfig())
    canvas = unpack(locate(chosen, record, crop, 64, np.random.default_rng(0))["maps"])
    for size in (32, 48, 128):
        maps = unpack(locate(chosen, record, crop, size, np.random.default_rng(0))["maps"])
        expected = torch.nn.functional.interpolate(torch.from_numpy(canvas[None]).float(), size, mode="nearest")
        np.testing.assert_array_equal(maps, expected[0].numpy().astype(bool))


def test_captions():
    record = ellipse_record(100, 100, [])
    rng = np.random.default_rng(0)
    captions = Counter(write_caption(record, ["dog", "dog", "cat"], DataConfig(), rng) for _ in range(2000))
    assert set(captions) == {"", "2 dog, 1 cat. one", "2 dog, 1 cat. two"}
    assert abs(captions[""] - 1000) < 100 and abs(captions["2 dog, 1 cat. one"] - 500) < 80
    assert write_caption(record, [], KEEP, rng) in ("one", "two")
    plain = DataConfig(keep_caption=1.0, count_categories=False)
    assert write_caption(record, ["dog"], plain, rng) in ("one", "two")
    silent = Record(b"", 9, 9, 0, "", (), ())
    assert write_caption(silent, ["dog"], KEEP, rng) == "1 dog"
    instance = AnnotatedInstance((0, 0, 1, 1), "a", phrase=3, caption_phrase=5)
    numbers = [choose_phrases([instance], DataConfig(), rng)[0] for _ in range(1000)]
    assert set(numbers) == {3, 5} and abs(numbers.count(5) - 500) < 80


def official_formats(rng):
    """The released rule (UniFusion's training dropout), step by step, on drop flags."""
    box, point, scribble, mask = rng.random(4) < 0.1
    if not mask:
        box = point = False
    if not box or not mask:
        point = False
    maps = mask
    if rng.random() < 0.1:
        point, box, scribble, mask, maps = False, True, True, True, True
    if rng.random() < 0.1 and not maps:
        point, box, scribble, mask = False, False, True, False
    if point and box and scribble and mask and maps:
        box = False
    assert mask == maps
    return frozenset(name for name, dropped in zip(FORMATS, (box, point, scribble, mask), strict=True) if not dropped)


def test_format_dropout_has_the_official_odds():
    draws = 40000
    ours_rng, theirs_rng = np.random.default_rng(1), np.random.default_rng(2)
    ours = Counter(draw_formats(DataConfig(), ours_rng) for _ in range(draws))
    theirs = Counter(official_formats(theirs_rng) for _ in range(draws))
    for outcome in set(ours) | set(theirs):
        assert abs(ours[outcome] - theirs[outcome]) < 6 * np.sqrt(max(theirs[outcome], 10)), outcome
    nothing = DataConfig(drop_box=1.0, drop_point=1.0, drop_scribble=1.0, drop_mask=1.0, only_point=0.0)
    assert draw_formats(nothing, ours_rng) == {"box"}


def test_which_features_a_slot_has():
    record = ellipse_record(100, 100, [(0, 0, 60, 60)])
    bare = AnnotatedInstance((20, 20, 40, 40), "no mask")
    record = Record(record.image, 100, 100, 0, "", (), (*record.instances, bare))
    crop = Crop(100, 100, 64)
    chosen = select_instances(record, crop, DataConfig())
    every = locate(chosen, record, crop, 64, np.random.default_rng(0))
    for name in ("has_box", "has_point", "has_scribble", "has_mask"):
        # The instance without a mask has features of zeros there, not the null vector.
        assert every[name].tolist() == [1.0, 1.0] + [0.0] * 28
    assert not every["mask_points"][1].any() and every["has_map"] == 1
    none = locate(chosen, record, crop, 64, np.random.default_rng(0), used=())
    assert not any(none[name].any() for name in none if name.startswith("has_"))
    empty = locate([], record, crop, 64, np.random.default_rng(0))
    assert not any(array.any() for array in empty.values())


@pytest.mark.parametrize("flip", [False, True])
def test_points_on_masks(flip):
    """The center of an L's box is not on it: a point of "mask" is, wherever the crop and the flip put it."""
    mask = np.zeros((60, 90), bool)
    mask[5:55, 20:28] = mask[47:55, 20:70] = True
    gone = np.zeros_like(mask)  # in the part that the crop leaves out
    gone[:, 80:] = True
    masks = [encode_mask(m)["counts"].encode() for m in (mask, gone)]
    instances = (AnnotatedInstance((20, 5, 50, 50), "l", masks[0]), AnnotatedInstance((0, 0, 90, 60), "gone", masks[1]))
    bare = AnnotatedInstance((20, 5, 50, 50), "bare")
    record = Record(ellipse_record(90, 60, []).image, 90, 60, 0, "l", (), (*instances, bare))
    crop = Crop(90, 60, 64, flip)
    chosen = select_instances(record, crop, DataConfig())
    slots = {instance.category: slot for slot, (instance, _) in enumerate(chosen)}
    seen = set()
    for seed in range(20):
        arrays = locate(chosen, record, crop, 64, np.random.default_rng(seed), "mask")
        x, y = (arrays["points"][slots["l"]] * 64).astype(int)
        assert unpack(arrays["maps"])[slots["l"], y, x]
        seen.add((x, y))
        for name in ("gone", "bare"):
            box = arrays["boxes"][slots[name]]
            np.testing.assert_allclose(arrays["points"][slots[name]], (box[:2] + box[2:]) / 2, atol=1e-6)
        released = locate(chosen, record, crop, 64, np.random.default_rng(seed))
        # Drawn before the only random point, and so as without it.
        np.testing.assert_array_equal(released["scribbles"], arrays["scribbles"])
    assert len(seen) > 10
    x, y = (released["points"][slots["l"]] * 64).astype(int)
    assert not unpack(arrays["maps"])[slots["l"], y, x]
    with pytest.raises(InputError, match="point"):
        DataConfig.from_dict({"point": "middle"}, "data")


def test_formats_that_nothing_sees_are_not_made():
    mask = np.zeros((60, 90), bool)
    mask[5:55, 20:70] = True
    instances = (AnnotatedInstance((20, 5, 50, 50), "box", encode_mask(mask)["counts"].encode()),)
    record = Record(ellipse_record(90, 60, []).image, 90, 60, 0, "box", (), instances)
    crop = Crop(90, 60, 64)
    chosen = select_instances(record, crop, DataConfig())
    whole = locate(chosen, record, crop, 64, np.random.default_rng(0))
    for hidden, array in (("scribble", "scribbles"), ("mask", "mask_points")):
        used = set(FORMATS) - {hidden}
        arrays = locate(chosen, record, crop, 64, np.random.default_rng(0), used=used)
        assert whole[array].any() and not arrays[array].any()
        for other in {"boxes", "points", "scribbles", "maps", "valid"} - {array}:
            assert arrays[other].any(), (hidden, other)
        assert not arrays[f"has_{hidden}"].any() and arrays["has_map"] == (hidden != "mask")


def test_scribbles_alone():
    config, rng = DataConfig(only_scribble=0.25), np.random.default_rng(0)
    draws = [draw_formats(config, rng) for _ in range(4000)]
    alone = np.mean([draw == {"scribble"} for draw in draws])
    assert 0.23 < alone < 0.27  # by the other rates one in a hundred and less
    assert config.without_chance().only_scribble == 0


def test_settings_out_of_range():
    with pytest.raises(InputError, match="data.flip: expected a number from 0 to 1, got 1.5"):
        DataConfig(flip=1.5).validate()
    with pytest.raises(InputError, match="data.map_size"):
        DataConfig(map_size=0).validate()
    with pytest.raises(InputError, match="data.max_instances: expected at most 30, got 31"):
        DataConfig(max_instances=31).validate()
    with pytest.raises(InputError, match="data.dropout_per: expected one of sample, batch"):
        DataConfig.from_dict({"dropout_per": "epoch"}, "data")
