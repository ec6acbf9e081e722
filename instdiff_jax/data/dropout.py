"""Which formats a training sample keeps, and samples without any grounding (paper section 3.1, "training").

The released code draws once for a batch; here each sample draws for itself unless the config says otherwise.
"""

import numpy as np

from instdiff_jax.data.examples import DataConfig

FORMATS = ("box", "point", "scribble", "mask_points", "map")


def draw_formats(config: DataConfig, rng: np.random.Generator) -> dict[str, bool]:
    """Draws which formats are kept, with the released probabilities and precedence.

    Box, point, scribble and mask (its points and its map) are dropped independently. Then a kept mask keeps box and
    point, and a kept box keeps the point. With probability `only_point` only the point stays; then, if the map
    survived, with probability `only_mask` all but the scribble stay. Were nothing left, the box is kept. At the end,
    with probability `only_scribble` (the released code has none), the scribble alone stays.

    Returns:
        For each of FORMATS whether it is kept.
    """
    draws = rng.random(7)
    box = draws[0] >= config.drop_box
    point = draws[1] >= config.drop_point
    scribble = draws[2] >= config.drop_scribble
    mask = draws[3] >= config.drop_mask
    if mask:
        box = True
    if box:
        point = True
    if draws[4] < config.only_point:
        box, point, scribble, mask = False, True, False, False
    if mask and draws[5] < config.only_mask:
        box, point, scribble = True, True, False
    if not (box or point or scribble or mask):
        box = True
    if draws[6] < config.only_scribble:
        box, point, scribble, mask = False, False, True, False
    return dict(zip(FORMATS, map(bool, (box, point, scribble, mask, mask)), strict=True))


def apply_formats(arrays: dict[str, np.ndarray], kept: dict[str, bool]) -> dict[str, np.ndarray]:
    """Adds which features each slot has, by UniFusion's rule.

    Box and point need a valid slot. A scribble or mask points stand in unless the sum of the coordinates and `valid`
    is zero: a valid instance without a mask has features of zeros, not the null vector. The map counts for the whole
    sample and needs any map that is not empty.

    Args:
        arrays: what `transforms.locate` returns.
        kept: for each of FORMATS whether it is kept.

    Returns:
        The arrays and has_box, has_point, has_scribble, has_mask [30] and has_map [], float32.
    """
    valid = arrays["valid"]
    scribble = arrays["scribbles"].sum(axis=-1) + valid > 0
    mask = arrays["mask_points"].sum(axis=-1) + valid > 0
    return arrays | {
        "has_box": np.float32(kept["box"]) * valid,
        "has_point": np.float32(kept["point"]) * valid,
        "has_scribble": np.float32(kept["scribble"]) * scribble.astype(np.float32),
        "has_mask": np.float32(kept["mask_points"]) * mask.astype(np.float32),
        "has_map": np.array(kept["map"] and arrays["maps"].any(), np.float32),
    }
