"""The report as one self-contained HTML page: images beside their layouts, the worst first."""

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from pycocotools import mask as coco_mask

from instdiff_jax.evaluation.files import encode_image, image_path, read_image
from instdiff_jax.evaluation.image import EvaluatedImage
from instdiff_jax.evaluation.layouts import make_layout
from instdiff_jax.evaluation.report import flat, show, tables
from instdiff_jax.layout import MAX_INSTANCES, Instance, Layout
from instdiff_jax.sampling.visualize import draw_layout

# Layouts are drawn at least this large, in pixels, so that their captions can be read.
_DRAWN = 320
_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #2a7; --bad: #c43; }
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 78rem; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .75rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; }
article { border: 1px solid var(--line); border-radius: 8px; padding: 1rem; margin: 1rem 0; }
.views { display: flex; flex-wrap: wrap; gap: 1rem; }
figure { margin: 0; width: min(320px, 100%); } figure img { width: 100%; display: block; border-radius: 4px; }
img.small { image-rendering: pixelated; }
figcaption { opacity: .7; font-size: .85rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
details { margin-top: .75rem; }
"""


def make_page(
    report: Mapping[str, Any],
    images: Sequence[EvaluatedImage],
    folder: Path,
    format: str,
    min_score: float,
    most: int = 60,
) -> str:
    """The page as HTML.

    Args:
        report: as `make_report` gives it.
        images: the images of the report; without a detector they keep their order.
        folder: the evaluation's; its images are copied into the page.
        format: of the layouts, which are shown as the model got them.
        min_score: detections with a lower score are not shown.
        most: the number of images to show.
    """
    order = sorted(images, key=lambda image: (image.score is not None, image.score or 0.0))
    parts = ["<h1>Evaluation</h1>", "<p>AP, AR, IoU, PiM and accuracy in percent.</p>"]
    for title, head, rows in tables(report):
        parts += [f"<h2>{title}</h2>", _table(head, rows)]
    if report["notes"]:
        parts += ["<h2>Notes</h2><ul>", *(f"<li>{html.escape(note)}</li>" for note in report["notes"]), "</ul>"]
    shown = order[:most]
    ranked = "worst first" if any(image.score is not None for image in shown) else "in order"
    parts.append(f"<h2>Images, {ranked}: {len(shown)} of {len(images)}</h2>")
    parts += [_article(image, folder, format, min_score) for image in shown]
    parts += ["<h2>Settings</h2>", _table(["setting", "value"], [list(pair) for pair in flat(report["settings"])])]
    head = "<meta charset='utf-8'><meta name='viewport' content='width=device-width'><title>Evaluation</title>"
    head += f"<style>{_STYLE}</style>"
    return f"<!doctype html><html lang='en'><head>{head}</head><body>{''.join(parts)}</body></html>\n"


def _article(evaluated: EvaluatedImage, folder: Path, format: str, min_score: float) -> str:
    scene = evaluated.scene
    image = read_image(image_path(folder, scene), scene.size)
    side = scene.size * -(-_DRAWN // scene.size)
    paper = np.full((side, side, 3), 250, np.uint8)
    views = [_figure(draw_layout(make_layout(scene, format), paper), "layout"), _figure(image, "image")]
    found = _found_layout(evaluated, min_score)
    if found is not None:
        enlarged = image.repeat(side // scene.size, axis=0).repeat(side // scene.size, axis=1)
        views.append(_figure(draw_layout(found, enlarged), "found by the detector"))
    score = "" if evaluated.score is None else f" · mean IoU {100 * evaluated.score:.1f}"
    title = f"<h3>{scene.image_id}{score}</h3><p>{html.escape(scene.caption)}</p>"
    return f"<article>{title}<div class='views'>{''.join(views)}</div>{_instances(evaluated)}</article>"


def _instances(evaluated: EvaluatedImage) -> str:
    """A table of the requested instances."""
    if not evaluated.measures:
        return ""
    kinds = sorted({kind for target in evaluated.scene.asked for kind in target.attributes})
    rows = []
    for target, item in zip(evaluated.scene.asked, evaluated.measures, strict=True):
        cells = [html.escape(target.caption)]
        cells += [show("IoU", value) for value in (item.box_iou, item.mask_iou)]
        cells += [show("PiM", value) for value in (item.point_in, item.scribble_in)]
        for kind in kinds:
            seen = "not found" if item.match is None else item.match.attributes.get(kind, "–")
            right = seen == target.attributes.get(kind)
            cells.append(f"<span class='{'good' if right else 'bad'}'>{html.escape(seen)}</span>")
        rows.append(cells)
    head = ["instance", "box IoU", "mask IoU", "PiM point", "PiM scribble", *kinds]
    return f"<details><summary>{len(rows)} instances</summary>{_table(head, rows, escape=False)}</details>"


def _found_layout(evaluated: EvaluatedImage, min_score: float) -> Layout | None:
    """Detections with a high enough score as a layout; None if there are none."""
    size, instances = evaluated.scene.size, []
    for found in sorted(evaluated.found, key=lambda item: -item.score)[:MAX_INSTANCES]:
        x, y, w, h = found.box
        x0, y0, x1, y1 = (min(max(edge, 0.0), float(size)) for edge in (x, y, x + w, y + h))
        if found.score < min_score or x1 - x0 < 1 or y1 - y0 < 1:
            continue
        mask = None if found.rle is None else coco_mask.decode(found.rle).astype(bool)
        words = [*found.attributes.values(), found.category, f"{found.score:.2f}"]
        instances.append(
            Instance(" ".join(words), (x0, y0, x1, y1), mask=mask if mask is not None and mask.any() else None)
        )
    return Layout("", size, size, tuple(instances)) if instances else None


def _figure(image: UInt8[np.ndarray, "H W 3"], text: str) -> str:
    # PNG keeps small images sharp; a page of large ones would have hundreds of megabytes, hence JPEG.
    large = min(image.shape[:2]) > 400
    data = encode_image(image, **(dict(format="JPEG", quality=85) if large else {}))
    source = f"data:image/{'jpeg' if large else 'png'};base64,{base64.b64encode(data).decode('ascii')}"
    kind = " class='small'" if image.shape[1] < _DRAWN else ""
    return f"<figure><img{kind} alt='{text}' src='{source}'><figcaption>{text}</figcaption></figure>"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], escape: bool = True) -> str:
    def line(cells: Sequence[str], tag: str, escaped: bool) -> str:
        return "".join(f"<{tag}>{html.escape(cell) if escaped else cell}</{tag}>" for cell in cells)

    body = "".join(f"<tr>{line(row, 'td', escape)}</tr>" for row in rows)
    return f"<div class='scroll'><table><tr>{line(head, 'th', True)}</tr>{body}</table></div>"
