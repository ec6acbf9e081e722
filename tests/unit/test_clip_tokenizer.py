"""CLIP's tokenizer from the package: ids known from CLIP, and those of byte-pair encoding written out plainly."""

import gzip
import json
import random
import unicodedata

import pytest
import regex
from transformers import CLIPTokenizer

from common import ROOT
from instdiff_jax.checkpoint.clip_tokenizer import clip_tokenizer
from instdiff_jax.checkpoint.tokenizer_files import find_tokenizer
from instdiff_jax.config import TextEncoderConfig
from instdiff_jax.models.tokenizer import Tokenizer

PACKED = ROOT / "instdiff_jax" / "checkpoint" / "clip" / "bpe_simple_vocab_16e6.txt.gz"
WORDS = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
ALPHABETS = ("abcdefghijklmnopqrstuvwxyz", "éüñçåøßłğ", "猫犬鳥日本", "кошка", "🐶🌹✨", "0123456789")
SIGNS = ".,:;!?'\"()[]{}-_/\\#&%$"


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(find_tokenizer(TextEncoderConfig.tokenizer, 49408), 49408)


def known_words() -> list[str]:
    """Merges as words: most are real ones."""
    lines = gzip.decompress(PACKED.read_bytes()).decode().splitlines()[1:48895]
    return [line.replace(" ", "").removesuffix("</w>") for line in lines if line.endswith("</w>")]


def make_texts(count: int) -> list[str]:
    rng, words = random.Random(0), known_words()

    def piece() -> str:
        kind = rng.random()
        if kind < 0.6:
            return rng.choice(words)
        letters = rng.choice((*ALPHABETS, SIGNS))
        made = "".join(rng.choice(letters) for _ in range(rng.randint(1, 7)))
        return made.upper() if kind < 0.7 else made

    return [rng.choice([" ", "  ", ", ", "-"]).join(piece() for _ in range(rng.randint(1, 12))) for _ in range(count)]


class Plain:
    """Byte-pair encoding without any library: the two neighbours of the lowest rank are merged until none is left."""

    def __init__(self):
        lines = gzip.decompress(PACKED.read_bytes()).decode().splitlines()[1:48895]
        self.ranks = {tuple(line.split()): i for i, line in enumerate(lines)}
        self.ids = json.loads((clip_tokenizer() / "vocab.json").read_text())
        shown = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b]
        rest = [b for b in range(256) if b not in shown]
        self.letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(rest)}

    def word(self, word: str) -> list[int]:
        parts = [self.letters[byte] for byte in word.encode()]
        parts[-1] += "</w>"
        while len(parts) > 1:
            rank, at = min((self.ranks.get(pair, 1 << 30), i) for i, pair in enumerate(zip(parts, parts[1:])))
            if rank == 1 << 30:
                break
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        return [self.ids[part] for part in parts]

    def __call__(self, text: str) -> list[int]:
        words = WORDS.findall(unicodedata.normalize("NFC", text).lower())
        return [49406, *(i for word in words for i in self.word(word)), 49407]


def test_ids_are_those_of_clip(tokenizer):
    known = {
        "a photo of a cat": [320, 1125, 539, 320, 2368],
        "hello world": [3306, 1002],
        "a diagram": [320, 22697],
        "a dog": [320, 1929],
    }
    for text, ids in known.items():
        assert tokenizer.encode_prompts([text])[0, : len(ids) + 2].tolist() == [49406, *ids, 49407]
    assert tokenizer.eos_id == 49407


def test_ids_of_thousands_of_texts(tokenizer):
    texts, plain = make_texts(4000), Plain()
    lines = gzip.decompress(PACKED.read_bytes()).decode().splitlines()[1:48895]
    reference = CLIPTokenizer(vocab=plain.ids, merges=[tuple(line.split()) for line in lines])
    ids = tokenizer.encode_prompts(texts)
    rows = reference(texts, truncation=True, max_length=77)["input_ids"]
    assert sum(len(row) for row in rows) > 40000
    for text, row, expected in zip(texts, ids.tolist(), rows, strict=True):
        assert row[: len(expected)] == expected and set(row[len(expected) :]) <= {49407}, text
        own = plain(text)
        assert expected == (own if len(own) <= 77 else [*own[:76], 49407]), text


def test_the_licence_is_beside_the_merges():
    assert "OpenAI" in (PACKED.parent / "LICENSE").read_text()
