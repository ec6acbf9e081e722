"""One bit flipped anywhere in a file that we read: an error that names the file, or the same values as before."""

import dataclasses
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from coco_fixture import make_coco
from PIL import Image
from tiny_checkpoint import TOKENIZER, tiny_config

from instdiff_jax.checkpoint import folder, parts, torch_file
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.cli import build_coco
from instdiff_jax.config import SamplingConfig
from instdiff_jax.data.dataset import InstanceDataset
from instdiff_jax.data.latents import LatentCache, cache_latents
from instdiff_jax.data.phrases import ImportedEmbeddings, phrase_table, read_phrases
from instdiff_jax.errors import InputError
from instdiff_jax.images import open_image
from instdiff_jax.tree import flatten, unflatten

# From orbax's reader of a damaged file: its own event loop, and values of damaged notes before they are compared.
pytestmark = pytest.mark.filterwarnings("ignore")


def flip_bits(files: list[Path], count: int, read: Callable[[Path], object], seed: int = 0) -> Counter:
    """Flips one bit at a time, each in a random file at a random place; counts what `read` then says.

    `read` gets the file and returns what it read from it: numpy arrays, plain values, or trees of them.
    """
    random, outcomes = np.random.default_rng(seed), Counter()
    whole = {}
    for _ in range(count):
        file = files[random.integers(len(files))]
        if file not in whole:
            whole[file] = digest(read(file))
        place, bit = int(random.integers(file.stat().st_size)), 1 << int(random.integers(8))
        flip(file, place, bit)
        try:
            found = digest(read(file))
        except InputError as error:
            assert "\n" not in str(error), error
            outcomes["detected"] += 1
        else:
            assert found == whole[file], f"{file.name}: bit {bit} of byte {place} changed what is read"
            outcomes["in bytes that nothing reads"] += 1
        flip(file, place, bit)
    print(dict(outcomes))
    return outcomes


def flip(file: Path, place: int, bit: int) -> None:
    with file.open("r+b") as opened:
        opened.seek(place)
        (byte,) = opened.read(1)
        opened.seek(place)
        opened.write(bytes([byte ^ bit]))


def digest(value: object) -> object:
    """Something to compare by ==."""
    arrays, structure = jax.tree.flatten(value)
    return str(structure), [parts.tree_digest({"": np.asarray(x)}) if hasattr(x, "dtype") else repr(x) for x in arrays]


def all_files(*folders: Path) -> list[Path]:
    return sorted(path for each in folders for path in each.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize(
    ("flips", "vocabulary"), [(8, 1024), pytest.param(500, 1_048_576, marks=pytest.mark.slow)], ids=["few", "500"]
)
def test_of_a_checkpoint_folder(tmp_path, monkeypatch, flips, vocabulary):
    """With one part of one file for each array: with the longer vocabulary it has 269 MB, and is so by itself."""
    config = tiny_config()
    config = dataclasses.replace(config, text_encoder=dataclasses.replace(config.text_encoder, vocab_size=vocabulary))
    random = np.random.default_rng(0)
    params = unflatten(
        {path: random.random(shape, np.float32) for path, shape in flatten(parameter_shapes(config)).items()}
    )
    if vocabulary == 1024:
        monkeypatch.setattr(parts, "SMALL_PART", sum(leaf.nbytes for leaf in jax.tree.leaves(params["text_encoder"])))
    folder.save_folder(tmp_path / "x", params, config, SamplingConfig(), TOKENIZER)
    del params
    large = [path.parent.name for path in tmp_path.glob("x/params/*/_CRC32")]
    assert "text_encoder" in large and (vocabulary == 1024 or len(large) == 1)

    def read(file: Path) -> object:
        part = file.relative_to(tmp_path / "x").parts[1:2]
        held = [part[0]] if part and part[0] in ("unet", "unifusion", "autoencoder") else ["text_encoder"]
        words = file.read_bytes() if file.parent.name == "tokenizer" else b""
        return folder.read_config(tmp_path / "x"), folder.restore_params(tmp_path / "x", held, as_numpy=True), words

    traced: dict[str, dict] = {}

    def trace_once(*given):  # it takes longer than reading
        key = repr(given)
        if key not in traced:
            traced[key] = parameter_shapes(*given)
        return traced[key]

    monkeypatch.setattr(folder, "parameter_shapes", trace_once)
    outcomes = flip_bits(all_files(tmp_path / "x"), flips, read)
    assert outcomes["detected"] > flips / 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A dataset with embeddings that came with it, a phrase table and a cache of latents."""
    directory = tmp_path_factory.mktemp("flips")
    make_coco(directory / "coco", train=4, val=2, broken=False)
    flags = ["--coco_dir", str(directory / "coco"), "--data_dir", str(directory / "data")]
    build_coco.main([*flags, "--splits", "train2017"])
    data = directory / "data"
    phrases = read_phrases(data)
    imported = ImportedEmbeddings()
    for number, phrase in enumerate(phrases[1:]):
        imported.add(phrase, np.full(4, number, np.float32))
    imported.write(data, phrases)
    phrase_table(data, "encoder", embed)
    cache_latents(encode, InstanceDataset(data, "train"), data / "latents", "vae", 16)
    return data


def embed(phrases):
    return np.array([[len(text), *range(3)] for text in phrases], np.float32)


def encode(canvases):
    mean = np.asarray(canvases[:, ::8, ::8], np.float32)
    return mean, -mean


@pytest.mark.parametrize("flips", [60, pytest.param(500, marks=pytest.mark.slow)])
def test_of_a_dataset_its_phrases_and_latents(data, flips):
    """Tables of an encoder that does not match are made again, from the phrases: `embed` is of them."""

    def read(file: Path) -> object:
        dataset = InstanceDataset(data, "train")
        cache = LatentCache(data / "latents", dataset, "vae", 16)
        rows = [cache.lookup(index, flip) for index in range(len(dataset)) for flip in (False, True)]
        tables = [phrase_table(data, "encoder"), phrase_table(data, "again", embed, use_imported=True)]
        found = [table.lookup(np.arange(len(table))) for table in tables]
        shutil.rmtree(data / "phrases" / "again-imported")
        return read_phrases(data), rows, found, cache.deviation()

    files = [file for file in all_files(data) if file.name != "report.json" and file.suffix in (".json", ".npy")]
    files = [file for file in files if "instances" not in file.parts]
    outcomes = flip_bits(files, flips, read)
    assert outcomes["detected"] > flips / 2


@pytest.mark.parametrize("flips", [200, pytest.param(5000, marks=pytest.mark.slow)])
def test_of_inputs(tmp_path, flips):
    """PNG, .pth, and the .safetensors that we write. JPEG, and foreign .safetensors, have no checksum to compare."""
    values = {"a": np.arange(40, dtype=np.float32), "b": np.ones((3, 5), np.float16)}
    torch.save({name: torch.from_numpy(value) for name, value in values.items()}, tmp_path / "x.pth")
    torch_file.write_safetensors(tmp_path / "x.safetensors", values)
    pixels = np.add.outer(np.arange(24), np.arange(20)).astype(np.uint8)
    Image.fromarray(pixels).convert("RGB").save(tmp_path / "x.png")
    Image.fromarray(pixels).convert("P").save(tmp_path / "palette.png", transparency=3)

    def read(file: Path) -> object:
        if file.suffix == ".png":
            try:
                return np.asarray(open_image(file))
            except ValueError as error:  # its callers add the file's name
                raise InputError(str(error)) from error
        return {name: np.asarray(value) for name, value in torch_file.read_file(file).items()}

    outcomes = flip_bits(all_files(tmp_path), flips, read)
    assert outcomes["detected"] > flips / 2
