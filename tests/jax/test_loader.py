"""Batch s is a function of the seed and s: however many processes and workers, from wherever it starts."""

import dataclasses
import os
import pickle
import shutil
import signal
import threading
import time

import numpy as np
import pytest
from coco_fixture import make_coco
from trees import assert_same_trees

from instdiff_jax.cli import build_coco as coco
from instdiff_jax.data.arrays import new_array
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.examples import DataConfig, select_instances
from instdiff_jax.data.images import Crop
from instdiff_jax.data.latents import LatentCache, cache_latents
from instdiff_jax.data.loader import BatchReader, DevicePrefetch, LoaderSettings, Sources, make_loader
from instdiff_jax.data.phrases import phrase_table
from instdiff_jax.errors import InputError
from instdiff_jax.images import open_image
from instdiff_jax.models.regions import region_bits

SIZE = 64
CONFIG = DataConfig(image_size=SIZE, map_size=SIZE)


def tokenize(captions):
    """A caption as its characters."""
    return np.array([[ord(c) for c in caption[:32].ljust(32)] for caption in captions], np.int32)


def embed(phrases):
    return np.stack([np.full(8, 1.0 + len(phrase), np.float32) for phrase in phrases])


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loader")
    make_coco(folder / "coco", train=11, val=2)
    coco.main(["--coco_dir", str(folder / "coco"), "--data_dir", str(folder / "data")])
    phrase_table(folder / "data", "test", embed)
    return folder / "data"


@pytest.fixture(scope="module")
def settings(data_dir):
    return dict(tokenize=tokenize, phrases=phrase_table(data_dir, "test"), batch_size=4, seed=5)


def load(dataset, examples, tokenize, phrases, start_step=0, latents=None, **settings):
    """A loader; its settings by name."""
    return make_loader(Sources(dataset, tokenize, phrases, latents), LoaderSettings(examples, **settings), start_step)


def reader_of(dataset, examples, phrases, batch_size=4, **settings):
    return BatchReader(Sources(dataset, tokenize, phrases), LoaderSettings(examples, batch_size, seed=5, **settings))


def take(loader, count):
    return [next(loader) for _ in range(count)]


def flatten(batch):
    return {key: value for key, value in batch.items() if key != "grounding"} | batch["grounding"]


def join(parts):
    parts = [flatten(part) for part in parts]
    batch = {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}
    first = {key: batch.pop(key) for key in ("image", "caption_ids")}
    return first | {"grounding": batch}


def test_shapes(data_dir, settings):
    batch = next(load(InstanceDataset(data_dir, "train"), CONFIG, **settings))
    shapes = {key: (value.shape, value.dtype.name) for key, value in flatten(batch).items()}
    slots = {key: ((4, 30), "float32") for key in ("valid", "has_box", "has_point", "has_scribble", "has_mask")}
    assert shapes == slots | {
        "image": ((4, SIZE, SIZE, 3), "uint8"),
        "caption_ids": ((4, 32), "int32"),
        "boxes": ((4, 30, 4), "float32"),
        "points": ((4, 30, 2), "float32"),
        "scribbles": ((4, 30, 40), "float32"),
        "mask_points": ((4, 30, 512), "float32"),
        "maps": ((4, SIZE, SIZE), "uint32"),
        "has_map": ((4,), "float32"),
        "phrase_embeddings": ((4, 30, 8), "float32"),
    }


def test_processes_make_the_same_batches(data_dir, settings):
    """One process, two, four, and two that take every other row."""
    dataset = InstanceDataset(data_dir, "train")
    whole = take(load(dataset, CONFIG, **settings), 6)
    for split in ([[0, 1], [2, 3]], [[0], [1], [2], [3]]):
        parts = [take(load(dataset, CONFIG, rows=rows, **settings), 6) for rows in split]
        for step in range(6):
            assert_same_trees(join([part[step] for part in parts]), whole[step])
    odd = take(load(dataset, CONFIG, rows=[3, 1], **settings), 2)
    np.testing.assert_array_equal(odd[1]["image"], whole[1]["image"][[3, 1]])


def test_resuming_equals_running_on(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    whole = take(load(dataset, CONFIG, **settings), 7)
    for start in (1, 5):
        rest = take(load(dataset, CONFIG, start_step=start, **settings), 7 - start)
        for step, batch in enumerate(rest, start):
            assert_same_trees(batch, whole[step])
    far = next(load(dataset, CONFIG, start_step=10**7, **settings))
    assert far["image"].shape[0] == 4


def test_workers_make_the_same_batches(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    whole = take(load(dataset, CONFIG, **settings), 5)
    for step, batch in enumerate(take(load(dataset, CONFIG, workers=2, **settings), 5)):
        assert_same_trees(batch, whole[step])


def test_every_image_once_an_epoch(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    reader = reader_of(dataset, CONFIG, settings["phrases"])
    order = [int(reader.order[i]) for i in range(33)]
    epochs = [order[i : i + 11] for i in (0, 11, 22)]
    assert all(sorted(epoch) == list(range(11)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    straight = reader_of(dataset, CONFIG, settings["phrases"], shuffle=False)
    assert [int(straight.order[i]) for i in range(12)] == [*range(11), 0]


def test_draws_change_with_seed_and_epoch(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    one = load(dataset, CONFIG, **settings)
    other = load(dataset, CONFIG, **(settings | {"seed": 6}))
    assert not np.array_equal(next(one)["image"], next(other)["image"])
    reader = reader_of(dataset, CONFIG.without_chance(), settings["phrases"], 11, shuffle=False)
    first, second = reader(0), reader(1)
    np.testing.assert_array_equal(first["image"], second["image"])
    assert (first["caption_ids"] != second["caption_ids"]).any()
    # The same images in another epoch: another of their captions, other scribbles, the same masks.
    np.testing.assert_array_equal(first["grounding"]["maps"], second["grounding"]["maps"])
    assert not np.array_equal(first["grounding"]["scribbles"], second["grounding"]["scribbles"])


def test_null_grounding_and_dropout(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    args = (settings["phrases"], 8)
    null = reader_of(dataset, DataConfig(image_size=SIZE, map_size=SIZE, null_grounding=1.0), *args)(0)
    assert not any(array.any() for array in null["grounding"].values())
    per_batch = DataConfig(image_size=SIZE, map_size=SIZE, null_grounding=0.4, dropout_per="batch", only_point=0.5)
    by_batch, by_sample = set(), set()
    for step in range(12):
        grounding = reader_of(dataset, per_batch, *args)(step)["grounding"]
        by_batch.add(len(np.unique(grounding["valid"][:, 0])))
        sample = reader_of(dataset, DataConfig(image_size=SIZE, map_size=SIZE, null_grounding=0.4), *args)(step)
        by_sample.add(len(np.unique(sample["grounding"]["valid"][:, 0])))
    assert by_batch == {1} and 2 in by_sample


def test_phrase_embeddings_follow_the_instances(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    reader = reader_of(dataset, CONFIG.without_chance(), settings["phrases"], shuffle=False)
    grounding = reader(0)["grounding"]
    np.testing.assert_array_equal(grounding["phrase_embeddings"].any(axis=-1), grounding["valid"] > 0)
    for i in range(4):
        record = dataset[i]
        chosen = select_instances(record, Crop(record.width, record.height, SIZE), CONFIG)
        expected = [1.0 + len(instance.category) for instance, _ in chosen]
        assert grounding["phrase_embeddings"][i, : len(chosen), 0].tolist() == expected


def encode(canvases):
    """A stand-in for an autoencoder: 8×8 blocks averaged."""
    blocks = canvases.astype(np.float32).reshape(len(canvases), SIZE // 8, 8, SIZE // 8, 8, 3).mean(axis=(2, 4))
    return blocks, blocks - 100


def test_cached_latents_follow_image_and_flip(data_dir, settings, tmp_path):
    dataset = InstanceDataset(data_dir, "train")
    cache = cache_latents(encode, dataset, tmp_path / "latents", "vae", SIZE, batch_size=5)
    images = take(load(dataset, CONFIG, **settings), 4)
    latents = take(load(dataset, CONFIG, latents=cache, **settings), 4)
    for with_image, with_latents in zip(images, latents, strict=True):
        assert "image" not in with_latents
        np.testing.assert_array_equal(with_latents["latent_mean"], encode(with_image["image"])[0])
        np.testing.assert_array_equal(with_latents["latent_logvar"], encode(with_image["image"])[1])
        np.testing.assert_array_equal(with_latents["caption_ids"], with_image["caption_ids"])
        np.testing.assert_array_equal(with_latents["grounding"]["scribbles"], with_image["grounding"]["scribbles"])
    again = cache_latents(lambda canvases: pytest.fail("made twice"), dataset, tmp_path / "latents", "vae", SIZE)
    copy = shutil.copytree(tmp_path / "latents", tmp_path / "damaged")
    content = bytearray((copy / "logvar.npy").read_bytes())
    content[-1] ^= 1
    (copy / "logvar.npy").write_bytes(content)
    damaged = LatentCache(copy, dataset, "vae", SIZE)
    damaged.lookup(0, False)
    with pytest.raises(InputError, match=f"logvar.npy: image {len(dataset) - 1}: damaged"):
        damaged.lookup(len(dataset) - 1, True)
    np.testing.assert_array_equal(again.lookup(3, True)[0], cache.lookup(3, True)[0])
    with pytest.raises(InputError, match="encoder: expected 'other'"):
        LatentCache(tmp_path / "latents", dataset, "other", SIZE)
    with pytest.raises(InputError, match="dataset: expected"):
        LatentCache(tmp_path / "latents", InstanceDataset(data_dir, "val"), "vae", SIZE)


def test_latents_of_unflipped_images_alone(data_dir, tmp_path):
    dataset = InstanceDataset(data_dir, "train")
    cache = cache_latents(encode, dataset, tmp_path / "latents", "vae", SIZE, flips=False)
    image = Crop(dataset[3].width, dataset[3].height, SIZE, False).image(open_image(dataset[3].image))
    np.testing.assert_array_equal(cache.lookup(3, False)[0], encode(image[None])[0][0])
    assert np.load(tmp_path / "latents" / "mean.npy", mmap_mode="r").shape[0] == 1
    with pytest.raises(InputError, match="flips: expected True"):
        LatentCache(tmp_path / "latents", dataset, "vae", SIZE)


def test_two_runs_may_make_one_cache(data_dir, tmp_path):
    """The second waits for the first, and finds what it has made."""
    dataset, path = InstanceDataset(data_dir, "train"), tmp_path / "latents"
    begun, calls = threading.Event(), []

    def slow_encode(canvases):
        calls.append(len(canvases))
        begun.set()
        time.sleep(0.05)
        return encode(canvases)

    def make():
        cache_latents(slow_encode, dataset, path, "vae", SIZE, batch_size=5)

    first = threading.Thread(target=make)
    first.start()
    begun.wait()
    second = cache_latents(lambda canvases: pytest.fail("made twice"), dataset, path, "vae", SIZE)
    first.join()
    image = Crop(dataset[3].width, dataset[3].height, SIZE, False).image(open_image(dataset[3].image))
    np.testing.assert_array_equal(second.lookup(3, False)[0], encode(image[None])[0][0])
    assert len(calls) == -(-2 * len(dataset) // 5)


@pytest.mark.parametrize("orientation", ["correct", "official"])
def test_regions_are_those_of_the_groundings(data_dir, settings, orientation):
    dataset = InstanceDataset(data_dir, "train")
    batch = next(load(dataset, CONFIG, masked=(orientation, 8), **settings))
    assert "regions" not in next(load(dataset, CONFIG, **settings))
    for i in range(settings["batch_size"]):
        grounding = {name: value[i] for name, value in batch["grounding"].items()}
        visual, tokens = region_bits(grounding, 8, 8, orientation)
        np.testing.assert_array_equal(batch["regions"]["visual"][i], visual)
        np.testing.assert_array_equal(batch["regions"]["tokens"][i], tokens)


def test_fewer_slots(data_dir, settings):
    """`max_instances` keeps the largest: batches are the first slots of those without it."""
    dataset = InstanceDataset(data_dir, "train")
    config = dataclasses.replace(CONFIG, max_instances=2)
    fewer = take(load(dataset, config, masked=("correct", 8), **settings), 3)
    whole = take(load(dataset, CONFIG, masked=("correct", 8), **settings), 3)
    assert max(batch["grounding"]["valid"].sum(axis=1).max() for batch in whole) > 2  # something is left out
    for few, all_ in zip(fewer, whole, strict=True):
        for key, value in few["grounding"].items():
            if key == "maps":
                np.testing.assert_array_equal(value, all_["grounding"][key] & np.uint32(3))
            elif key in ("boxes", "points", "valid", "phrase_embeddings"):
                np.testing.assert_array_equal(value, all_["grounding"][key][:, :2], err_msg=key)
            elif key != "has_map":
                assert value.shape == (4, 2, *all_["grounding"][key].shape[2:])
        assert few["regions"]["tokens"].shape == (4, 184)


def test_everything_sent_to_workers_is_small(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    reader = reader_of(dataset, CONFIG, settings["phrases"])
    reader(0)
    assert_same_trees(pickle.loads(pickle.dumps(reader))(3), reader(3))
    assert len(pickle.dumps((reader.sources.dataset, reader.sources.phrases))) < 2000


def test_device_prefetch():
    batches = DevicePrefetch(iter(range(5)), lambda value: value * 10)
    assert list(batches) == [0, 10, 20, 30, 40]
    assert batches.wait_seconds > 0

    def slow():
        yield 1
        time.sleep(0.2)
        raise InputError("broken")

    batches = DevicePrefetch(slow(), lambda value: value)
    assert next(batches) == 1
    for _ in range(2):
        with pytest.raises(InputError, match="broken"):
            next(batches)
    assert batches.wait_seconds > 0.1
    threads = threading.active_count()
    endless = DevicePrefetch(iter(range(10**9)), lambda value: value)
    next(endless)
    endless.close()
    assert threading.active_count() == threads


def test_bad_settings(data_dir, settings):
    dataset = InstanceDataset(data_dir, "train")
    with pytest.raises(InputError, match="rows: expected numbers from 0 to 3"):
        load(dataset, CONFIG, rows=[4], **settings)
    with pytest.raises(InputError, match="seed"):
        load(dataset, CONFIG, **(settings | {"seed": -1}))


def test_an_array_has_its_room_on_the_disk(tmp_path):
    """Else a disk that is full later ends the process by a signal, which nothing can report."""
    array = new_array(tmp_path / "a.npy", np.float32, (300, 1000))
    assert array.shape == (300, 1000) and not array.any()
    if hasattr(os, "posix_fallocate"):
        assert (tmp_path / "a.npy").stat().st_blocks * 512 >= array.nbytes
        resource = pytest.importorskip("resource")
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
            with pytest.raises(OSError):
                new_array(tmp_path / "b.npy", np.float32, (300, 1000))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            signal.signal(signal.SIGXFSZ, handler)
