"""Prompts' weights are read as in AUTOMATIC1111's web UI; long prompts become several rows."""

import logging

import numpy as np
import pytest

from common import PARITY
from instdiff_jax.config import SamplingConfig
from instdiff_jax.errors import InputError
from instdiff_jax.layout import Instance, Layout
from instdiff_jax.models.tokenizer import Tokenizer
from instdiff_jax.sampling.prompts import parse_weights, read_phrases, read_prompts

PLAIN, WEIGHTS = SamplingConfig(), SamplingConfig(prompt_weights=True)
LONG, BOTH = SamplingConfig(long_prompts=True), SamplingConfig(prompt_weights=True, long_prompts=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(PARITY / "tokenizer", 1024)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [
                ("a ", 1.0),
                ("house", 1.1 * 1.1 * 1.3),
                (" ", 1.1),
                ("on", 1.0),
                (" a ", 1.1),
                ("hill", 0.5 * 1.1),
                (", sun, ", 1.1),
                ("sky", 1.1**4),
                (".", 1.1),
            ],
        ),
        ("a: b (c: -1.2 )", [("a: b ", 1.0), ("c", -1.2)]),
        ("x) ] y:1.2)", [("x) ] y:1.2)", 1.0)]),
        ("(a:1.2.3)", [("a:1.2.3)", 1.1)]),
        ("", [("", 1.0)]),
    ],
)
def test_weights_are_read(text, expected):
    found = parse_weights(text)
    assert [part for part, _ in found] == [part for part, _ in expected]
    np.testing.assert_allclose([weight for _, weight in found], [weight for _, weight in expected], rtol=1e-12)


def test_off_or_without_brackets_nothing_changes(tokenizer):
    texts = ["a red (bird:1.5)", "two small dogs", ""]
    plain = read_prompts(tokenizer, texts, PLAIN)
    np.testing.assert_array_equal(plain.ids, tokenizer.encode_prompts(texts))
    assert plain.weights is None and plain.rows.tolist() == [[0], [1], [2]]
    for settings in (WEIGHTS, LONG, BOTH):
        same = read_prompts(tokenizer, texts[1:], settings)
        np.testing.assert_array_equal(same.ids, plain.ids[1:])
        assert same.weights is None and same.rows.tolist() == [[0], [1]]


def test_weights_lie_on_their_tokens(tokenizer):
    found = read_prompts(tokenizer, ["a (red bird:1.5) sits", "a dog"], WEIGHTS)
    np.testing.assert_array_equal(found.ids, tokenizer.encode_prompts(["a red bird sits", "a dog"]))
    bird = len(tokenizer.encode_words("red bird"))
    first = found.weights[0]
    assert (first[2 : 2 + bird] == 1.5).all() and (np.delete(first, slice(2, 2 + bird)) == 1).all()
    assert (found.weights[1] == 1).all()
    phrases = read_phrases(tokenizer, ["a (red bird:1.5) sits"], WEIGHTS)
    np.testing.assert_array_equal(phrases, tokenizer.encode_phrases(["a red bird sits"]))


def test_long_prompts_have_several_rows(tokenizer, caplog):
    words = tokenizer.encode_words("a red bird and a dog " * 40)
    found = read_prompts(tokenizer, ["a dog", "a red bird and a dog " * 40, "a " * 75, "a " * 76], LONG)
    parts = -(-len(words) // 75)
    assert parts == 4 and not caplog.records
    assert found.rows.tolist() == [[0] * 4, [1, 2, 3, 4], [5] * 4, [6, 7, 6, 7]]
    assert (found.ids[:, 0] == 1022).all() and (found.ids[:, -1] == 1023).all()
    joined = [i for row in found.ids[1:5] for i in row if i < 1022]
    assert joined == words
    with caplog.at_level(logging.WARNING):
        cut = read_prompts(tokenizer, ["a " * 301], LONG)
    assert len(cut.ids) == 4 and "prompt of 301 tokens cut to 300" in caplog.records[0].getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        cut = read_prompts(tokenizer, ["(a:1.2) " + "a " * 75], WEIGHTS)
    assert len(cut.ids) == 1 and "prompt of 76 tokens cut to 75" in caplog.records[0].getMessage()


def test_a_layouts_negative_prompt(tmp_path):
    layout = Layout("a dog", 64, 64, (Instance("a dog", (8, 8, 40, 40)),), negative_prompt="a cat")
    layout.to_json(tmp_path / "x.json")
    again = Layout.from_json(tmp_path / "x.json")
    assert again == layout and again.negative_prompt == "a cat"
    plain = Layout("a dog", 64, 64, layout.instances)
    assert plain != layout and "negative_prompt" not in plain.to_dict()
    values = layout.to_dict()
    for value, message in (
        (3, "negative_prompt: expected text"),
        ("\ud800", "negative_prompt: expected valid Unicode"),
    ):
        with pytest.raises(InputError, match=message):
            Layout.from_dict(values | {"negative_prompt": value})
    with pytest.raises(InputError, match="negative_prompt: expected this key, got 'Negative_Prompt'"):
        Layout.from_dict(plain.to_dict() | {"Negative_Prompt": "a cat"})
