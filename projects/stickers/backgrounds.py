"""Backgrounds as in a picture book: plain, fading, a table, a meadow under the sky, a room."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from projects.common.words import article, pick

# Muted tones, from which things of all colours stand out.
PAPERS: dict[str, tuple[int, int, int]] = {
    "cream": (236, 218, 180),
    "mint": (168, 208, 184),
    "lilac": (190, 176, 214),
    "peach": (240, 186, 156),
    "grey": (168, 172, 178),
    "turquoise": (126, 186, 194),
}
WOODS: dict[str, tuple[int, int, int]] = {"light": (206, 162, 112), "brown": (158, 108, 70), "dark": (104, 72, 54)}
SKIES: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "blue": ((116, 182, 232), (196, 226, 240)),
    "evening": ((132, 120, 176), (244, 186, 150)),
    "cloudy": ((150, 166, 184), (200, 208, 214)),
}
GROUNDS: dict[str, tuple[tuple[int, int, int], tuple[int, int, int]]] = {
    "grass": ((142, 186, 92), (96, 148, 66)),
    "sand": ((232, 208, 150), (206, 174, 112)),
    "snow": ((226, 232, 240), (194, 206, 222)),
}
KINDS = ("plain", "gradient", "table", "meadow", "room")
_JITTER = 8

Canvas = UInt8[np.ndarray, "size size 3"]


class Background(NamedTuple):
    """A picture without things, and words for it with their preposition: "on a cream background"."""

    image: Canvas
    words: str


def draw_background(kind: str, size: int, rng: np.random.Generator) -> Background:
    """Draws a random background of a kind."""
    return {"plain": _plain, "gradient": _gradient, "table": _table, "meadow": _meadow, "room": _room}[kind](size, rng)


def _plain(size: int, rng: np.random.Generator) -> Background:
    name = pick(tuple(PAPERS), rng)
    image = np.broadcast_to(_shift(PAPERS[name], rng).astype(np.uint8), (size, size, 3)).copy()
    return Background(image, f"on {article(name)} {name} background")


def _gradient(size: int, rng: np.random.Generator) -> Background:
    first, second = (tuple(PAPERS)[i] for i in rng.choice(len(PAPERS), 2, replace=False))
    step = _steps(size)
    dx, dy = ((1, 0), (0, 1), (0.5, 0.5))[rng.integers(3)]
    share = np.float32(dx) * step + np.float32(dy) * step[:, None]
    image = _blend(_shift(PAPERS[first], rng), _shift(PAPERS[second], rng), share)
    return Background(image, f"on a background fading from {first} to {second}")


def _table(size: int, rng: np.random.Generator) -> Background:
    wall, wood = pick(tuple(PAPERS), rng), pick(tuple(WOODS), rng)
    edge, top = int(size * rng.uniform(0.4, 0.65)), _shift(WOODS[wood], rng)
    image = np.empty((size, size, 3), np.uint8)
    image[:edge] = _shift(PAPERS[wall], rng)
    image[edge:] = _blend(np.minimum(top + 18, 255), top - 8, _steps(size - edge)[:, None] * np.ones(size, np.float32))
    image[edge : edge + max(size // 64, 1)] = np.minimum(top + 40, 255)
    # Two seams between boards.
    for at in (0.35, 0.7):
        image[edge + int(at * (size - edge))] = top - 30
    return Background(image, pick((f"on a {wood} table", f"on a {wood} wooden table"), rng))


def _meadow(size: int, rng: np.random.Generator) -> Background:
    sky, ground = pick(tuple(SKIES), rng), pick(tuple(GROUNDS), rng)
    high, low = (_shift(rgb, rng) for rgb in SKIES[sky])
    near, far = (_shift(rgb, rng) for rgb in GROUNDS[ground])
    step = _steps(size)
    image = _blend(high, low, np.minimum(step / np.float32(0.6), 1)[:, None] * np.ones(size, np.float32))
    # Two hills, parabolas: the same on every machine, which sines need not be.
    level = rng.uniform(0.45, 0.65)
    for shade, lift in ((12, 0.06), (0, 0.0)):
        peak, height = np.float32(rng.uniform(0, 1)), np.float32(rng.uniform(0.02, 0.09))
        top = np.float32(level - lift) - height * np.maximum(1 - 4 * (step - peak) ** 2, 0)
        hill = _blend(near, far, np.broadcast_to(step[:, None], (size, size)))
        below = step[:, None] >= top
        image[below] = np.clip(hill[below].astype(np.int32) + shade, 0, 255)
    names = {"blue": "a blue sky", "evening": "an evening sky", "cloudy": "a grey sky"}
    return Background(image, pick((f"on {ground} under {names[sky]}", f"on the {ground}, under {names[sky]}"), rng))


def _room(size: int, rng: np.random.Generator) -> Background:
    wall, wood = pick(tuple(PAPERS), rng), pick(tuple(WOODS), rng)
    edge, floor, paint = int(size * rng.uniform(0.55, 0.75)), _shift(WOODS[wood], rng), _shift(PAPERS[wall], rng)
    image = np.empty((size, size, 3), np.uint8)
    image[:edge] = paint
    if rng.random() < 0.5:
        # Stripes of wallpaper.
        image[:edge, np.arange(size) // max(size // 16, 1) % 2 == 0] = paint - 8
    image[edge:] = _blend(floor, floor - 20, _steps(size - edge)[:, None] * np.ones(size, np.float32))
    # The skirting board.
    image[edge - max(size // 32, 1) : edge] = np.minimum(paint + 30, 255)
    forms = (f"in a room with {article(wall)} {wall} wall", f"in a {wall} room", f"in a room with a {wood} floor")
    return Background(image, pick(forms, rng).replace("in a " + wall, f"in {article(wall)} {wall}"))


def _steps(size: int) -> Float[np.ndarray, "size"]:
    return np.arange(size, dtype=np.float32) / np.float32(max(size - 1, 1))


def _shift(rgb: tuple[int, int, int], rng: np.random.Generator) -> Int[np.ndarray, "3"]:
    return np.array(rgb) + rng.integers(-_JITTER, _JITTER + 1, 3)


def _blend(
    first: Int[np.ndarray, "3"], second: Int[np.ndarray, "3"], share: Float[np.ndarray, "h w"]
) -> UInt8[np.ndarray, "h w 3"]:
    """From the first colour (share 0) to the second; weights in 1/256, so that the blend is exact."""
    weight = (share * np.float32(256)).astype(np.int32)[..., None]
    return np.clip((first * (256 - weight) + second * weight + 128) // 256, 0, 255).astype(np.uint8)
