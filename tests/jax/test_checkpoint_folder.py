"""Checkpoint folders: they describe themselves, appear whole or not at all, and refuse what is damaged."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_checkpoint import TOKENIZER, tiny_config
from trees import assert_same_trees

from instdiff_jax.checkpoint import folder, parts, verify
from instdiff_jax.checkpoint.shapes import parameter_shapes
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.config import (
    SamplingConfig,
)
from instdiff_jax.errors import InputError
from instdiff_jax.tree import flatten, unflatten

TINY = tiny_config()


def tiny_params(absent=()) -> dict:
    random = np.random.default_rng(0)
    shapes = flatten(parameter_shapes(TINY, absent))
    return unflatten({path: random.standard_normal(shape).astype(np.float32) for path, shape in shapes.items()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    directory = tmp_path_factory.mktemp("folder") / "tiny"
    folder.save_folder(directory, tiny_params(), TINY, SamplingConfig(steps=7), TOKENIZER)
    return directory


@pytest.fixture(scope="module", params=["few files", "a file an array"])
def either(request, saved, tmp_path_factory):
    """The same folder as a small model's and as a large one's."""
    if request.param == "few files":
        return saved
    directory = tmp_path_factory.mktemp("large") / "tiny"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parts, "SMALL_PART", 0)
        folder.save_folder(directory, tiny_params(), TINY, SamplingConfig(steps=7), TOKENIZER)
    return directory


def data_files(part):
    """Files of a part with numbers in them, the largest first; orbax's notes start with _ or . or are not numbers."""
    files = [path for path in part.rglob("*") if path.is_file() and path.name[0] not in "_." and path.suffix != ".txt"]
    return sorted(files, key=lambda path: (-path.stat().st_size, path))


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "copy")


def test_what_is_saved_is_restored(saved):
    model, sampling, absent = folder.read_config(saved)
    assert sampling == SamplingConfig(steps=7) and absent == ()
    assert model.unet == TINY.unet and model.text_encoder.tokenizer == str(saved / "tokenizer")
    assert (saved / "tokenizer" / "merges.txt").read_bytes() == (TOKENIZER / "merges.txt").read_bytes()
    params = folder.restore_params(saved)
    assert_same_trees(params, tiny_params())
    assert all(isinstance(leaf, jax.Array) and leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert sorted(path.name for path in saved.parent.iterdir()) == ["tiny"]


def test_small_parts_are_few_files_and_large_ones_a_file_an_array(saved, either):
    arrays = len(jax.tree.leaves(tiny_params()["unet"]))
    assert arrays > 100
    if either == saved:
        assert len(data_files(either / "params/unet")) < 30
        assert set(folder.stored_digests(either)) == {"unet", "unifusion", "autoencoder", "text_encoder"}
    else:
        assert len(data_files(either / "params/unet")) >= arrays
        assert folder.stored_digests(either) == {}
    assert_same_trees(folder.restore_params(either), tiny_params())


def test_it_can_be_moved(copied):
    model, _, _ = folder.read_config(copied)
    assert find_tokenizer(model.text_encoder.tokenizer, 1024) == copied / "tokenizer"
    folder.restore_params(copied, parts=["text_encoder"])


def test_parts_types_and_places(saved):
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    params = folder.restore_params(saved, ["autoencoder"], dtype=jnp.bfloat16, sharding=sharding)
    assert list(params) == ["autoencoder"]
    for path, leaf in flatten(params).items():
        assert leaf.dtype == (jnp.bfloat16 if leaf.ndim >= 2 else jnp.float32), path
        assert leaf.sharding == sharding
    tree = {"autoencoder": jax.tree.map(lambda _: sharding, params["autoencoder"])}
    assert_same_trees(
        folder.restore_params(saved, ["autoencoder"], sharding=tree), {"autoencoder": tiny_params()["autoencoder"]}
    )
    numpy_params = folder.restore_params(saved, ["unifusion"], dtype=None, as_numpy=True)
    assert all(type(leaf) is np.ndarray for leaf in flatten(numpy_params).values())


def test_half_precision_is_kept_as_stored_and_widened_on_request(tmp_path):
    params = jax.tree.map(lambda x: x.astype(np.float16), tiny_params())
    folder.save_folder(tmp_path / "x", params, TINY, SamplingConfig(), TOKENIZER)
    stored = folder.restore_params(tmp_path / "x", ["unet"], dtype=None, as_numpy=True)
    assert {leaf.dtype for leaf in flatten(stored).values()} == {np.dtype(np.float16)}
    wide = folder.restore_params(tmp_path / "x", ["unet"])
    assert {leaf.dtype for leaf in flatten(wide).values()} == {np.dtype(np.float32)}


def test_absent_adapters(tmp_path):
    absent = ("fusers", "scaleu", "unifusion")
    params = tiny_params(absent)
    assert list(params["unifusion"]) == ["trunk"]
    folder.save_folder(tmp_path / "x", params, TINY, SamplingConfig(), TOKENIZER, absent)
    assert folder.read_config(tmp_path / "x")[2] == absent
    assert_same_trees(folder.restore_params(tmp_path / "x"), params)
    everything = ("fusers", "scaleu", "unifusion", "trunk")
    folder.save_folder(tmp_path / "y", tiny_params(everything), TINY, SamplingConfig(), TOKENIZER, everything)
    with pytest.raises(InputError, match="unifusion: this checkpoint does not have it"):
        folder.restore_params(tmp_path / "y", ["unifusion"])


def test_nothing_is_overwritten_unasked(saved, copied, tmp_path):
    with pytest.raises(InputError, match="--overwrite"):
        folder.save_folder(copied, tiny_params(), TINY, SamplingConfig(), TOKENIZER)
    folder.save_folder(copied, tiny_params(), TINY, SamplingConfig(steps=9), TOKENIZER, overwrite=True)
    assert folder.read_config(copied)[1].steps == 9
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    with pytest.raises(InputError, match="not empty"):
        folder.save_folder(tmp_path / "mine", tiny_params(), TINY, SamplingConfig(), TOKENIZER, overwrite=True)
    with pytest.raises(InputError, match="not a folder"):
        folder.check_output(tmp_path / "mine" / "thesis.txt", overwrite=True)
    (tmp_path / "empty").mkdir()
    folder.check_output(tmp_path / "empty")


def test_a_failed_save_leaves_nothing_and_keeps_the_old(copied, monkeypatch):
    params = tiny_params()
    del params["unet"]["conv_in"]["bias"]
    with pytest.raises(InputError, match="1 missing: unet/conv_in/bias"):
        folder.save_folder(copied, params, TINY, SamplingConfig(), TOKENIZER, overwrite=True)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(folder, "save_part", fail)
    with pytest.raises(InputError, match="copy: cannot be written: disk full"):
        folder.save_folder(copied, tiny_params(), TINY, SamplingConfig(), TOKENIZER, overwrite=True)
    monkeypatch.undo()
    assert sorted(path.name for path in copied.parent.iterdir()) == ["copy"]
    assert_same_trees(folder.restore_params(copied), tiny_params())


def edit(directory, change):
    path = directory / "config.json"
    content = json.loads(path.read_text())
    change(content)
    del content["crc32"]
    path.write_text(json.dumps(content))


def test_a_changed_setting_is_noticed(copied):
    """Any digit: of the sampling defaults, of the sizes, of a part's digest."""
    path = copied / "config.json"
    whole = path.read_text()
    for old, new in (
        ('"steps": 7', '"steps": 5'),
        ('"num_heads": 2', '"num_heads": 4'),
        ('"sha256": "', '"sha256": "0'),
    ):
        assert old in whole
        path.write_text(whole.replace(old, new, 1))
        with pytest.raises(InputError, match=r"config\.json: damaged or edited.*remove its crc32"):
            folder.restore_params(copied)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="x"), "format"),
        (lambda c: c.update(version=2), "version: expected 1, got 2"),
        (lambda c: c.pop("absent"), "absent"),
        (lambda c: c.update(absent=["unet"]), "absent"),
        (lambda c: c.pop("params"), "params"),
        (lambda c: c["model"].pop("unet"), "model.unet: missing"),
        (lambda c: c["model"]["unet"].update(num_heads="8"), "num_heads: expected int"),
        (lambda c: c["sampling"].update(steps=0), "sampling.steps"),
    ],
)
def test_damaged_config(copied, change, message):
    edit(copied, change)
    with pytest.raises(InputError, match=message) as error:
        folder.restore_params(copied)
    assert "config.json" in str(error.value)


def test_config_of_other_sizes_names_the_parameter(copied):
    edit(copied, lambda c: c["model"]["unet"].update(context_dim=40))
    with pytest.raises(InputError, match=r"unet/.*file \[64, 32\], config \[40, 32\]"):
        folder.restore_params(copied)


def test_missing_and_damaged_files(either, tmp_path):
    for number, damage in enumerate(("remove", "cut", "config", "no folder")):
        copy = shutil.copytree(either, tmp_path / str(number))
        file = data_files(copy / "params/unet")[0]
        if damage == "remove":
            file.unlink()
        elif damage == "cut":
            file.write_bytes(file.read_bytes()[:-4])
        elif damage == "config":
            (copy / "config.json").write_text("{")
        else:
            shutil.rmtree(copy / "params/unet")
        with pytest.raises(InputError) as error:
            folder.restore_params(copy)
        assert str(copy) in str(error.value) and "\n" not in str(error.value)
    with pytest.raises(InputError, match="no config.json"):
        folder.restore_params(tmp_path)


def flip(file, place):
    content = bytearray(file.read_bytes())
    content[int(place * len(content))] ^= 1
    file.write_bytes(content)


def test_changed_values_are_noticed(either, tmp_path):
    """Of the size they had: what a disk or a copy has got wrong. Parts note a hash of their values or files."""
    for part in ("unet", "text_encoder"):
        copy = shutil.copytree(either, tmp_path / part)
        flip(max(data_files(copy / "params" / part), key=lambda path: path.stat().st_size), 0.5)
        with pytest.raises(InputError, match=f"{part}.*: damaged"):
            folder.restore_params(copy)
        assert folder.restore_params(copy, verify=False).keys() == folder.restore_params(either).keys()


def test_changed_bytes_of_a_large_part_are_noticed_wherever_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(parts, "SMALL_PART", 0)
    folder.save_folder(tmp_path / "x", tiny_params(), TINY, SamplingConfig(), TOKENIZER)
    random = np.random.default_rng(0)
    files = sorted(path for path in (tmp_path / "x/params/text_encoder").rglob("*") if path.is_file())
    for number in random.choice(len(files), 12, replace=False):
        content = files[number].read_bytes()
        flip(files[number], random.random())
        with pytest.raises(InputError, match="damaged|do not match|expected") as error:
            folder.restore_params(tmp_path / "x", ("text_encoder",))
        assert "\n" not in str(error.value)
        files[number].write_bytes(content)
    folder.restore_params(tmp_path / "x", ("text_encoder",))


def test_a_folder_without_checksums_is_read(either, tmp_path):
    copy = shutil.copytree(either, tmp_path / "old")
    for path in (copy / "params").glob(f"*/{verify.CHECKSUMS}"):
        path.unlink()

    def older(content):
        del content["tokenizer"]
        for part, note in content["params"].items():
            if note.pop("crc32", None) is not None:
                content["params"][part] = parts._count_files(copy / "params" / part)

    edit(copy, older)
    assert_same_trees(folder.restore_params(copy), folder.restore_params(either))


def test_a_changed_tokenizer_is_noticed(copied):
    flip(copied / "tokenizer" / "merges.txt", 0.9)
    with pytest.raises(InputError, match=r"merges\.txt: damaged"):
        folder.restore_params(copied)
    folder.restore_params(copied, ("unet",))
    folder.restore_params(copied, verify=False)


def test_overwriting_deletes_nothing_else(saved, tmp_path):
    copy = shutil.copytree(saved, tmp_path / "copy")
    (copy / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"notes.txt: not part of the checkpoint"):
        folder.save_folder(copy, tiny_params(), TINY, SamplingConfig(), TOKENIZER, overwrite=True)
    assert (copy / "notes.txt").read_text() == "mine"
    (copy / "notes.txt").unlink()
    folder.save_folder(copy, tiny_params(), TINY, SamplingConfig(), TOKENIZER, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_a_tokenizer_without_merges(saved, tmp_path):
    cut = shutil.copytree(TOKENIZER, tmp_path / "cut")
    (cut / "merges.txt").write_text("#version: 0.2\n")
    with pytest.raises(InputError, match="merges.txt: no merges there"):
        find_tokenizer(str(cut))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # from the reader's own event loop
def test_damaged_metadata_ends_in_one_line_or_reads(either, tmp_path):
    copy = shutil.copytree(either, tmp_path / "copy")
    random = np.random.default_rng(0)
    for name in ("_METADATA", "conv_in.kernel/.zarray", "manifest.ocdbt"):
        path = copy / "params/unet" / name
        if not path.exists():
            continue
        original = path.read_bytes()
        for _ in range(6):
            damaged = bytearray(original)
            damaged[random.integers(len(damaged))] = random.integers(256)
            path.write_bytes(damaged)
            try:
                folder.restore_params(copy, ["unet"])
            except InputError as error:
                assert str(copy) in str(error) and "\n" not in str(error)
        path.write_bytes(original)


def test_tokenizers(tmp_path, monkeypatch):
    assert find_tokenizer(str(TOKENIZER), 1024) == TOKENIZER
    with pytest.raises(InputError, match="ids up to 1023, but the text encoder has 1000"):
        find_tokenizer(str(TOKENIZER), 1000)
    for name in ("nobody/no-such-tokenizer", "no such name!", str(tmp_path / "nowhere")):
        with pytest.raises(InputError, match="config.model.text_encoder.tokenizer"):
            find_tokenizer(name)
    with pytest.raises(InputError, match="no vocab.json and no merges.txt"):
        find_tokenizer(str(tmp_path))
    shutil.copytree(TOKENIZER, tmp_path / "bad")
    (tmp_path / "bad" / "vocab.json").write_text("[1, 2")
    with pytest.raises(InputError, match="vocab.json"):
        find_tokenizer(str(tmp_path / "bad"))
