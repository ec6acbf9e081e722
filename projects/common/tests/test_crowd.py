"""Who owns a pixel, and what may be covered."""

import numpy as np

from projects.common.crowd import Crowd
from projects.common.words import direction, joined, number, plural

SQUARE = np.ones((20, 20), bool)


def test_at_most_the_allowed_fraction_is_hidden():
    crowd = Crowd(64, 0.3)
    assert crowd.put(SQUARE, (10, 10))
    assert not crowd.put(SQUARE, (18, 10)), "60% of the first would be hidden"
    assert crowd.put(SQUARE, (24, 10)), "30%"
    assert crowd.covers == [(1, 0)] and crowd.visible == [280, 400] and crowd.areas == [400, 400]
    assert not crowd.put(SQUARE, (10, 29)), "5% more of the first"
    assert np.array_equal(np.bincount(crowd.owner.ravel() + 1), [64 * 64 - 680, 280, 400])


def test_a_refused_thing_changes_nothing():
    crowd = Crowd(64, 0.5)
    crowd.put(SQUARE, (0, 0))
    before = crowd.owner.copy()
    assert not crowd.put(SQUARE, (15, 0), apart=lambda index: index == 0)
    assert not crowd.put(np.zeros((4, 4), bool), (30, 30))
    assert not crowd.put(SQUARE[:8, :8], (30, 30), inside=0), "a part outside its host"
    assert np.array_equal(crowd.owner, before) and len(crowd.areas) == 1
    assert crowd.put(SQUARE[:8, :8], (6, 6), inside=0) and crowd.covers == []


def test_words():
    assert number(3) == "three" and number(13) == "13"
    assert [plural(word) for word in ("cat", "bus", "torch", "brush")] == ["cats", "buses", "torches", "brushes"]
    assert joined(["a"]) == "a" and joined(["a", "b", "c"]) == "a, b and c"
    assert direction((0, 0), (50, 3))[0] == "left of" and direction((0, 50), (3, 0))[0] == "below"
    assert direction((0, 0), (20, 22)) == ()
