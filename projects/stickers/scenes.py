"""Random scenes of things, with everything that is known of them.

Scene i of a seed is the same bytes for the same pictures. Later instances lie in front of earlier ones; masks and boxes
cover the visible part. At most `max_hidden` of an instance is hidden, and never by the same kind of thing.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, UInt8

from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask
from projects.common.crowd import Crowd
from projects.common.words import pick
from projects.stickers.backgrounds import KINDS, draw_background
from projects.stickers.captions import Seen, image_captions, instance_caption
from projects.stickers.pictures import COLOURS, Pictures, Stamp
from projects.stickers.things import NAMES, THINGS
from projects.stickers.worlds import SceneSettings

_POSITIONS = 24
_SHRINKS = 5
_RESTARTS = 6


class SceneInstance(NamedTuple):
    """One thing of a scene.

    Attributes:
        colour: None if the thing has its own colours.
        facing: "left", "right", or empty.
        box: x, y, width, height in pixels, of the visible part.
        mask: True where the thing is visible.
        z: position from back (0) to front.
    """

    name: str
    colour: str | None
    facing: str
    caption: str
    box: tuple[int, int, int, int]
    mask: Bool[np.ndarray, "H W"]
    z: int


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


class _Plan(NamedTuple):
    name: str
    colour: str | None
    flip: bool


def render_scene(
    pictures: Pictures, seed: int, index: int, size: int = 128, settings: SceneSettings = SceneSettings()
) -> Scene:
    """Renders scene `index` of a seed; the result depends on the arguments alone.

    Args:
        pictures: of the things.
        seed: not negative.
        index: which scene, from 0.
        size: side of the image in pixels, at least 64.
        settings: what scenes look like.

    Raises:
        InputError: for arguments out of range, or if no thing fits.
    """
    check_scene(seed, index, size, settings)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    background = draw_background(pick(KINDS, rng), size, rng)
    placed, crowd = _arrange(pictures, size, settings, rng)
    if not placed:
        raise InputError(f"scene: nothing with sides of at least {settings.min_side} fits into {size} pixels")
    for _, stamp, corner in placed:
        _paint(background.image, stamp, corner)
    seen, boxes = [], []
    for z, (plan, _, _) in enumerate(placed):
        x0, y0, x1, y1 = (int(edge) for edge in box_from_mask(crowd.owner == z))
        boxes.append((x0, y0, x1 - x0, y1 - y0))
        facing = ("left", "right")[plan.flip] if THINGS[plan.name].faces else ""
        seen.append(Seen(plan.name, plan.colour, facing, ((x0 + x1) / 2, (y0 + y1) / 2)))
    instances = tuple(
        SceneInstance(*thing[:3], instance_caption(thing, rng), boxes[z], crowd.owner == z, z)
        for z, thing in enumerate(seen)
    )
    captions = image_captions(seen, crowd.covers, background.words, settings.captions, rng)
    return Scene(background.image, instances, captions, background.words)


def check_scene(seed: int, index: int, size: int, settings: SceneSettings) -> None:
    """Raises InputError for arguments of `render_scene` out of range."""
    limits = (("seed", seed, 0, 2**31 - 1), ("index", index, 0, 10**6 - 1), ("size", size, 64, 2048))
    for name, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise InputError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
    settings.validate()


def _choose(settings: SceneSettings, rng: np.random.Generator) -> list[_Plan]:
    """The things of a scene from back to front."""
    count = int(rng.integers(settings.min_instances, settings.max_instances + 1))
    colours, plans = tuple(COLOURS), []
    if settings.confusable:
        name = pick([name for name in NAMES if THINGS[name].hue is not None], rng)
        order = rng.permutation(len(colours))
        return [_Plan(name, colours[order[k % len(colours)]], bool(rng.integers(2))) for k in range(count)]
    for _ in range(count):
        name = pick(settings.choices, rng)
        colour = colours[rng.integers(len(colours))] if THINGS[name].hue is not None else None
        # A flip that no caption can name would make a phrase ambiguous.
        plans.append(_Plan(name, colour, THINGS[name].faces and bool(rng.integers(2))))
    return plans


def _arrange(
    pictures: Pictures, size: int, settings: SceneSettings, rng: np.random.Generator
) -> tuple[list[tuple[_Plan, Stamp, tuple[int, int]]], Crowd]:
    """Places the things of a scene one by one, smaller ones if there is no room; the best of several attempts."""
    plans = _choose(settings, rng)
    # Confusable neighbours stand side by side: occlusion would disturb the measure of leaking attributes.
    hidden = 0.0 if settings.confusable else max(float(rng.uniform(-0.5, 1.0)), 0.0) * settings.max_hidden
    largest = max(min(settings.max_side, 1.1 / math.sqrt(len(plans))), settings.min_side)
    best: tuple[list, Crowd] = [], Crowd(size, hidden)
    for restart in range(_RESTARTS):
        placed: list[tuple[_Plan, Stamp, tuple[int, int]]] = []
        crowd = Crowd(size, hidden if restart < 2 else settings.max_hidden)
        for plan in plans:
            side = settings.min_side + (largest - settings.min_side) * float(rng.random())
            turn = float(rng.uniform(-settings.max_turn, settings.max_turn))
            if not _place(pictures, plan, (side, settings.min_side), turn, (placed, crowd), rng):
                break
        if len(placed) > len(best[0]):
            best = placed, crowd
        if len(placed) == len(plans):
            break
        largest = max(largest * 0.85, settings.min_side)
    return best


def _place(
    pictures: Pictures,
    plan: _Plan,
    sides: tuple[float, float],
    turn: float,
    scene: tuple[list[tuple[_Plan, Stamp, tuple[int, int]]], Crowd],
    rng: np.random.Generator,
) -> bool:
    """Places one more thing with the first side or a smaller one, down to the second; False if there is no room."""
    (side, least), (placed, crowd) = sides, scene
    for _ in range(_SHRINKS):
        stamp = pictures.stamp(plan.name, plan.colour, side * crowd.size, turn, plan.flip)
        room = crowd.size - stamp.mask.shape[1] + 1, crowd.size - stamp.mask.shape[0] + 1
        for corner in rng.integers(0, room, (_POSITIONS, 2)).tolist() if min(room) > 0 else ():
            if crowd.put(stamp.mask, tuple(corner), lambda k: placed[k][0].name == plan.name):
                placed.append((plan, stamp, tuple(corner)))
                return True
        if side == least:
            break
        side = max(side * 0.8, least)
    return False


def _paint(image: UInt8[np.ndarray, "H W 3"], stamp: Stamp, corner: tuple[int, int]) -> None:
    """Pastes a stamp over an image, in place."""
    height, width = stamp.mask.shape
    window = image[corner[1] : corner[1] + height, corner[0] : corner[0] + width]
    colour, alpha = stamp.pixels[..., :3].astype(np.int32), stamp.pixels[..., 3:].astype(np.int32)
    window[:] = np.minimum(colour + (window * (255 - alpha) + 127) // 255, 255)
