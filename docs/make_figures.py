"""Makes the figures of the README and of docs/. The small model generates its images with seed 0.

python docs/make_figures.py
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from instdiff_jax import Layout, Pipeline  # noqa: E402
from instdiff_jax.parallel.runtime import set_up_compilation  # noqa: E402
from instdiff_jax.sampling.visualize import contact_sheet, draw_layout, enlarge  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
CHECKPOINT = ROOT / "checkpoints" / "shapes"
# Layouts of the official demos, drawn without a model.
DEMOS = ("demo_cat_dog_robin", "demo_corgi_kitchen", "demo_palm_point")
# The first figure of the README: layouts of each kind, each with an image of the small model.
KINDS = {
    "boxes_eight_colours": "boxes",
    "boxes_dense": "ten boxes",
    "masks": "masks",
    "scribbles": "scribbles",
    "points": "points",
    "mixed": "all four",
    "parts": "parts",
    "boxes_same_shape": "one shape, four looks",
}
SERIES = {
    "series_1_two": "two",
    "series_2_add": "add two",
    "series_3_move": "move",
    "series_4_replace": "replace",
    "series_5_resize": "resize",
}


def layouts_and_images(pipeline: Pipeline, names: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
    """The drawing of each layout on white, and its generated image."""
    layouts = [Layout.from_json(ROOT / "examples" / "shapes" / f"{name}.json") for name in names]
    pairs = []
    for result in pipeline(layouts, seeds=[0]):
        image = enlarge(result.array)
        pairs.append((draw_layout(result.layout, np.full_like(image, 255)), image))
    return pairs


def save(name: str, sheet: np.ndarray, width: int = 1200) -> None:
    FIGURES.mkdir(exist_ok=True)
    size = (width, round(width * sheet.shape[0] / sheet.shape[1]))
    Image.fromarray(sheet).resize(size, Image.Resampling.LANCZOS).save(FIGURES / name, optimize=True)
    print(FIGURES / name)


def main() -> None:
    layouts = [Layout.from_json(ROOT / "examples" / f"{name}.json") for name in DEMOS]
    save("layout.png", contact_sheet([draw_layout(layout) for layout in layouts], columns=3))
    set_up_compilation()
    pipeline = Pipeline.from_checkpoint(CHECKPOINT)
    images = [image for pair in layouts_and_images(pipeline, list(KINDS)) for image in pair]
    captions = [text for kind in KINDS.values() for text in (kind, "")]
    save("shapes.png", contact_sheet(images, captions, columns=8))
    above, below = zip(*layouts_and_images(pipeline, list(SERIES)), strict=True)
    save("series.png", contact_sheet([*above, *below], [*SERIES.values(), *[""] * len(SERIES)], columns=len(SERIES)))


if __name__ == "__main__":
    main()
