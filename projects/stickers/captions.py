"""Captions of things and of whole pictures, all of them true."""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from projects.common.words import OPENINGS, article, direction, joined, number, pick, plural
from projects.stickers.things import THINGS

# Longer lists would not fit the text encoder.
_MAX_LISTED = 8


class Seen(NamedTuple):
    """What captions say about one instance.

    Attributes:
        name: of the thing.
        colour: one of `COLOURS`, or None if the thing has its own colours.
        facing: "left", "right", or empty.
        centre: (x, y) in pixels.
    """

    name: str
    colour: str | None
    facing: str
    centre: tuple[float, float]


def instance_caption(seen: Seen, rng: np.random.Generator) -> str:
    """A random wording for one instance, for example "a red car facing left"."""
    noun = _noun(seen.name, rng)
    if seen.colour is None:
        text = pick((f"{article(noun)} {noun}", f"{article(noun)} {noun}", noun), rng)
    else:
        forms = (f"a {seen.colour} {noun}", f"a {seen.colour} {noun}", f"{seen.colour} {noun}")
        text = pick((*forms, f"{article(noun)} {noun} that is {seen.colour}"), rng)
    if seen.facing and rng.random() < 0.6:
        text += pick((f" facing {seen.facing}", f" looking {seen.facing}", f" facing {seen.facing}"), rng)
    return text


def image_captions(
    things: Sequence[Seen],
    covers: Sequence[tuple[int, int]],
    background: str,
    count: int,
    rng: np.random.Generator,
) -> tuple[str, ...]:
    """Captions of a whole image.

    Args:
        things: the instances.
        covers: pairs (i, j): thing i lies in front of thing j and hides a part of it.
        background: words for the background, with their preposition.
        count: how many captions.
        rng: chooses the wordings.

    Returns:
        The captions; the first one lists everything and names the background.
    """
    captions = [f"{_listing(things, True, rng)} {background}"]
    forms = ["list", "list", "list", "names", "count"]
    if len(things) > 1:
        forms += ["place", "place"] + ["front"] * bool(covers)
    for _ in range(count - 1):
        form = pick(forms, rng)
        if form in ("list", "names"):
            text = _listing(things, form == "list", rng)
        elif form == "count":
            text = "one thing" if len(things) == 1 else f"{number(len(things))} things"
        elif form == "front":
            i, j = covers[rng.integers(len(covers))]
            text = f"{_described(things[i], rng)} in front of {_described(things[j], rng)}"
        else:
            i, j = rng.choice(len(things), 2, replace=False)
            words = direction(things[i].centre, things[j].centre) or ("and", "beside")
            text = f"{_described(things[i], rng)} {pick(words, rng)} {_described(things[j], rng)}"
        captions.append(pick(OPENINGS, rng) + text + pick(("", f" {background}", f" {background}"), rng))
    return tuple(captions)


def _listing(things: Sequence[Seen], colours: bool, rng: np.random.Generator) -> str:
    """ "two red cars, a penguin and a green apple", in random order."""
    groups = list(Counter((thing.name, thing.colour if colours else None) for thing in things).items())
    names = []
    for (name, colour), count in (groups[i] for i in rng.permutation(len(groups))):
        noun = _noun(name, rng) if count == 1 else THINGS[name].plural or plural(name)
        words = noun if colour is None else f"{colour} {noun}"
        names.append(f"{article(words)} {words}" if count == 1 else f"{number(count)} {words}")
    if len(names) > _MAX_LISTED:
        names = names[: _MAX_LISTED - 1] + ["more things"]
    return joined(names)


def _described(thing: Seen, rng: np.random.Generator) -> str:
    words = " ".join(filter(None, (thing.colour, _noun(thing.name, rng))))
    return f"{article(words)} {words}"


def _noun(name: str, rng: np.random.Generator) -> str:
    """The thing's name in half of the cases, else the name or a synonym."""
    return name if rng.random() < 0.5 else pick((name, *THINGS[name].synonyms), rng)
