"""Drawings of layouts, and grids of images, with Pillow only."""

import bisect
import math
from collections.abc import Sequence

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from instdiff_jax.layout import Instance, Layout

# Okabe and Ito's palette (told apart in all common kinds of colour blindness), without black, and darker and
# lighter relatives for layouts with many instances.
COLORS = (
    (230, 159, 0),
    (86, 180, 233),
    (0, 158, 115),
    (240, 228, 66),
    (0, 114, 178),
    (213, 94, 0),
    (204, 121, 167),
    (126, 47, 142),
    (119, 172, 48),
    (162, 20, 47),
    (64, 224, 208),
    (140, 86, 75),
)
_MASK_OPACITY = 0.4
_PAPER = (250, 250, 248)


def draw_layout(layout: Layout, image: UInt8[np.ndarray, "H W 3"] | None = None) -> UInt8[np.ndarray, "H W 3"]:
    """Draws a layout's boxes, masks, scribbles, points and captions over an image.

    Args:
        layout: what to draw; one colour per instance.
        image: of any size; the layout is scaled to it. None: a blank canvas of the layout's size.

    Returns:
        An image as large as `image` or the canvas.
    """
    if image is None:
        image = np.full((layout.height, layout.width, 3), _PAPER, np.uint8)
    height, width = image.shape[:2]
    # The largest first, so that what is small stays visible.
    order = sorted(range(len(layout.instances)), key=lambda i: -layout.instances[i].area)
    scale = np.array([width / layout.width, height / layout.height])
    stroke = max(2, round(min(width, height) / 200))
    picture = Image.fromarray(np.ascontiguousarray(image))
    for i in order:
        if layout.instances[i].mask is not None:
            _draw_mask(picture, layout.instances[i].mask, _color(i), stroke)
    draw = ImageDraw.Draw(picture)
    for i in order:
        _draw_places(draw, layout.instances[i], _color(i), scale, stroke)
    font = _font(max(11, round(min(width, height) / 36)))
    # Labels keep clear of points and of each other.
    points = [np.array(instance.point) * scale for instance in layout.instances if instance.point is not None]
    taken = [(*(point - 3 * stroke), *(point + 3 * stroke)) for point in points]
    # The smallest first: they have the least room for their label.
    for i in reversed(order):
        anchor = _anchor(layout.instances[i]) * scale
        _draw_label(draw, layout.instances[i].caption, anchor, _color(i), font, (width, height), taken)
    return np.asarray(picture)


def enlarge(image: UInt8[np.ndarray, "H W 3"], least: int = 256) -> UInt8[np.ndarray, "H2 W2 3"]:
    """Enlarges an image by a whole factor until its shorter side has at least so many pixels."""
    factor = math.ceil(least / min(image.shape[:2]))
    if factor == 1:
        return image
    size = (image.shape[1] * factor, image.shape[0] * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def contact_sheet(
    images: Sequence[UInt8[np.ndarray, "_ _ 3"]], captions: Sequence[str] | None = None, columns: int | None = None
) -> UInt8[np.ndarray, "sheet_H sheet_W 3"]:
    """Images in a grid, with captions beneath if given.

    Args:
        images: at least one; each is centred in a cell of the largest one's size.
        captions: one per image, cut to at most three lines.
        columns: images per row; by default about as many as rows.
    """
    if not images:
        raise ValueError("expected at least one image")
    if captions is not None and len(captions) != len(images):
        raise ValueError(f"expected {len(images)} captions, got {len(captions)}")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    cell_height = max(image.shape[0] for image in images)
    cell_width = max(image.shape[1] for image in images)
    gap = max(4, round(cell_width / 64))
    font = _font(max(11, round(cell_width / 32)))
    line = _line_height(font)
    texts = [_wrap(caption, font, cell_width, 3) for caption in captions or [""] * len(images)]
    text_height = max(map(len, texts)) * line + (gap if captions else 0)
    size = (columns * (cell_width + gap) + gap, rows * (cell_height + text_height + gap) + gap)
    sheet = Image.new("RGB", size, _PAPER)
    draw = ImageDraw.Draw(sheet)
    for i, (image, lines) in enumerate(zip(images, texts)):
        x = gap + i % columns * (cell_width + gap)
        y = gap + i // columns * (cell_height + text_height + gap)
        offset = (cell_width - image.shape[1]) // 2, (cell_height - image.shape[0]) // 2
        left, top = x + offset[0], y + offset[1]
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (left, top))
        draw.rectangle((left - 1, top - 1, left + image.shape[1], top + image.shape[0]), outline=(200, 200, 200))
        for k, text in enumerate(lines):
            draw.text((x, y + cell_height + gap // 2 + k * line), text, fill=(30, 30, 30), font=font)
    return np.asarray(sheet)


def _draw_mask(picture: Image.Image, mask: np.ndarray, color: tuple[int, int, int], stroke: int) -> None:
    """A translucent fill with a solid rim."""
    inside = Image.fromarray(mask.astype(np.uint8) * 255).resize(picture.size, Image.Resampling.NEAREST)
    rim = ImageChops.subtract(inside, inside.filter(ImageFilter.MinFilter(2 * stroke - 1)))
    picture.paste(color, mask=inside.point(lambda value: round(value * _MASK_OPACITY)))
    picture.paste(color, mask=rim)


def _draw_places(
    draw: ImageDraw.ImageDraw, instance: Instance, color: tuple[int, int, int], scale: np.ndarray, stroke: int
) -> None:
    """Box, scribble and point, each over a wider dark or light edge so that it shows on any image."""
    edge = _contrast(color)
    if instance.box is not None:
        corners = np.reshape(instance.box, (2, 2)) * scale
        (x0, y0), (x1, y1) = corners[0].astype(int), np.maximum(corners[1].astype(int) - 1, corners[0].astype(int))
        draw.rectangle((x0 - 1, y0 - 1, x1 + 1, y1 + 1), outline=edge, width=stroke + 2)
        draw.rectangle((x0, y0, x1, y1), outline=color, width=stroke)
    if instance.scribble is not None:
        path = [tuple(point) for point in instance.scribble * scale]
        draw.line(path, fill=edge, width=2 * stroke + 2, joint="curve")
        draw.line(path, fill=color, width=2 * stroke, joint="curve")
    if instance.point is not None:
        center, radius = np.array(instance.point) * scale, 2.5 * stroke
        draw.ellipse((*(center - radius), *(center + radius)), fill=color, outline=edge, width=max(1, stroke // 2))


def _draw_label(
    draw: ImageDraw.ImageDraw,
    text: str,
    anchor: np.ndarray,
    color: tuple[int, int, int],
    font: ImageFont.ImageFont,
    size: tuple[int, int],
    taken: list[tuple[float, float, float, float]],
) -> None:
    """A filled label inside the image, at the anchor or in the first free row below or above it."""
    pad = 2
    width, height = size
    lines = _wrap(text, font, min(width - 2 * pad, max(width // 3, 96)), 2)
    line = _line_height(font)
    label_width = min(math.ceil(max(font.getlength(part) for part in lines)) + 2 * pad, width)
    label_height = line * len(lines) + 2 * pad
    x = int(min(max(anchor[0], 0), width - label_width))
    lowest = max(height - label_height, 0)
    first = int(min(max(anchor[1], 0), lowest))
    step = max(line // 2, 1)
    candidates = [*range(first, lowest + 1, step), *range(first, -1, -step)]
    free = (y for y in candidates if not any(_overlap((x, y, x + label_width, y + label_height), t) for t in taken))
    y = next(free, first)
    taken.append((x, y, x + label_width, y + label_height))
    draw.rectangle((x, y, x + label_width - 1, y + label_height - 1), fill=color)
    for k, part in enumerate(lines):
        draw.text((x + pad, y + pad + k * line), part, fill=_contrast(color), font=font)


def _anchor(instance: Instance) -> np.ndarray:
    """Where an instance's label begins, in pixels of the canvas."""
    if instance.box is not None:
        return np.array(instance.box[:2])
    if instance.mask is not None:
        return np.array([np.flatnonzero(instance.mask.any(axis=axis))[0] for axis in (0, 1)])
    return np.array(instance.point) if instance.point is not None else instance.scribble[0]


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _wrap(text: str, font: ImageFont.ImageFont, width: float, most: int) -> list[str]:
    """Text as lines that fit a width in pixels; what goes beyond `most` lines ends in an ellipsis."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if not lines[-1] or len(longer) <= 4 * width and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    return [_fit(line, font, width) for line in lines]


def _fit(line: str, font: ImageFont.ImageFont, width: float) -> str:
    # Measuring takes long for text far too long to fit.
    most = max(int(4 * width), 0)
    if len(line) <= most and font.getlength(line) <= width:
        return line
    line = line.removesuffix(" ...")[:most]
    fitting = bisect.bisect_right(range(1, len(line) + 1), width, key=lambda n: font.getlength(line[:n] + "..."))
    return line[:fitting] + "..." if fitting else ""


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _line_height(font: ImageFont.ImageFont) -> int:
    top, bottom = font.getbbox("Ág")[1::2]
    return math.ceil(bottom - min(top, 0)) + 1


def _color(i: int) -> tuple[int, int, int]:
    """Colour of instance i: the palette, then darker, then lighter forms of it."""
    color = np.array(COLORS[i % len(COLORS)])
    turn = i // len(COLORS)
    mixed = (color, color * 0.6, color * 0.5 + 127)[turn % 3]
    return tuple(int(value) for value in mixed)


def _contrast(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever reads better on the colour (ITU-R BT.601 luma)."""
    luma = 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
    return (0, 0, 0) if luma > 110 else (255, 255, 255)
