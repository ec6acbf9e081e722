"""Which shapes a scene has, and where they stand."""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from projects.common.crowd import Crowd
from projects.shapes.drawing import COLOURS, TEXTURES, Stamp, make_stamp
from projects.shapes.worlds import SceneSettings

# Shapes with enough room in the middle for a part.
_HOSTS = ("circle", "square", "heart", "hexagon", "triangle")
_PART_SIDE = 0.42
_POSITIONS = 32
_SHRINKS = 5
_RESTARTS = 8


class Plan(NamedTuple):
    """A shape without a place; `near` is the index of the plan it should stand next to, `inside` that of its host."""

    shape: str
    colour: str
    texture: str
    near: int | None = None
    inside: int | None = None


class Placed(NamedTuple):
    """A shape with a place: its stamp's top left corner (x, y), and its area in pixels, hidden ones included."""

    plan: Plan
    stamp: Stamp
    corner: tuple[int, int]
    area: int


class Arrangement(NamedTuple):
    """The shapes of a scene from back to front.

    Attributes:
        placed: the shapes.
        owner: index of the shape that is visible at each pixel; -1 is the background.
        covers: pairs (i, j): shape i lies in front of shape j and hides a part of it.
    """

    placed: list[Placed]
    owner: Int[np.ndarray, "H W"]
    covers: list[tuple[int, int]]


def _choose_shapes(settings: SceneSettings, rng: np.random.Generator) -> list[Plan]:
    """The shapes of a scene from back to front, not yet placed."""
    count = int(rng.integers(settings.min_instances, settings.max_instances + 1))
    colours, plans = list(COLOURS), []
    if settings.confusable:
        for start in range(0, count, 4):
            shape = settings.choices[rng.integers(len(settings.choices))]
            c, t = rng.permutation(len(colours)), rng.permutation(len(TEXTURES))
            looks = [(c[0], t[0]), (c[1], t[1]), (c[0], t[1]), (c[1], t[0])]
            for k, (i, j) in enumerate(looks[: count - start]):
                plans.append(Plan(shape, colours[i], TEXTURES[j], near=start if k else None))
        return plans
    kinds = settings.choices, colours, TEXTURES
    for _ in range(count):
        shape, colour, texture = (options[rng.integers(len(options))] for options in kinds)
        plans.append(Plan(shape, colour, texture))
    hosts = [k for k in range(count - 1) if plans[k].shape in _HOSTS]
    if hosts and rng.random() < settings.nested:
        k = hosts[rng.integers(len(hosts))]
        others = [colour for colour in colours if colour != plans[k].colour]
        part = plans[k + 1]
        plans[k + 1] = part._replace(colour=others[rng.integers(len(others))], inside=k)
    return plans


def arrange_shapes(size: int, settings: SceneSettings, rng: np.random.Generator) -> Arrangement:
    """Chooses shapes and places them one by one, with smaller ones if there is no room.

    Returns:
        The arrangement with the most shapes of several attempts; empty if no shape fits.
    """
    plans = _choose_shapes(settings, rng)
    # Confusable neighbours stand side by side: occlusion would disturb the measure of leaking attributes.
    hidden = 0.0 if settings.confusable else max(float(rng.uniform(-0.5, 1.0)), 0.0) * settings.max_hidden
    largest = max(min(settings.max_side, 1.15 / math.sqrt(len(plans))), settings.min_side)
    best = Arrangement([], np.full((size, size), -1, np.int16), [])
    for restart in range(_RESTARTS):
        if restart == _RESTARTS // 2:
            plans = [plan._replace(inside=None) for plan in plans]
        crowd = _Crowd(size, settings, hidden if restart < 2 else settings.max_hidden, rng)
        hosts = {plan.inside for plan in plans}
        for k, plan in enumerate(plans):
            side = settings.min_side + (largest - settings.min_side) * float(rng.random())
            if not crowd.add(plan, max(side, settings.min_side / _PART_SIDE) if k in hosts else side):
                break
        if len(crowd.placed) > len(best.placed):
            best = Arrangement(crowd.placed, crowd.owner, crowd.covers)
        if len(crowd.placed) == len(plans):
            break
        largest = max(largest * 0.85, settings.min_side)
    return best


class _Crowd(Crowd):
    """The shapes placed so far."""

    def __init__(self, size: int, settings: SceneSettings, hidden: float, rng: np.random.Generator):
        super().__init__(size, hidden)
        self.settings, self.rng = settings, rng
        self.placed: list[Placed] = []

    def add(self, plan: Plan, side: float) -> bool:
        """Places one more shape, shrinking it if necessary; False if there is no room."""
        settings, rng = self.settings, self.rng
        host = None if plan.inside is None else self.placed[plan.inside]
        if host:
            side = max(_PART_SIDE * math.sqrt(host.area) / self.size, settings.min_side)
        turn = float(rng.uniform(-settings.max_turn, settings.max_turn))
        stretch = float(rng.uniform(1, settings.max_stretch))
        # A widened diamond would look like a square turned by 45 degrees.
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

    def _positions(self, stamp: Stamp, plan: Plan, host: Placed | None) -> list[tuple[int, int]]:
        """Corners (x, y) to try in order: anywhere, or nearest to a neighbour first, or around the middle of a host."""
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

    def _put(self, plan: Plan, stamp: Stamp, corner: tuple[int, int]) -> bool:
        """Places a stamp in front of the others, unless it hides too much of one or covers its own colour."""
        if not self.put(stamp.mask, corner, lambda k: self.placed[k].plan.colour == plan.colour, plan.inside):
            return False
        self.placed.append(Placed(plan, stamp, corner, self.areas[-1]))
        return True
