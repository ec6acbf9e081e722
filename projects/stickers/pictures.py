"""The pictures of things: loaded from a folder of emoji, recoloured, scaled, turned and flipped.

Recolouring works in HSV on the pixels near the hue of the thing's main part. All arithmetic on floats is of single
operations in a fixed order, so that a scene is the same on every machine with the same version of Pillow.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from jaxtyping import Bool, Float, UInt8
from PIL import Image

from instdiff_jax.errors import InputError
from projects.stickers.things import THINGS, Thing


class Tone(NamedTuple):
    """A colour as a map of HSV: its hue in degrees, a factor of the saturation, and the value of black and of white."""

    hue: int
    saturation: float
    dark: float
    light: float


# The paper's eight colours (section 4, attribute binding).
COLOURS: dict[str, Tone] = {
    "black": Tone(230, 0.12, 0.02, 0.32),
    "white": Tone(230, 0.05, 0.42, 1.03),
    "red": Tone(356, 1.0, 0.0, 0.96),
    "green": Tone(128, 0.85, 0.0, 0.74),
    "yellow": Tone(47, 0.95, 0.2, 1.06),
    "blue": Tone(220, 0.92, 0.0, 0.98),
    "pink": Tone(336, 0.42, 0.25, 1.06),
    "purple": Tone(278, 0.75, 0.0, 0.78),
}
# Hues this far from the thing's own belong to the part that is recoloured; beyond, the share falls to 0 at `_FAR`.
_NEAR, _FAR = 38.0, 58.0
# Pictures are kept at this size: the largest stamps are smaller.
_KEPT = 128
_HOW_TO = "npm pack @lobehub/fluent-emoji-3d && tar xzf lobehub-fluent-emoji-3d-*.tgz"


class Stamp(NamedTuple):
    """A thing in the smallest window around it: red, green, blue (multiplied by alpha) and alpha."""

    pixels: UInt8[np.ndarray, "h w 4"]

    @property
    def mask(self) -> Bool[np.ndarray, "h w"]:
        """Pixels of which the thing covers at least half."""
        return self.pixels[..., 3] >= 128


class Pictures:
    """The pictures of all things, in every colour that they can have."""

    def __init__(self, own: Mapping[str, Image.Image]):
        """Takes RGBA pictures by the name of their thing; empty margins are cut. InputError for an empty picture."""
        self._own = {name: _cut(name, picture) for name, picture in own.items()}
        self._kept: dict[tuple[str, str | None], Image.Image] = {}

    @property
    def names(self) -> tuple[str, ...]:
        """The things that there are pictures of."""
        return tuple(self._own)

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Opens the pictures CODE.webp (or .png) of a folder, or of package/assets in it.

        Raises:
            InputError: if one is missing or cannot be read.
        """
        folder = Path(folder)
        inside = folder / "package" / "assets"
        folder = inside if inside.is_dir() else folder
        return cls({name: _open(folder, thing) for name, thing in THINGS.items()})

    def stamp(self, name: str, colour: str | None, side: float, turn: float = 0.0, flip: bool = False) -> Stamp:
        """Draws a thing.

        Args:
            name: of the thing.
            colour: a name in `COLOURS`, or None for its own colours.
            side: its longer side in pixels, before rotation; at most 128 looks sharp.
            turn: rotation in degrees, counterclockwise.
            flip: mirrored, so that it looks to the right.
        """
        picture = self._picture(name, colour)
        scale = 2 * side / max(picture.size)
        # Rotated at twice the size and then halved, which keeps edges sharp.
        size = tuple(max(2, round(scale * length)) for length in picture.size)
        picture = picture.resize(size, Image.Resampling.LANCZOS)
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else picture
        picture = picture.rotate(turn, Image.Resampling.BILINEAR, expand=True)
        pixels = np.array(picture.reduce(2))
        # Lanczos overshoots at edges; no colour is brighter than its alpha.
        np.minimum(pixels, pixels[..., 3:], out=pixels)
        rows, columns = (np.flatnonzero((pixels[..., 3] > 8).any(axis)) for axis in (1, 0))
        return Stamp(pixels[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1])

    def _picture(self, name: str, colour: str | None) -> Image.Image:
        if (name, colour) not in self._kept:
            picture, hue = self._own[name], THINGS[name].hue
            if colour is not None and hue is not None:
                picture = Image.fromarray(recolour(np.asarray(picture), hue, COLOURS[colour]))
            self._kept[name, colour] = picture.convert("RGBa")
        return self._kept[name, colour]


def _cut(name: str, picture: Image.Image) -> Image.Image:
    """Cuts empty margins, and scales down to the size that is kept."""
    box = picture.getchannel("A").getbbox()
    if box is None:
        raise InputError(f"{name}: expected a picture with visible pixels, got an empty one")
    picture = picture.crop(box)
    picture.thumbnail((_KEPT, _KEPT), Image.Resampling.LANCZOS)
    return picture


def _open(folder: Path, thing: Thing) -> Image.Image:
    for suffix in (".webp", ".png"):
        path = folder / f"{thing.code}{suffix}"
        if path.is_file():
            try:
                return Image.open(path).convert("RGBA")
            except OSError as error:
                raise InputError(f"{path}: expected a picture ({error})") from error
    raise InputError(f"--assets: {folder / thing.code}.webp: missing ({thing.name}); get the pictures with: {_HOW_TO}")


def recolour(pixels: UInt8[np.ndarray, "h w 4"], hue: int, tone: Tone) -> UInt8[np.ndarray, "h w 4"]:
    """Gives the pixels near a hue a colour; others, grey ones and alpha stay."""
    rgb = pixels[..., :3].astype(np.float32) / np.float32(255)
    h, s, v = _to_hsv(rgb)
    away = np.abs((h - hue + 180) % 360 - 180)
    share = np.clip((_FAR - away) / (_FAR - _NEAR), 0, 1) * np.clip((s - 0.15) / 0.15, 0, 1)
    share = (share * (pixels[..., 3] > 0)).astype(np.float32)
    # The main part's typical saturation and value become those of the colour; shading is kept around them.
    main = share > 0.5
    if not main.any():
        return pixels
    middle_s, middle_v = np.median(s[main]), np.median(v[main])
    shade = np.clip(v / middle_v * np.float32(0.86), 0, 1)
    value = tone.dark + (tone.light - tone.dark) * shade
    saturation = np.clip(s / middle_s * np.float32(0.85), 0.5, 1) * tone.saturation
    turned = (tone.hue + ((h - hue + 180) % 360 - 180) * np.float32(0.15)) % 360
    new = _to_rgb(turned, saturation, np.clip(value, 0, 1))
    out = rgb + (new - rgb) * share[..., None]
    colours = np.rint(np.clip(out, 0, 1) * np.float32(255)).astype(np.uint8)
    return np.concatenate([colours, pixels[..., 3:]], axis=-1)


def _to_hsv(
    rgb: Float[np.ndarray, "h w 3"],
) -> tuple[Float[np.ndarray, "h w"], Float[np.ndarray, "h w"], Float[np.ndarray, "h w"]]:
    r, g, b = (rgb[..., k] for k in range(3))
    most, least = rgb.max(-1), rgb.min(-1)
    spread = np.maximum(most - least, np.float32(1e-6))
    sector = np.select([most == r, most == g], [((g - b) / spread) % 6, (b - r) / spread + 2], (r - g) / spread + 4)
    return sector * 60, np.where(most > 0, (most - least) / np.maximum(most, np.float32(1e-6)), 0), most


def _to_rgb(
    h: Float[np.ndarray, "h w"], s: Float[np.ndarray, "h w"], v: Float[np.ndarray, "h w"]
) -> Float[np.ndarray, "h w 3"]:
    planes = []
    for n in (5, 3, 1):
        k = (n + h / 60) % 6
        planes.append(v - v * s * np.clip(np.minimum(k, 4 - k), 0, 1))
    return np.stack(planes, -1).astype(np.float32)
