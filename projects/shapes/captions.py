"""Captions of instances and of whole images.

Every caption is true of its scene. Captions may say left and right, so train without flips.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from projects.common.words import OPENINGS, article, direction, joined, number, pick, plural

# Longest list: ten entries and a background stay below CLIP's 77 tokens.
_MAX_LISTED = 10
_PATTERNS = {"striped": "stripes", "dotted": "dots", "checkered": "checks"}


class Thing(NamedTuple):
    """What captions say about one instance; `centre` is (x, y) in pixels, `inside` the index of its host."""

    shape: str
    colour: str
    texture: str
    centre: tuple[float, float]
    inside: int | None = None


def instance_caption(thing: Thing, rng: np.random.Generator) -> str:
    """A random wording for one instance, for example "a red striped star"."""
    shape, colour, texture = thing[:3]
    if texture == "plain":
        forms = [
            f"a {colour} {shape}",
            f"a plain {colour} {shape}",
            f"{colour} {shape}",
            f"a {shape} in plain {colour}",
        ]
        forms.append(f"a {shape} that is {colour}")
    else:
        forms = [f"a {colour} {texture} {shape}", f"a {texture} {colour} {shape}", f"{colour} {texture} {shape}"]
        forms.append(f"a {colour} {shape} with {_PATTERNS[texture]}")
        forms.append(f"a {shape} that is {colour} and {texture}")
    return pick(forms, rng)


def background_words(kind: str, names: tuple[str, str]) -> str:
    """Names a background, for example "a grey background" or "a background fading from grey to teal"."""
    first, second = names
    if kind == "plain":
        return f"{article(first)} {first} background"
    if kind == "cloudy":
        return f"a cloudy background of {first} and {second}"
    return f"a background fading from {first} to {second}"


def image_captions(
    things: Sequence[Thing],
    covers: Sequence[tuple[int, int]],
    background: str,
    count: int,
    rng: np.random.Generator,
) -> tuple[str, ...]:
    """Captions of a whole image.

    Args:
        things: the instances.
        covers: pairs (i, j): thing i lies in front of thing j and hides a part of it.
        background: words for the background.
        count: how many captions.
        rng: chooses the wordings.

    Returns:
        The captions; the first one lists everything and names the background.
    """
    captions = [f"{_listing(things, True, True, rng)} on {background}"]
    forms = ["list", "list", "list", "shapes", "count"]
    if len(things) > 1:
        forms += ["place", "place"] + ["front"] * bool(covers)
    if any(thing.inside is not None for thing in things):
        forms += ["inside", "inside"]
    for _ in range(count - 1):
        form = pick(forms, rng)
        if form == "list":
            text = _listing(things, True, True, rng)
        elif form == "shapes":
            text = _listing(things, bool(rng.integers(2)), False, rng)
        elif form == "count":
            text = "one shape" if len(things) == 1 else f"{number(len(things))} {pick(('shapes', 'things'), rng)}"
        elif form == "place":
            text = _placing(things, rng)
        elif form == "front":
            i, j = covers[rng.integers(len(covers))]
            text = f"{_name(things[i])} in front of {_name(things[j])}"
        else:
            part = pick([thing for thing in things if thing.inside is not None], rng)
            text = f"{_name(things[part.inside])} with {_name(part)} inside"
        ending = pick(("", f" on {background}", f" against {background}"), rng)
        captions.append(pick(OPENINGS, rng) + text + ending)
    return tuple(captions)


def _listing(things: Sequence[Thing], colours: bool, textures: bool, rng: np.random.Generator) -> str:
    """ "two red striped stars, a blue circle and a green square", in random order."""
    groups = Counter(
        " ".join([thing.colour] * colours + [thing.texture] * (textures and thing.texture != "plain") + [thing.shape])
        for thing in things
    )
    names = [f"a {name}" if count == 1 else f"{number(count)} {plural(name)}" for name, count in groups.items()]
    names = [names[i] for i in rng.permutation(len(names))]
    if len(names) > _MAX_LISTED:
        names = names[: _MAX_LISTED - 1] + ["more shapes"]
    return joined(names)


def _placing(things: Sequence[Thing], rng: np.random.Generator) -> str:
    """Where one thing is relative to another, along the axis on which they are further apart."""
    i, j = rng.choice(len(things), 2, replace=False)
    words = direction(things[i].centre, things[j].centre)
    if not words or things[i].inside == j or things[j].inside == i:
        words = ("and", "with")
    return f"{_name(things[i])} {pick(words, rng)} {_name(things[j])}"


def _name(thing: Thing) -> str:
    texture = "" if thing.texture == "plain" else f"{thing.texture} "
    return f"a {thing.colour} {texture}{thing.shape}"
