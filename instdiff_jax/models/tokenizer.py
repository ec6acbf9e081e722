"""Prompts and phrases as CLIP token ids."""

import copy
import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self
from unittest import mock

import numpy as np
from jaxtyping import Int32

from instdiff_jax.errors import InputError
from instdiff_jax.paths import check_regular

_logger = logging.getLogger(__name__)

# A byte-level vocabulary has each byte twice: inside a word and at its end.
_SMALLEST_VOCABULARY = 512


class Tokenizer:
    """transformers' CLIP tokenizer, from a local folder or the hub's local cache. Needs no network.

    Attributes:
        max_length: ids in a row, start and end token included.
        start_id: id of the start token.
        eos_id: id of the end token, which also pads. It is the highest id, so that argmax finds the end of a text.
    """

    def __init__(self, name: str | Path, vocab_size: int, max_length: int = 77):
        """Loads the tokenizer.

        Args:
            name: a folder with vocab.json and merges.txt (or tokenizer.json), or a hub name that is in the local cache.
            vocab_size: of the text encoder; the tokenizer's ids must be below it.
            max_length: ids in a row.

        Raises:
            InputError: if the tokenizer is missing or does not fit; names it.
        """
        # Imported here: it takes a second, and only this class needs it.
        with mock.patch.dict(os.environ, TRANSFORMERS_NO_ADVISORY_WARNINGS="1"):
            # Otherwise it warns that PyTorch is missing, but tokenizers do not need it.
            from transformers import CLIPTokenizer

        self.max_length = max_length
        check_regular(name)
        try:
            self._tokenizer = CLIPTokenizer.from_pretrained(str(name), local_files_only=True)
            self._tokenizer("a word", verbose=False)  # some damage shows only here
        except Exception as error:  # The Rust library raises bare Exceptions for broken files.
            raise InputError(
                f"tokenizer {name}: expected a folder with vocab.json and merges.txt, or a name in the hub's local"
                f" cache ({type(error).__name__})"
            ) from error
        # If the files are missing, transformers silently makes an empty tokenizer.
        if len(self._tokenizer) < _SMALLEST_VOCABULARY:
            raise InputError(f"tokenizer {name}: no vocabulary there; expected vocab.json and merges.txt")
        highest = max(self._tokenizer.get_vocab().values())
        self.start_id, self.eos_id = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        if highest >= vocab_size:
            raise InputError(f"tokenizer {name}: expected ids below the text encoder's {vocab_size}, got {highest}")
        self._words: dict[str, list[int]] = {}
        if self.eos_id != highest:
            raise InputError(f"tokenizer {name}: expected the end token's id to be {highest}, got {self.eos_id}")

    def with_words(self, words: Mapping[str, list[int]]) -> Self:
        """This tokenizer with more words, each of which stands for given ids (textual inversion)."""
        other = copy.copy(self)
        other._words = {**self._words, **words}
        return other

    def encode_prompts(self, prompts: Sequence[str]) -> Int32[np.ndarray, "n length"]:
        """Ids of prompts, padded with the end token. Truncates long prompts, with a warning."""
        return self._encode(prompts, "prompt")

    def encode_phrases(self, phrases: Sequence[str]) -> Int32[np.ndarray, "n length"]:
        """Ids of instances' captions, padded with the end token. Truncates long ones, with a warning.

        The official code crashes on those.
        """
        return self._encode(phrases, "phrase")

    def save(self, folder: str | Path) -> None:
        """Writes the tokenizer's files to a folder."""
        self._tokenizer.save_pretrained(str(folder))

    def _encode(self, texts: Sequence[str], kind: str) -> Int32[np.ndarray, "n length"]:
        ids = np.full((len(texts), self.max_length), self.eos_id, np.int32)
        known: dict[str, list[int]] = {}
        for row, text in enumerate(texts):
            if text not in known:
                known[text] = self._encode_one(text, kind)
            ids[row, : len(known[text])] = known[text]
        return ids

    def encode_words(self, text: str, kind: str = "prompt") -> list[int]:
        """Ids of a text of any length, without start and end token; InputError if it is no valid Unicode."""
        return self._ids(text, kind)[1:-1]

    def _encode_one(self, text: str, kind: str) -> list[int]:
        ids = self._ids(text, kind)
        if len(ids) > self.max_length:
            _logger.warning(
                "%s of %d tokens cut to %d, its end is not used: %r", kind, len(ids), self.max_length, shortened(text)
            )
            ids = [*ids[: self.max_length - 1], self.eos_id]
        return ids

    def _ids(self, text: str, kind: str) -> list[int]:
        """Ids of a text, with start and end token, and of any length."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(f"{kind} {ascii(text)[:80]}: expected valid Unicode text") from error
        if not self._words:
            return self._tokenizer(text, verbose=False)["input_ids"]
        names = "|".join(re.escape(word) for word in sorted(self._words, key=len, reverse=True))
        parts = re.split(rf"(?<!\w)({names})(?!\w)", text)
        start, *_, end = self._tokenizer("", verbose=False)["input_ids"]
        ids = [start]
        for i, part in enumerate(parts):
            ids += self._words[part] if i % 2 else self._tokenizer(part, verbose=False)["input_ids"][1:-1]
        return [*ids, end]


def shortened(text: str) -> str:
    """The begin and the end of a text, for a message."""
    return text if len(text) <= 80 else f"{text[:50]} ... {text[-25:]}"
