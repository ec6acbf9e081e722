"""Pictures of things for tests that have no emoji: a disc of the thing's hue on a grey foot."""

from pathlib import Path

import numpy as np
from PIL import Image

from projects.stickers.pictures import Pictures
from projects.stickers.things import THINGS

SIDE = 40


def made_up_picture(hue: int | None) -> Image.Image:
    """RGBA, 40 pixels: a disc, purer on its left half; below it a grey foot; around both, empty margins."""
    y, x = np.indices((SIDE, SIDE)) - SIDE // 2
    disc, foot = x * x + y * y <= 12**2, (np.abs(x) < 4) & (y > 8) & (y < 17)
    hsv = np.zeros((SIDE, SIDE, 3), np.uint8)
    hsv[..., 0] = (200 if hue is None else hue) * 255 // 360
    hsv[..., 1] = np.where(x < 0, 230, 180)
    hsv[..., 2] = np.where(x < 0, 230, 200)
    rgb = np.array(Image.fromarray(hsv, "HSV").convert("RGB"))
    rgb[foot & ~disc] = 120
    alpha = np.where(disc | foot, 255, 0).astype(np.uint8)
    return Image.fromarray(np.dstack([rgb, alpha]), "RGBA")


def made_up_pictures() -> Pictures:
    """One for every thing."""
    return Pictures({name: made_up_picture(thing.hue) for name, thing in THINGS.items()})


def write_made_up_pictures(folder: Path) -> Path:
    """Writes them as the emoji's files are named; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for thing in THINGS.values():
        made_up_picture(thing.hue).save(folder / f"{thing.code}.png")
    return folder
