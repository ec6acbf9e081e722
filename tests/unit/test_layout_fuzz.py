"""Any input ends in a valid grounding or in an InputError of one line."""

import copy
import json
import math

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from layout_cases import SMALL_CONFIG, check_grounding

from instdiff_jax.errors import InputError
from instdiff_jax.grounding import FORMAT_CHOICES, make_grounding
from instdiff_jax.layout import Layout


def outcome(values):
    """A valid grounding, or an InputError of one line; anything else fails the test."""
    try:
        layout = Layout.from_dict(values, "file.json")
    except InputError as error:
        assert str(error).startswith("file.json: ") and "\n" not in str(error) and len(str(error)) < 400
        return
    assert Layout.from_dict(json.loads(layout.to_json())) == layout
    check_grounding(make_grounding(layout, SMALL_CONFIG, FORMAT_CHOICES[len(layout.caption) % len(FORMAT_CHOICES)]), 64)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-5, 120),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.sampled_from([math.nan, math.inf, -math.inf, 10**400, 1e308, -0.0, "\ud800", "a\nb"]),
)
JUNK = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=5), st.dictionaries(st.text(max_size=4), inner, max_size=3)),
    max_leaves=8,
)
NUMBER = st.one_of(st.integers(-10, 110), st.floats(-10, 110))
RLE = st.fixed_dictionaries(
    {"size": st.just([80, 100]), "counts": st.sampled_from([[4000, 4000], [0, 8000], [8000], [7999, 1], "abc"])}
)
ANNO = st.fixed_dictionaries(
    {"caption": st.one_of(st.just("a thing"), st.text(max_size=5))},
    optional={
        "bbox": st.one_of(st.lists(NUMBER, min_size=4, max_size=4), JUNK),
        "point": st.one_of(st.lists(NUMBER, min_size=2, max_size=2), JUNK),
        "scribble": st.one_of(st.lists(NUMBER, max_size=50), st.lists(st.lists(NUMBER, max_size=3), max_size=9), JUNK),
        "mask": st.one_of(RLE, st.lists(st.lists(NUMBER, max_size=12), max_size=3), JUNK),
        "category_name": st.one_of(st.text(max_size=4), JUNK),
    },
)
LAYOUT = st.fixed_dictionaries(
    {"caption": st.text(max_size=9), "width": st.just(100), "height": st.just(80), "annos": st.lists(ANNO, max_size=4)}
)


@settings(max_examples=900, deadline=None, suppress_health_check=list(HealthCheck))
@given(LAYOUT)
def test_random_layouts_end_in_a_grounding_or_an_input_error(values):
    outcome(values)


@settings(max_examples=600, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_mangled_layouts_end_in_a_grounding_or_an_input_error(data):
    values = copy.deepcopy(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        spot = values
        while True:
            keys = list(spot) if isinstance(spot, dict) else list(range(len(spot)))
            if not keys:
                break
            key = data.draw(st.sampled_from(keys))
            if isinstance(spot[key], (dict, list)) and data.draw(st.booleans()):
                spot = spot[key]
                continue
            if data.draw(st.booleans()):
                spot[key] = data.draw(JUNK)
            else:
                del spot[key]
            break
    outcome(values)


@settings(max_examples=200, deadline=None)
@given(JUNK)
def test_junk_is_an_input_error(values):
    outcome(values)


GOOD = {
    "caption": "a scene",
    "width": 100,
    "height": 80,
    "annos": [
        {"caption": "a", "bbox": [10, 10, 50, 60], "mask": []},
        {"caption": "b", "point": [10, 10], "scribble": [1, 2, 3, 4, 5, 6]},
        {"caption": "c", "mask": {"size": [80, 100], "counts": [4000, 4000]}, "category_name": "c"},
        {"caption": "d", "mask": [[10, 10, 50, 10, 40, 60]], "scribble": [[1, 2], [3, 4]]},
    ],
}
