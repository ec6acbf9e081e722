"""Random scenes of coloured, textured shapes, with everything that is known of them.

Scene i of a seed is the same bytes on every machine. Later instances lie in front of earlier ones; masks and boxes
cover the visible part. At most `max_hidden` of an instance is hidden, and never by an instance of its own colour.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask
from projects.shapes.arrangement import arrange_shapes
from projects.shapes.captions import Thing, background_words, image_captions, instance_caption
from projects.shapes.drawing import BACKGROUND_KINDS, BACKGROUNDS, draw_background, draw_shift, paint
from projects.shapes.worlds import SceneSettings


class SceneInstance(NamedTuple):
    """One shape of a scene.

    Attributes:
        box: x, y, width, height in pixels, of the visible part.
        mask: True where the shape is visible.
        z: position from back (0) to front.
        inside: index of the instance that it is a part of.
    """

    shape: str
    colour: str
    texture: str
    caption: str
    box: tuple[int, int, int, int]
    mask: Bool[np.ndarray, "H W"]
    z: int
    inside: int | None


class Scene(NamedTuple):
    """An image, its instances, captions of the image, and its background in words."""

    image: UInt8[np.ndarray, "H W 3"]
    instances: tuple[SceneInstance, ...]
    captions: tuple[str, ...]
    background: str

    @property
    def caption(self) -> str:
        """The first caption, which lists everything."""
        return self.captions[0]


def render_scene(seed: int, index: int, size: int = 128, settings: SceneSettings = SceneSettings()) -> Scene:
    """Renders scene `index` of a seed; the result depends on the arguments alone.

    Args:
        seed: not negative.
        index: which scene, from 0.
        size: side of the image in pixels, at least 32.
        settings: what scenes look like.

    Raises:
        InputError: for arguments out of range, or if no shape fits.
    """
    check_scene(seed, index, size, settings)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    kind = BACKGROUND_KINDS[rng.integers(len(BACKGROUND_KINDS))]
    first, second = (list(BACKGROUNDS)[i] for i in rng.choice(len(BACKGROUNDS), 2, replace=False))
    image = draw_background(kind, (first, second), size, rng)
    background = background_words(kind, (first, second))
    placed, owner, covers = arrange_shapes(size, settings, rng)
    if not placed:
        raise InputError(
            f"scene: no shape of sides from {settings.min_side} to {settings.max_side} fits into {size} pixels; "
            "expected other sides, or less max_stretch and max_turn"
        )
    for item in placed:
        paint(image, item.stamp, item.corner, item.plan.colour, draw_shift(rng))
    things, boxes = [], []
    for z, item in enumerate(placed):
        x0, y0, x1, y1 = (int(edge) for edge in box_from_mask(owner == z))
        boxes.append((x0, y0, x1 - x0, y1 - y0))
        plan = item.plan
        things.append(Thing(plan.shape, plan.colour, plan.texture, ((x0 + x1) / 2, (y0 + y1) / 2), plan.inside))
    instances = tuple(
        SceneInstance(*thing[:3], instance_caption(thing, rng), boxes[z], owner == z, z, thing.inside)
        for z, thing in enumerate(things)
    )
    return Scene(image, instances, image_captions(things, covers, background, settings.captions, rng), background)


def check_scene(seed: int, index: int, size: int, settings: SceneSettings) -> None:
    """Raises InputError for arguments of `render_scene` out of range."""
    limits = (("seed", seed, 0, 2**31 - 1), ("index", index, 0, 10**6 - 1), ("size", size, 32, 2048))
    for name, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise InputError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
    settings.validate()
