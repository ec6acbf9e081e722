"""The segmentation network: instances are recovered from perfect maps, training lowers the loss, files are safe."""

import jax
import numpy as np
import pytest

from instdiff_jax.errors import InputError
from projects.shapes.drawing import SHAPES
from projects.shapes.scenes import render_scene
from projects.shapes.segmenter import PixelMaps, Segmenter, SegmenterConfig, find_instances, init_params
from projects.shapes.train_segmenter import augment, main, render, scene_targets, train
from projects.shapes.worlds import SceneSettings

SMALL = SegmenterConfig(channels=(8, 8, 8, 16))


def perfect(scene):
    targets = scene_targets(scene)
    onehot = [
        np.eye(n)[part] for n, part in ((len(SHAPES) + 1, targets.shape), (8, targets.colour), (4, targets.texture))
    ]
    return PixelMaps(*onehot, targets.centre.astype(np.float32), targets.offset.astype(np.float32))


@pytest.mark.parametrize("index", range(12))
def test_perfect_maps_give_the_instances_back(index):
    """Also a part inside its host, with the same centre; only two of the same shape would merge."""
    scene = render_scene(21, index, 64, SceneSettings(min_instances=2, max_instances=6, nested=1.0))
    found = find_instances(perfect(scene))
    matched = 0
    for item in scene.instances:
        same = [d for d in found if d.category == item.shape and (d.mask == item.mask).all()]
        matched += bool(same)
        if same:
            assert same[0].box == tuple(map(float, item.box)) and same[0].score == pytest.approx(1.0)
            assert same[0].attributes == {"colour": item.colour, "texture": item.texture}
    assert matched == len(scene.instances) == len(found)


def test_an_empty_image_has_no_instances():
    scene = render_scene(21, 0, 64, SceneSettings())
    maps = perfect(scene)
    blank = np.zeros_like(maps.shape)
    blank[..., 0] = 1
    assert find_instances(maps._replace(shape=blank)) == []
    assert find_instances(maps._replace(centre=np.zeros_like(maps.centre))) == []


def test_training_lowers_the_loss_the_same_way_each_time():
    images, targets = render(9, 24, 32, SceneSettings(max_instances=3, min_side=0.3))
    params, losses = train(images, targets, 40, batch_size=8, learning_rate=1e-2, config=SMALL)
    again, same = train(images, targets, 40, batch_size=8, learning_rate=1e-2, config=SMALL)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert losses == same
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again), strict=True))


def test_augmented_images_stay_similar():
    images, _ = render(9, 4, 64, SceneSettings())
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
    other = SegmenterConfig(channels=(8, 8, 16, 16))
    Segmenter(other, init_params(SMALL, jax.random.key(0))).save(folder, {})
    with pytest.raises(InputError, match="expected shape"):
        Segmenter.from_folder(folder)
    with pytest.raises(InputError, match="multiples of 8"):
        Segmenter(SMALL, {}).detect(np.zeros((1, 30, 32, 3), np.uint8))
    for flags, message in (((("--size", "30")), "--size"), (("--steps", "0"), "--steps")):
        with pytest.raises(SystemExit) as stop:
            main(["--output", str(tmp_path / "out"), *flags])
        assert stop.value.code == 2, message
