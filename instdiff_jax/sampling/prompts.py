"""Prompts as rows of token ids: one row each, or with `long_prompts` several, and with `prompt_weights` weighted.

Weights are in the notation of AUTOMATIC1111's web UI: (word) weighs 1.1 times, [word] 1/1.1 times, (word:1.3) 1.3
times; brackets nest, and with a backslash before it a bracket is a plain sign. A long prompt is cut into parts of 75
tokens, each with a start and an end token; the UNet gets the states of all parts, one after the other.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from instdiff_jax.config import SamplingConfig
from instdiff_jax.models.tokenizer import Tokenizer, shortened

_logger = logging.getLogger(__name__)

MOST_PARTS = 4  # of a long prompt
_SIGNS = re.compile(r"\\[()\[\]\\]|[(\[\])]|:\s*([+-]?[.\d]+)\s*\)|[^\\()\[\]:]+|:|\\")
_ROUND, _SQUARE = 1.1, 1 / 1.1


class Prompts(NamedTuple):
    """Texts for the text encoder.

    Attributes:
        ids: rows of token ids, several for a long text.
        weights: of each id; None if all are 1.
        rows: the rows of each text. Texts of fewer rows repeat theirs: for softmax, keys and values twice are the same
            as once. So an image does not depend on how long other texts of its batch are.
    """

    ids: Int[np.ndarray, "rows length"]
    weights: Float[np.ndarray, "rows length"] | None
    rows: Int[np.ndarray, "texts parts"]


def parse_weights(text: str) -> list[tuple[str, float]]:
    """A prompt's fragments and their weights; neighbours of one weight are joined."""
    found: list[tuple[str, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # where each open bracket's fragments begin

    def weigh(first: int, factor: float) -> None:
        found[first:] = [(part, weight * factor) for part, weight in found[first:]]

    for match in _SIGNS.finditer(text):
        sign, number = match.group(), match.group(1)
        if sign in opened:
            opened[sign].append(len(found))
        elif number is not None and opened["("] and (factor := _number(number)) is not None:
            weigh(opened["("].pop(), factor)
        elif sign == ")" and opened["("]:
            weigh(opened["("].pop(), _ROUND)
        elif sign == "]" and opened["["]:
            weigh(opened["["].pop(), _SQUARE)
        else:
            found.append((sign[1:] if len(sign) == 2 and sign[0] == "\\" else sign, 1.0))
    for sign, factor in (("(", _ROUND), ("[", _SQUARE)):
        for first in opened[sign]:  # never closed: up to the end
            weigh(first, factor)
    joined: list[tuple[str, float]] = []
    for part, weight in found or [("", 1.0)]:
        if joined and joined[-1][1] == weight:
            joined[-1] = (joined[-1][0] + part, weight)
        else:
            joined.append((part, weight))
    return joined


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def read_prompts(tokenizer: Tokenizer, texts: Sequence[str], settings: SamplingConfig) -> Prompts:
    """Texts as rows of ids. Longer ones than the rows hold are cut, with a warning."""
    if not settings.prompt_weights and not settings.long_prompts:
        return Prompts(tokenizer.encode_prompts(texts), None, np.arange(len(texts))[:, None])
    inside, end = tokenizer.max_length - 2, tokenizer.eos_id
    ids, weights, rows = [], [], []
    for text in texts:
        pieces = parse_weights(text) if settings.prompt_weights else [(text, 1.0)]
        pairs = [(i, weight) for part, weight in pieces for i in tokenizer.encode_words(part)]
        most = inside * (MOST_PARTS if settings.long_prompts else 1)
        if len(pairs) > most:
            _logger.warning("prompt of %d tokens cut to %d, its end is not used: %r", len(pairs), most, shortened(text))
        parts = [pairs[first : first + inside] for first in range(0, min(len(pairs), most), inside)] or [[]]
        rows.append(range(len(ids), len(ids) + len(parts)))
        for part in parts:
            padding = [end] * (inside - len(part) + 1)
            ids.append([tokenizer.start_id, *(i for i, _ in part), *padding])
            weights.append([1.0, *(weight for _, weight in part), *[1.0] * len(padding)])
    width = math.lcm(*map(len, rows))
    numbers = np.array([[*row] * (width // len(row)) for row in rows])
    weighted = any(weight != 1 for row in weights for weight in row)
    return Prompts(np.array(ids, np.int32), np.array(weights, np.float32) if weighted else None, numbers)


def read_phrases(
    tokenizer: Tokenizer, texts: Sequence[str], settings: SamplingConfig
) -> Int[np.ndarray, "texts length"]:
    """Instances' captions as rows of ids; the weights in them are for the UNet's text only."""
    if settings.prompt_weights:
        texts = ["".join(part for part, _ in parse_weights(text)) for text in texts]
    return tokenizer.encode_phrases(texts)
