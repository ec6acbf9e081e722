"""The segmentation network: instances are recovered from perfect maps, training lowers the loss, files are safe."""

import flax.linen as nn
import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from instdiff_jax.errors import InputError
from projects.common import train_segmenter
from projects.common.coco_folder import Picture, Row
from projects.common.segmentation_network import GroupNorm, PixelMaps, SegmenterConfig, enlarge, init_params
from projects.common.segmenter import Segmenter, find_instances
from projects.common.train_segmenter import Scenes, Training, augment, describe, make_targets, render, thin_out, train
from projects.shapes.render import WORLD
from projects.shapes.train_segmenter import CLASSES, main
from projects.shapes.worlds import SceneSettings

SMALL = SegmenterConfig(CLASSES, (8, 8, 8, 16))


def perfect(picture, classes=CLASSES):
    """The maps that a perfect network predicts."""
    scenes = Scenes(*(part[None] for part in describe(picture, classes)))
    label, attributes, centre, offset = (np.asarray(part)[0] for part in make_targets(scenes, len(classes[0][1])))
    values = tuple(np.eye(len(names))[part] for (_, names), part in zip(classes[1:], attributes, strict=True))
    return PixelMaps(np.eye(len(classes[0][1]) + 1)[label], values, centre, offset)


@pytest.mark.parametrize("index", range(12))
def test_perfect_maps_give_the_instances_back(index):
    """Also a part inside its host, with the same centre; only two of the same shape would merge."""
    picture = WORLD.render(21, index, 64, SceneSettings(min_instances=2, max_instances=6, nested=1.0))
    found = find_instances(perfect(picture), CLASSES)
    matched = 0
    for item in picture.rows:
        same = [d for d in found if d.category == item.category and (d.mask == item.mask).all()]
        matched += bool(same)
        if same:
            assert same[0].box == tuple(map(float, item.box)) and same[0].score == pytest.approx(1.0)
            assert same[0].attributes == item.attributes
    assert matched == len(picture.rows) == len(found)


def test_an_empty_image_has_no_instances():
    maps = perfect(WORLD.render(21, 0, 64, SceneSettings()))
    blank = np.zeros_like(maps.category)
    blank[..., 0] = 1
    assert find_instances(maps._replace(category=blank), CLASSES) == []
    assert find_instances(maps._replace(centre=np.zeros_like(maps.centre)), CLASSES) == []


def test_larger_images_have_wider_centres_and_unknown_attributes_are_ignored():
    """Two things of one category; the second has no colour."""
    classes = (("thing", ("car", "bee")), ("colour", ("red", "blue")))
    masks = np.zeros((2, 128, 128), bool)
    masks[0, 10:60, 10:60] = masks[1, 70:120, 64:120] = True
    rows = [
        Row("bee", "", (10, 10, 50, 50), masks[0], {"colour": "blue"}),
        Row("bee", "", (64, 70, 56, 50), masks[1], {}),
    ]
    picture = Picture(np.zeros((128, 128, 3), np.uint8), "", rows, [])
    scenes = Scenes(*(part[None] for part in describe(picture, classes)))
    assert scenes.attributes[0, 0, :3].tolist() == [1, -1, -1]
    # The Gaussian is twice as wide as in 64 pixels, and offsets may miss by 12 pixels.
    maps = perfect(picture, classes)
    assert (
        maps.centre[34, 37, 1] == pytest.approx(np.exp(-9 / (2 * 3.0**2)), abs=0.05) and maps.centre[..., 0].max() == 0
    )
    found = find_instances(maps._replace(offset=maps.offset + np.array([0, 11])), classes)
    assert sorted(d.box for d in found) == [(10.0, 10.0, 50.0, 50.0), (64.0, 70.0, 56.0, 50.0)]
    assert find_instances(maps._replace(offset=maps.offset + np.array([0, 13])), classes) == []


def test_training_lowers_the_loss_the_same_way_each_time():
    images, scenes = render(WORLD, CLASSES, 9, 24, 32, SceneSettings(max_instances=3, min_side=0.3))
    training = Training(40, batch_size=8, learning_rate=1e-2)
    params, losses = train(images, scenes, SMALL, training)
    again, same = train(images, scenes, SMALL, training)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert losses == same
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_a_stopped_training_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train_segmenter, "_SAVE_EVERY", 4)
    images, scenes = render(WORLD, CLASSES, 9, 8, 32, SceneSettings(max_instances=3, min_side=0.3))
    whole, losses = train(images, scenes, SMALL, Training(6, batch_size=4))

    def stopped(images, rng, count=iter(range(100))):
        if next(count) == 5:
            raise KeyboardInterrupt
        return augment(images, rng)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_segmenter, "augment", stopped)
        train(images, scenes, SMALL, Training(6, batch_size=4), tmp_path / "state")
    params, rest = train(images, scenes, SMALL, Training(6, batch_size=4), tmp_path / "state")
    assert rest == losses[4:]
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(whole), strict=True))
    for damage in (b"nothing", flax.serialization.to_bytes((4, {}))):
        (tmp_path / "state").write_bytes(damage)
        with pytest.raises(InputError, match="state: expected the state of this training .*remove it to start anew"):
            train(images, scenes, SMALL, Training(6, batch_size=4), tmp_path / "state")


def test_augmented_images_stay_similar():
    images, _ = render(WORLD, CLASSES, 9, 4, 64, SceneSettings())
    changed = augment(images, np.random.default_rng(0))
    assert changed.dtype == np.uint8 and not np.array_equal(changed, images)
    assert np.abs(changed.astype(float) - images).mean() < 20


def test_saved_and_loaded(tmp_path):
    segmenter = Segmenter(SMALL, init_params(SMALL, jax.random.key(0)))
    segmenter.save(tmp_path / "net", {"command": "test"})
    loaded = Segmenter.from_folder(tmp_path / "net")
    images = np.random.default_rng(0).integers(0, 256, (35, 32, 32, 3), dtype=np.uint8)
    ours, theirs = segmenter.features(images), loaded.features(images)
    assert ours.shape == (35, 16)
    assert np.abs(ours - theirs).max() <= 2e-3 * np.abs(ours).max()
    assert np.allclose(loaded.features(images[33:]), theirs[33:], atol=1e-5)
    assert len(loaded.detect(images)) == 35


def test_bad_folders_are_one_line(tmp_path):
    with pytest.raises(InputError, match="config.json: cannot be read"):
        Segmenter.from_folder(tmp_path)
    folder = tmp_path / "net"
    Segmenter(SMALL, init_params(SMALL, jax.random.key(0))).save(folder, {})
    whole = (folder / "params.npz").read_bytes()
    (folder / "params.npz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="params.npz"):
        Segmenter.from_folder(folder)
    other = SegmenterConfig(CLASSES, (8, 8, 16, 16))
    Segmenter(other, init_params(SMALL, jax.random.key(0))).save(folder, {})
    with pytest.raises(InputError, match="expected shape"):
        Segmenter.from_folder(folder)
    with pytest.raises(InputError, match="multiples of 8"):
        Segmenter(SMALL, {}).detect(np.zeros((1, 30, 32, 3), np.uint8))
    for flags, message in (((("--size", "30")), "--size"), (("--steps", "0"), "--steps")):
        with pytest.raises(SystemExit) as stop:
            main(["--output", str(tmp_path / "out"), *flags])
        assert stop.value.code == 2, message


@pytest.mark.parametrize("channels", [8, 48])
def test_the_norm_is_flax_norm(channels):
    """Its values and gradients, in float32 and bfloat16, with the same parameters."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * rng.standard_normal((2, 6, 4, channels)), jnp.float32)
    params = {name: jnp.asarray(rng.standard_normal(channels), jnp.float32) for name in ("scale", "bias")}
    weights = jnp.asarray(rng.standard_normal(x.shape), jnp.float32)
    # Of the values; in bfloat16 they may be rounded to either neighbour. Gradients are sums in float32.
    for dtype, close in ((jnp.float32, 1e-5), (jnp.bfloat16, 2**-7)):
        made = []
        for norm in (GroupNorm(dtype), nn.GroupNorm(8, dtype=dtype)):

            def loss(params, x, norm=norm):
                return (norm.apply({"params": params}, x).astype(jnp.float32) * weights).sum()

            made.append((norm.apply({"params": params}, x), jax.grad(loss, (0, 1))(params, x)))
        (values, gradients), (expected, expected_gradients) = made
        np.testing.assert_allclose(values.astype(jnp.float32), expected.astype(jnp.float32), rtol=close, atol=2e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=5e-5), gradients, expected_gradients)
        assert values.dtype == dtype


def test_maps_at_half_resolution_give_the_instances_back():
    """Interpolated, they have masks of the image's size, with an IoU above 0.9."""
    rng = np.random.default_rng(0)
    settings = SceneSettings(max_hidden=0.0, min_side=0.3, max_instances=3, nested=0.0)
    for index in range(6):
        picture = WORLD.render(5, index, 64, settings)
        scenes = Scenes(*(part[None] for part in describe(picture, CLASSES)))
        # One of four pixels of the owner: inside as often as the square is covered.
        owners = [thin_out(scenes.owner, 2, rng) for _ in range(400)]
        # What a network learns from many draws: the mean over all four pixels of a square.
        corners = [scenes.owner[:, y::2, x::2] for y in (0, 1) for x in (0, 1)]
        made = [make_targets(scenes._replace(owner=owner), len(CLASSES[0][1]), 2) for owner in corners]
        first, labels = made[0], np.mean([np.eye(len(CLASSES[0][1]) + 1)[np.asarray(one.category)] for one in made], 0)
        values = tuple(jax.nn.one_hot(first.attributes[:, k], len(names)) for k, (_, names) in enumerate(CLASSES[1:]))
        maps = enlarge(PixelMaps(labels, values, first.centre, first.offset), (64, 64))
        found = find_instances(jax.tree.map(lambda part: part[0], maps), CLASSES)
        for row in picture.rows:
            same = [item for item in found if item.category == row.category]
            overlap = max(((item.mask & row.mask).sum() / (item.mask | row.mask).sum() for item in same), default=0)
            assert overlap > 0.9, (index, row.category, overlap)
        covered = (scenes.owner[0] > 0).reshape(32, 2, 32, 2).mean((1, 3))
        np.testing.assert_allclose(np.mean([owner[0] > 0 for owner in owners], 0), covered, atol=0.12)


@pytest.mark.usefixtures("quick_compilation")
def test_training_in_bfloat16_at_half_resolution(tmp_path):
    """The folder says how its maps are made; in bfloat16 the loss falls as in float32, and features stay float32."""
    config = SegmenterConfig(CLASSES, (16, 16, 32, 32), outlines=False)
    images, scenes = render(WORLD, CLASSES, 9, 16, 64, SceneSettings())
    made = {dtype: train(images, scenes, config, Training(8, 8, dtype=dtype)) for dtype in ("float32", "bfloat16")}
    losses = {dtype: losses for dtype, (_, losses) in made.items()}
    np.testing.assert_allclose(losses["bfloat16"], losses["float32"], rtol=0.01)
    assert losses["bfloat16"] != losses["float32"] and losses["bfloat16"][-1] < 0.95 * losses["bfloat16"][0]
    params, _ = made["bfloat16"]
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(params))
    Segmenter(config, params).save(tmp_path / "net", {})
    loaded = Segmenter.from_folder(tmp_path / "net")
    assert loaded.config == config and loaded.features(images[:2]).dtype == np.float32
