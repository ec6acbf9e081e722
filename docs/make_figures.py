"""Makes the pictures of the README and of docs/.

    python docs/make_figures.py
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from PIL import Image  # noqa: E402

from instdiff_jax.layout import Layout  # noqa: E402
from instdiff_jax.visualize import contact_sheet, draw_layout  # noqa: E402

LAYOUTS = ("demo_cat_dog_robin", "demo_corgi_kitchen", "demo_palm_point")


def main() -> None:
    layouts = [Layout.from_json(ROOT / "examples" / f"{name}.json") for name in LAYOUTS]
    sheet = contact_sheet([draw_layout(layout) for layout in layouts], columns=3)
    Image.fromarray(sheet).resize((1200, 1200 * sheet.shape[0] // sheet.shape[1])).save(ROOT / "docs/figures/layout.png")


if __name__ == "__main__":
    main()
