"""Draws the pictures of the studio in docs/figures: a server, a browser, and what a user does there.

    python docs/make_screenshots.py

It needs Chromium and the test requirements. tests/e2e/test_studio.py does the same steps.
"""

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "figures"
DESKTOP, PHONE = {"width": 1280, "height": 800}, {"width": 360, "height": 780}
# Name, window and colours of each picture.
SHOTS = (("studio", DESKTOP, "light"), ("studio_dark", DESKTOP, "dark"), ("studio_phone", PHONE, "light"))


def find_chromium() -> str | None:
    """The browser's path; None if there is none."""
    return shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@contextlib.contextmanager
def studio(*flags: str) -> Iterator[str]:
    """The address of `instdiff studio` in a process of its own, with the model in the box."""
    command = [sys.executable, "-m", "instdiff_jax", "studio", "--no_browser", "--port", "0", *flags]
    environment = os.environ | {"PYTHONPATH": str(ROOT) + os.pathsep + os.environ.get("PYTHONPATH", "")}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        line = process.stdout.readline()
        if not line.startswith("instdiff studio: "):
            raise RuntimeError(f"the studio did not start: {line!r}")
        yield line.split()[-1]
    finally:
        process.terminate()
        process.wait(60)


@contextlib.contextmanager
def browser() -> Iterator[Any]:
    """Chromium without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=find_chromium(), args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(opened: Any, url: str, size: dict[str, int] = DESKTOP, colours: str = "light", **options: Any) -> Any:
    """A page without memory of others, ready to draw on."""
    page = opened.new_context(viewport=size, color_scheme=colours, **options).new_page()
    page.set_default_timeout(120_000)
    page.goto(url)
    page.wait_for_selector("body.ready")
    return page


def drag(page: Any, tool: str, *points: tuple[float, float]) -> None:
    """Draws with a tool of the rail, along points in fractions of the canvas."""
    page.click(f'[data-tool="{tool}"]')
    box = page.locator("#canvas").bounding_box()
    places = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in points]
    if tool in ("point", "polygon"):
        for place in places:
            page.mouse.click(*place)
        return
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places[1:]:
        page.mouse.move(*place, steps=4)
    page.mouse.up()


def caption(page: Any, text: str) -> None:
    """Says what the selected instance is."""
    page.fill("#item-caption", text)


def draw_formats(page: Any) -> None:
    """One instance of each format, with the mouse."""
    page.fill("#caption", "a red circle, a yellow star, a blue square, a green heart and a white cross on grey")
    drag(page, "box", (0.08, 0.1), (0.42, 0.46))
    caption(page, "a red circle")
    drag(page, "point", (0.75, 0.25))
    caption(page, "a yellow star")
    drag(page, "scribble", (0.62, 0.62), (0.9, 0.66), (0.64, 0.74), (0.9, 0.8), (0.66, 0.88))
    caption(page, "a blue square")
    drag(page, "brush", (0.14, 0.72), (0.22, 0.82), (0.3, 0.72))
    caption(page, "a green heart")
    page.keyboard.press("Tab")
    page.locator("#canvas").focus()
    page.keyboard.press("Escape")
    drag(page, "polygon", (0.42, 0.5), (0.58, 0.5), (0.58, 0.66), (0.42, 0.66), (0.42, 0.5))
    caption(page, "a white cross")


def generate(page: Any) -> None:
    """Draws pictures and waits for them."""
    before = page.locator(".thumb").count()
    page.click("#generate")
    page.locator(".thumb").nth(before).wait_for()
    page.locator("body:not(.drawing)").wait_for()


def main() -> None:
    with studio() as url, browser() as opened:
        for name, size, colours in SHOTS:
            page = open_page(opened, url, size, colours, device_scale_factor=1.5)
            page.select_option("#examples", "boxes_pair")
            generate(page)
            page.select_option("#examples", "mixed")
            generate(page)
            page.click(".instances .name >> nth=3")
            page.locator("#status:not(.shown)").wait_for(state="attached")
            page.evaluate("scrollTo(0, 0)")  # a phone had scrolled down to the list
            file = FIGURES / f"{name}.png"
            page.screenshot(path=file)
            Image.open(file).convert("RGB").quantize(256, dither=Image.Dither.FLOYDSTEINBERG).save(file, optimize=True)
            print(f"{file.relative_to(ROOT)}: {file.stat().st_size / 1000:.0f} KB")


if __name__ == "__main__":
    main()
