"""Layouts of every format, random layouts, and what holds for every grounding."""

import dataclasses

import numpy as np
from hypothesis import strategies as st

from instdiff_jax.config import ModelConfig
from instdiff_jax.layout import Instance, Layout

CONFIG = ModelConfig()
# Small maps keep the tests on thousands of random layouts fast.
SMALL_CONFIG = dataclasses.replace(CONFIG, unifusion=dataclasses.replace(CONFIG.unifusion, map_size=64))
HAS = ("has_box", "has_point", "has_scribble", "has_mask")
SHAPES = {
    "boxes": (30, 4),
    "points": (30, 2),
    "scribbles": (30, 40),
    "mask_points": (30, 512),
    "maps": (512, 512),
    "phrase_embeddings": (30, 768),
    "valid": (30,),
    **dict.fromkeys(HAS, (30,)),
    "has_map": (),
}


def check_grounding(grounding, map_size=512):
    """Every array has its shape and type, and lies where it should."""
    shapes = SHAPES | {"maps": (map_size, map_size)}
    assert {key: np.shape(values) for key, values in grounding.items()} == shapes
    for key, values in grounding.items():
        assert values.dtype == (np.uint32 if key == "maps" else np.float32), key
        if key not in ("maps", "phrase_embeddings"):
            assert np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1, key
    assert grounding["maps"].max() < 1 << 30
    for key in ("valid", *HAS):
        assert set(np.unique(grounding[key])) <= {0, 1}
        assert (grounding[key] <= grounding["valid"]).all()
    assert grounding["has_map"] == grounding["maps"].any()


def mixed_layout():
    """One instance in each format, and one in all of them, on a canvas that is not square."""
    mask = np.zeros((300, 400), bool)
    mask[50:150, 40:120] = True
    scribble = np.linspace((10, 20), (390, 280), 33)
    instances = (
        Instance("a box", box=(100, 30, 300, 270)),
        Instance("a point", point=(200, 75)),
        Instance("a scribble", scribble=scribble),
        Instance("a mask", mask=mask),
        Instance("all", box=(0, 0, 400, 300), point=(10, 20), scribble=scribble, mask=~mask),
    )
    return Layout("things", 400, 300, instances)


@st.composite
def layouts(draw):
    """Valid layouts of any mixture of formats on small canvases."""
    width, height = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    x, y = st.floats(0, width), st.floats(0, height)
    instances = []
    for i in range(draw(st.integers(1, 4))):
        chosen = draw(st.sets(st.sampled_from(["box", "point", "scribble", "mask"]), min_size=1))
        places = {}
        if "box" in chosen:
            x0, y0 = draw(st.floats(-50, width - 0.01)), draw(st.floats(-50, height - 0.01))
            x1, y1 = draw(st.floats(max(x0, 0) + 0.005, 200)), draw(st.floats(max(y0, 0) + 0.005, 200))
            places["box"] = (x0, y0, x1, y1)
        if "point" in chosen:
            places["point"] = draw(st.tuples(x, y))
        if "scribble" in chosen:
            places["scribble"] = np.array(draw(st.lists(st.tuples(x, y), min_size=2, max_size=30)))
        if "mask" in chosen:
            rng = np.random.default_rng(draw(st.integers(0, 1000)))
            mask = rng.random((height, width)) < rng.random()
            mask[rng.integers(height), rng.integers(width)] = True
            places["mask"] = mask
        instances.append(Instance(f"thing {i}", **places))
    return Layout("", width, height, tuple(instances))
