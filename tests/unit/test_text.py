"""Token ids equal transformers' own; long texts are named; a tokenizer that is not there is an error."""

import json
import logging
import shutil
import subprocess
import sys

import numpy as np
import pytest
from transformers import CLIPTokenizer

from common import PARITY
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.errors import InputError
from instdiff_jax.models.tokenizer import Tokenizer

FOLDER = PARITY / "tokenizer"
TEXTS = [
    "",
    "a dog",
    "A Gray British Shorthair, standing on a rock!",
    "  two\n spaces\tand tabs  ",
    "café 猫 🐶 naïve",
    "it's 3.14 <|endoftext|> more",
    "x",
]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(FOLDER, 1024)


@pytest.mark.parametrize("max_length", [77, 16])
def test_ids_equal_transformers(max_length):
    texts = [*TEXTS, "a very long caption of many words " * 20]
    reference = CLIPTokenizer.from_pretrained(FOLDER, local_files_only=True)
    options = dict(truncation=True, max_length=max_length, padding="max_length")
    expected = np.array(reference(texts, **options)["input_ids"])
    tokenizer = Tokenizer(FOLDER, 1024, max_length)
    for ids in (tokenizer.encode_prompts(texts), tokenizer.encode_phrases(texts)):
        assert ids.dtype == np.int32 and ids.shape == (len(texts), max_length)
        np.testing.assert_array_equal(ids, expected)


def test_rows_begin_and_end(tokenizer):
    ids = tokenizer.encode_prompts(["", "a dog", "word " * 300])
    assert tokenizer.eos_id == 1023
    np.testing.assert_array_equal(ids[:, 0], 1022)
    assert (ids.argmax(axis=1) == [1, 3, 76]).all() and (ids[0, 1:] == 1023).all()
    assert tokenizer.encode_prompts([]).shape == (0, 77)


def test_long_texts_are_named_once(tokenizer, caplog):
    long = "a small red bird that sits on a very old wooden fence " * 10
    with caplog.at_level(logging.WARNING):
        tokenizer.encode_phrases(["short", long, long])
        tokenizer.encode_prompts(["short", long])
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2 and messages[0].startswith("phrase of ") and messages[1].startswith("prompt of ")
    assert all("cut to 77" in message and "a small red bird" in message and "\n" not in message for message in messages)


def test_a_text_of_exactly_77_tokens_is_not_cut(tokenizer, caplog):
    word = "a "
    assert len(tokenizer._tokenizer(word * 75)["input_ids"]) == 77
    with caplog.at_level(logging.WARNING):
        ids = tokenizer.encode_prompts([word * 75])
    assert not caplog.records and ids[0, -1] == 1023 and ids[0, -2] != 1023


def test_half_a_surrogate_pair_is_an_input_error(tokenizer):
    with pytest.raises(InputError, match="^prompt .*expected valid Unicode"):
        tokenizer.encode_prompts(["a \ud800 dog"])


def test_missing_tokenizers_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    shutil.copytree(FOLDER, tmp_path / "broken")
    (tmp_path / "broken" / "vocab.json").write_text("{")
    for name in (tmp_path / "absent", tmp_path / "empty", tmp_path / "broken", "no-such-owner/no-such-tokenizer"):
        with pytest.raises(InputError) as error:
            Tokenizer(name, 1024)
        assert str(error.value).startswith(f"tokenizer {name}: ") and "\n" not in str(error.value)


def test_a_tokenizer_that_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="expected ids below the text encoder's 1000, got 1023"):
        Tokenizer(FOLDER, 1000)
    # A larger text encoder may take a smaller tokenizer.
    assert Tokenizer(FOLDER, 49408).eos_id == 1023
    shutil.copytree(FOLDER, tmp_path / "tokenizer")
    vocab = json.loads((FOLDER / "vocab.json").read_text())
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocab | {"extra</w>": 1024}))
    with pytest.raises(InputError, match="expected the end token's id to be 1024, got 1023"):
        Tokenizer(tmp_path / "tokenizer", 2000)


def test_two_tokens_of_one_id_are_no_vocabulary(tmp_path):
    shutil.copytree(FOLDER, tmp_path / "tokenizer")
    vocab = json.loads((FOLDER / "vocab.json").read_text())
    for wrong in (7, -1):
        (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocab | {"a</w>": wrong}))
        with pytest.raises(InputError, match="vocab.json: expected ids from 0 on, each for one token"):
            find_tokenizer(str(tmp_path / "tokenizer"), 1024)


def test_save_gives_the_same_ids(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "copy")
    copy = Tokenizer(tmp_path / "copy", 1024)
    np.testing.assert_array_equal(copy.encode_prompts(TEXTS), tokenizer.encode_prompts(TEXTS))


def test_import_is_light():
    """A loaded tokenizer pulls in neither torch nor TensorFlow; the module alone not even transformers."""
    code = f"""
import sys
from instdiff_jax import grounding, layout
from instdiff_jax.models import tokenizer
assert "transformers" not in sys.modules
tokenizer.Tokenizer({str(FOLDER)!r}, 1024)
heavy = {{"torch", "tensorflow", "matplotlib", "grain", "tensorflow_datasets"}} & set(sys.modules)
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=PARITY.parent.parent)
