"""Scenes of coloured, textured shapes: what stands where, in front of what, and what is said of it.

Scene i of a seed is the same bytes on every machine. Later instances lie in front of earlier ones; masks and boxes
are of the visible part. Nothing is hidden by more than `max_hidden`, and nothing by its own colour.
"""

import dataclasses
import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Int, UInt8

from instdiff_jax.config import Settings
from instdiff_jax.errors import InputError
from instdiff_jax.geometry.masks import box_from_mask
from projects.shapes.captions import Thing, background_words, image_captions, instance_caption
from projects.shapes.drawing import (
    BACKGROUND_KINDS,
    BACKGROUNDS,
    COLOURS,
    OUTLINES,
    TEXTURES,
    Stamp,
    draw_background,
    draw_shift,
    make_stamp,
    paint,
)

SHAPES = tuple(OUTLINES)
# Shapes with enough room in the middle for a part.
_HOSTS = ("circle", "square", "heart", "hexagon", "triangle")
_PART_SIDE = 0.42
# Training drops boxes smaller than 1% of the image.
_MIN_BOX = 0.01
_POSITIONS = 32
_SHRINKS = 5
_RESTARTS = 8


@dataclasses.dataclass(frozen=True)
class SceneSettings(Settings):
    """What scenes look like. Sides are fractions of the image's side.

    Attributes:
        min_instances: the number of instances is drawn evenly from this
        max_instances: to this. Fewer are kept where there is no room left, which ten never see.
        min_side: of the smallest shape; with the default no box is smaller than 1% of an image of 64
            pixels or more.
        max_side: of the largest shape; less where there are many.
        max_turn: degrees that a shape may be turned either way.
        max_stretch: how many times as wide as high, or as high as wide, a shape may be.
        min_periods: of the texture between two edges of a shape, at least;
        max_periods: at most. They are fewer where one would have less than 4 pixels.
        max_hidden: largest fraction of a shape that others may hide. In a third of the scenes nothing is hidden.
        nested: probability that one shape of a scene has another one inside as its part.
        confusable: neighbours have the same shape and other colours and textures; of every four, the third and the
            fourth have those of the first two swapped. For measuring how attributes leak.
        captions: how many captions an image has.
        favour: shapes, by commas, that are drawn three times as often as others: for a model that confuses them.
    """

    min_instances: int = 1
    max_instances: int = 10
    min_side: float = 0.16
    max_side: float = 0.6
    max_turn: float = 30.0
    max_stretch: float = 1.2
    min_periods: float = 2.5
    max_periods: float = 4.0
    max_hidden: float = 0.4
    nested: float = 0.15
    confusable: bool = False
    captions: int = 5
    favour: str = ""

    @property
    def choices(self) -> tuple[str, ...]:
        """The shapes to draw from evenly: those favoured stand there three times."""
        return SHAPES + 2 * tuple(filter(None, self.favour.split(",")))

    def validate(self, where: str = "scene") -> None:
        """Raises InputError for a value out of its range."""
        ranges = {
            "min_instances": (1, 30),
            "max_instances": (self.min_instances, 30),
            "min_side": (0.05, 0.9),
            "max_side": (self.min_side, 0.9),
            "max_turn": (0, 180),
            "max_stretch": (1, 2),
            "min_periods": (1, 20),
            "max_periods": (self.min_periods, 20),
            "max_hidden": (0, 0.9),
            "nested": (0, 1),
            "captions": (1, 20),
        }
        for field, (low, high) in ranges.items():
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InputError(f"{where}.{field}: expected a number from {low} to {high}, got {value!r}")
        for shape in self.choices:
            if shape not in SHAPES:
                raise InputError(f"{where}.favour: expected shapes out of {', '.join(SHAPES)}, got {shape!r}")


# "calm" is what the model in the box has learned: a box and a phrase leave little open of how a shape looks.
WORLDS = {
    "varied": SceneSettings(),
    "calm": SceneSettings(min_side=0.24, max_side=0.7, max_turn=10.0, min_periods=3.0, max_periods=3.3),
}


class SceneInstance(NamedTuple):
    """One shape of a scene.

    `box` is x, y, width, height in pixels and `mask` [H, W] its visible part; `z` is its place from back to front,
    `inside` the number of the instance that it is a part of.
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
    """A picture and all that is known of it; `background` in words. The first caption lists everything."""

    image: UInt8[np.ndarray, "H W 3"]
    instances: tuple[SceneInstance, ...]
    captions: tuple[str, ...]
    background: str

    @property
    def caption(self) -> str:
        """The caption that lists everything."""
        return self.captions[0]


class _Plan(NamedTuple):
    """A shape before it has a place; `near` numbers the plan it wants to stand beside, `inside` its host."""

    shape: str
    colour: str
    texture: str
    near: int | None = None
    inside: int | None = None


class _Placed(NamedTuple):
    plan: _Plan
    stamp: Stamp
    corner: tuple[int, int]
    area: int


def render_scene(seed: int, index: int, size: int = 128, settings: SceneSettings = SceneSettings()) -> Scene:
    """Renders scene `index` of a seed: the same for the same arguments, whatever was rendered before.

    Args:
        seed: not negative.
        index: which scene, from 0.
        size: side of the image in pixels, at least 32.
        settings: what scenes look like.

    Raises:
        InputError: for arguments out of their range.
    """
    check_scene(seed, index, size, settings)
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(index,)))
    kind = BACKGROUND_KINDS[rng.integers(len(BACKGROUND_KINDS))]
    first, second = (list(BACKGROUNDS)[i] for i in rng.choice(len(BACKGROUNDS), 2, replace=False))
    image = draw_background(kind, (first, second), size, rng)
    background = background_words(kind, (first, second))
    placed, owner, covers = _arrange(size, settings, rng)
    if not placed:
        raise InputError(
            f"scene: no shape of sides from {settings.min_side} to {settings.max_side} fits into {size} pixels; "
            "expected smaller or larger ones, or less max_stretch and max_turn"
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
    """Raises InputError for arguments of `render_scene` out of their range."""
    limits = (("seed", seed, 0, 2**31 - 1), ("index", index, 0, 10**6 - 1), ("size", size, 32, 2048))
    for name, value, low, high in limits:
        if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not low <= value <= high:
            raise InputError(f"{name}: expected a whole number from {low} to {high}, got {value!r}")
    settings.validate()


def _plan(settings: SceneSettings, rng: np.random.Generator) -> list[_Plan]:
    """Which shapes a scene has, from back to front."""
    count = int(rng.integers(settings.min_instances, settings.max_instances + 1))
    colours, plans = list(COLOURS), []
    if settings.confusable:
        for start in range(0, count, 4):
            shape = settings.choices[rng.integers(len(settings.choices))]
            c, t = rng.permutation(len(colours)), rng.permutation(len(TEXTURES))
            looks = [(c[0], t[0]), (c[1], t[1]), (c[0], t[1]), (c[1], t[0])]
            for k, (i, j) in enumerate(looks[: count - start]):
                plans.append(_Plan(shape, colours[i], TEXTURES[j], near=start if k else None))
        return plans
    kinds = settings.choices, colours, TEXTURES
    for _ in range(count):
        shape, colour, texture = (options[rng.integers(len(options))] for options in kinds)
        plans.append(_Plan(shape, colour, texture))
    hosts = [k for k in range(count - 1) if plans[k].shape in _HOSTS]
    if hosts and rng.random() < settings.nested:
        k = hosts[rng.integers(len(hosts))]
        others = [colour for colour in colours if colour != plans[k].colour]
        part = plans[k + 1]
        plans[k + 1] = part._replace(colour=others[rng.integers(len(others))], inside=k)
    return plans


def _arrange(
    size: int, settings: SceneSettings, rng: np.random.Generator
) -> tuple[list[_Placed], Int[np.ndarray, "H W"], list[tuple[int, int]]]:
    """Places shapes one by one: the shapes, whose each pixel is (-1: background), and which lies in front of which."""
    plans = _plan(settings, rng)
    # Confusable neighbours stand side by side: what one hides of another would blur a measure of leaking attributes.
    hidden = 0.0 if settings.confusable else max(float(rng.uniform(-0.5, 1.0)), 0.0) * settings.max_hidden
    largest = max(min(settings.max_side, 1.15 / math.sqrt(len(plans))), settings.min_side)
    best: tuple = ([], None, [])
    for restart in range(_RESTARTS):
        if restart == _RESTARTS // 2:
            plans = [plan._replace(inside=None) for plan in plans]
        crowd = _Crowd(size, settings, hidden if restart < 2 else settings.max_hidden, rng)
        hosts = {plan.inside for plan in plans}
        for k, plan in enumerate(plans):
            side = settings.min_side + (largest - settings.min_side) * float(rng.random())
            if not crowd.add(plan, max(side, settings.min_side / _PART_SIDE) if k in hosts else side):
                break
        if len(crowd.placed) > len(best[0]):
            best = (crowd.placed, crowd.owner, crowd.covers)
        if len(crowd.placed) == len(plans):
            break
        largest = max(largest * 0.85, settings.min_side)
    return best


class _Crowd:
    """Shapes that already stand in a scene."""

    def __init__(self, size: int, settings: SceneSettings, hidden: float, rng: np.random.Generator):
        self.size, self.settings, self.hidden, self.rng = size, settings, hidden, rng
        self.placed: list[_Placed] = []
        self.visible: list[int] = []
        self.owner = np.full((size, size), -1, np.int16)
        self.covers: list[tuple[int, int]] = []

    def add(self, plan: _Plan, side: float) -> bool:
        """Finds a place for one more shape, smaller where it must be; False where there is none."""
        settings, rng = self.settings, self.rng
        host = None if plan.inside is None else self.placed[plan.inside]
        if host:
            side = max(_PART_SIDE * math.sqrt(host.area) / self.size, settings.min_side)
        turn = float(rng.uniform(-settings.max_turn, settings.max_turn))
        stretch = float(rng.uniform(1, settings.max_stretch))
        # A widened diamond would be a square that stands on its corner.
        stretch = stretch if rng.random() < 0.5 and plan.shape != "diamond" else 1 / stretch
        periods = float(rng.uniform(settings.min_periods, settings.max_periods))
        offset = (float(rng.random()), float(rng.random()))
        for _ in range(_SHRINKS):
            pixels = side * self.size
            stamp = make_stamp(plan.shape, plan.texture, pixels, turn, stretch, max(pixels / periods, 4.0), offset)
            for corner in self._positions(stamp, plan, host):
                if self._put(plan, stamp, corner):
                    return True
            if side == settings.min_side:
                break
            side = max(side * 0.8, settings.min_side)
        return False

    def _positions(self, stamp: Stamp, plan: _Plan, host: _Placed | None) -> list[tuple[int, int]]:
        """Corners x, y to try, in order: anywhere, or the nearest to a neighbour first, or about a host's middle."""
        height, width = stamp.cover.shape
        if max(height, width) > self.size:
            return []
        if host:
            rows, columns = np.nonzero(host.stamp.mask)
            x = host.corner[0] + int(columns.sum()) // len(columns) - width // 2
            y = host.corner[1] + int(rows.sum()) // len(rows) - height // 2
            shifts = self.rng.integers(-2, 3, (_POSITIONS, 2)).tolist()
            right, bottom = self.size - width, self.size - height
            return [(x + dx, y + dy) for dx, dy in shifts if 0 <= x + dx <= right and 0 <= y + dy <= bottom]
        corners = self.rng.integers(0, (self.size - width + 1, self.size - height + 1), (_POSITIONS, 2)).tolist()
        if plan.near is not None:
            other = self.placed[plan.near]
            x = other.corner[0] + (other.stamp.cover.shape[1] - width) // 2
            y = other.corner[1] + (other.stamp.cover.shape[0] - height) // 2
            corners.sort(key=lambda corner: (corner[0] - x) ** 2 + (corner[1] - y) ** 2)
        return [tuple(corner) for corner in corners]

    def _put(self, plan: _Plan, stamp: Stamp, corner: tuple[int, int]) -> bool:
        """Puts a stamp in front of the others unless it hides too much of one, or lies on its own colour."""
        mask = stamp.mask
        if not mask.any():  # too small to cover any pixel by half
            return False
        area = np.s_[corner[1] : corner[1] + mask.shape[0], corner[0] : corner[0] + mask.shape[1]]
        window = self.owner[area]
        hides = np.bincount(window[mask] + 1, minlength=len(self.placed) + 1)
        below = [int(k) for k in np.flatnonzero(hides[1:])]
        if plan.inside is not None:
            if hides[0] or below != [plan.inside]:
                return False
        else:
            for k in below:
                left = self.visible[k] - hides[k + 1]
                if self.placed[k].plan.colour == plan.colour or left < (1 - self.hidden) * self.placed[k].area:
                    return False
                rest = self.owner == k
                rest[area][mask] = False
                x0, y0, x1, y1 = box_from_mask(rest)
                if (x1 - x0) * (y1 - y0) < _MIN_BOX * self.size**2:
                    return False
        for k in below:
            self.visible[k] -= hides[k + 1]
            if k != plan.inside:
                self.covers.append((len(self.placed), k))
        window[mask] = len(self.placed)
        pixels = int(np.count_nonzero(mask))
        self.placed.append(_Placed(plan, stamp, corner, pixels))
        self.visible.append(pixels)
        return True
