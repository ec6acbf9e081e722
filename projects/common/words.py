"""Words that captions of all worlds are made of."""

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

OPENINGS = ("", "", "a picture of ", "a drawing of ", "an image of ", "a scene with ", "you can see ")
_COUNTS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve")
Option = TypeVar("Option")


def number(count: int) -> str:
    """ "three"; digits above twelve."""
    return _COUNTS[count] if count < len(_COUNTS) else str(count)


def plural(name: str) -> str:
    """The regular plural."""
    return name + ("es" if name.endswith(("s", "sh", "ch", "x")) else "s")


def article(word: str) -> str:
    """ "a" or "an"."""
    return "an" if word[0] in "aeiou" else "a"


def joined(names: Sequence[str]) -> str:
    """ "a, b and c"."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def direction(first: tuple[float, float], second: tuple[float, float]) -> tuple[str, ...]:
    """Words for where the first centre (x, y) lies relative to the second; none if it is not clear."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if max(abs(dx), abs(dy)) < 1.5 * min(abs(dx), abs(dy)) + 1:
        return ()
    if abs(dx) > abs(dy):
        return ("left of", "to the left of") if dx < 0 else ("right of", "to the right of")
    return ("above",) if dy < 0 else ("below", "under")


def pick(options: Sequence[Option], rng: np.random.Generator) -> Option:
    """One of the options."""
    return options[rng.integers(len(options))]
