"""A tokenizer learned from a dataset's words is a CLIP tokenizer like any other."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.cli.build_coco import main as make_dataset
from instdiff_jax.cli.build_tokenizer import main
from instdiff_jax.data.build_tokenizer import dataset_texts, write_tokenizer
from instdiff_jax.errors import InputError
from instdiff_jax.models.tokenizer import Tokenizer
from projects.shapes.render import write_coco

TEXTS = ["a red star on a grey background", "a red striped star", "two stars", "a grey heart"] * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tokenizer") / "words"
    write_tokenizer(TEXTS, path, 600, 16)
    return path


def decode(folder, ids):
    """The text that ids spell, by the vocabulary alone."""
    names = {i: token for token, i in json.loads((folder / "vocab.json").read_text()).items()}
    return "".join(names[i] for i in ids).replace("</w>", " ").strip()


def test_known_words_are_one_token_each(folder):
    tokenizer = Tokenizer(folder, 600, 16)
    ids = tokenizer.encode_prompts(["A red STAR on a grey background"])[0]
    words = [i for i in ids if i != tokenizer.eos_id][1:]
    assert len(words) == 7
    assert decode(folder, words) == "a red star on a grey background"


@given(st.text(alphabet=st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8))
@settings(deadline=None, max_examples=50)
def test_no_text_is_unknown(folder, text):
    tokenizer = Tokenizer(folder, 600, 77)
    ids = tokenizer.encode_phrases([text])[0]
    # The end token stands for the unknown too: none of it before the end.
    length = next(k for k, i in enumerate(ids) if i == tokenizer.eos_id)
    assert length > 1 and (ids[length:] == tokenizer.eos_id).all()
    assert length >= 1 + len(text.split()) or length == 76


def test_the_end_has_the_highest_id_and_sizes_are_kept(folder):
    entries = json.loads((folder / "vocab.json").read_text())
    assert sorted(entries.values()) == list(range(len(entries)))
    assert len(entries) <= 600
    assert entries["<|endoftext|>"] == len(entries) - 1
    assert find_tokenizer(str(folder), 600) == folder
    assert json.loads((folder / "tokenizer_config.json").read_text())["model_max_length"] == 16


def test_words_of_a_dataset(tmp_path, capsys):
    write_coco(tmp_path / "shapes", "train", 6, seed=5, size=32)
    notes = tmp_path / "shapes" / "annotations" / "instance_captions.json"
    data = str(tmp_path / "data")
    make_dataset(["--coco_dir", str(tmp_path / "shapes"), "--data_dir", data, "--instance_captions", str(notes)])
    texts = list(dataset_texts(data))
    captions = json.loads((tmp_path / "shapes" / "annotations" / "captions_train.json").read_text())["annotations"]
    assert {row["caption"] for row in captions} <= set(texts)
    assert set(json.loads(notes.read_text()).values()) <= set(texts)
    main(["--data_dir", data, "--output", str(tmp_path / "words")])
    assert (tmp_path / "words" / "merges.txt").is_file()
    assert "entries" in capsys.readouterr().out


def test_the_same_words_make_the_same_tokenizer(folder, tmp_path):
    write_tokenizer(TEXTS, tmp_path / "again", 600, 16)
    for name in ("vocab.json", "merges.txt"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()


def test_bad_arguments(folder, tmp_path):
    with pytest.raises(InputError, match="vocab_size: expected at least 514"):
        write_tokenizer(TEXTS, tmp_path / "small", 513)
    assert not (tmp_path / "small").exists()
    with pytest.raises(InputError, match="expected nothing there"):
        write_tokenizer(TEXTS, folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"):
        write_tokenizer(TEXTS, tmp_path / "file" / "words")
    with pytest.raises(SystemExit) as stop:
        main(["--data_dir", str(tmp_path / "none"), "--output", str(tmp_path / "words")])
    assert stop.value.code == 2
