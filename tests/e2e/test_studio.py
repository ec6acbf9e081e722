"""The page of `instdiff studio` in Chromium, with the model in the box: one server for all tests."""

import base64
import io
import json
import os
import urllib.request

import numpy as np
import pytest
from PIL import Image

from docs.make_screenshots import (
    PHONE,
    browser,
    caption,
    drag,
    draw_formats,
    find_chromium,
    generate,
    open_page,
    studio,
)
from instdiff_jax.layout import Layout
from instdiff_jax.sampling.metadata import read_origin

if find_chromium() is None:
    if os.environ.get("CI"):
        raise RuntimeError("these tests need Chromium: apt-get install chromium")
    pytest.skip("no Chromium here: apt-get install chromium", allow_module_level=True)


@pytest.fixture(scope="module")
def url():
    with studio() as url:
        yield url


@pytest.fixture(scope="module")
def chromium(url):
    with browser() as opened:
        yield opened


def is_problem(message) -> bool:
    """Whether a line of the console is an error; the browser also notes every answer that is one."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@pytest.fixture
def new_page(chromium, url):
    """Opens pages; at the end, none has had an error, or asked another machine."""
    problems, asked, pages = [], set(), []

    def make(*arguments, **options):
        page = open_page(chromium, url, *arguments, **options)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("console", lambda message: problems.append(message.text) if is_problem(message) else None)
        page.on("request", lambda request: asked.add(request.url.split("#")[0]))
        pages.append(page)
        return page

    yield make
    for page in pages:
        page.context.close()
    assert not problems
    assert all(address.startswith((url, "data:", "blob:")) for address in asked)


@pytest.fixture
def page(new_page):
    return new_page()


def saved(page) -> Layout:
    """The layout as the page saves it."""
    with page.expect_download() as download:
        page.click("#save")
    return Layout.from_json(download.value.path())


def picture(page) -> bytes:
    with page.expect_download() as download:
        page.click("#download")
    return download.value.path().read_bytes()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def drop(page, name: str, kind: str, data: bytes) -> None:
    """Drops a file on the page."""
    page.evaluate(
        """([name, type, data]) => {
            const bytes = Uint8Array.from(atob(data), (letter) => letter.charCodeAt(0));
            const dataTransfer = new DataTransfer();
            dataTransfer.items.add(new File([bytes], name, { type }));
            window.dispatchEvent(new DragEvent("drop", { dataTransfer, cancelable: true }));
        }""",
        [name, kind, base64.b64encode(data).decode()],
    )


def test_every_format_is_drawn_edited_undone_saved_and_kept(page):
    draw_formats(page)
    layout = saved(page)
    red, star, square, heart, cross = layout.instances
    assert [one.caption for one in layout.instances] == [
        "a red circle",
        "a yellow star",
        "a blue square",
        "a green heart",
        "a white cross",
    ]
    assert np.allclose(red.box, [0.08 * 64, 0.1 * 64, 0.42 * 64, 0.46 * 64], atol=0.3)
    assert np.allclose(star.point, [48, 16], atol=0.3)
    assert len(square.scribble) > 6 and np.ptp(square.scribble, axis=0).min() > 10
    assert heart.mask[46, 9] and not heart.mask[10, 10] and heart.area > 60
    assert 80 < cross.area < 130 and cross.mask[37, 32]

    page.keyboard.press("Escape")
    drag(page, "select", (0.2, 0.2), (0.3, 0.2))  # move
    x0, y0, x1, y1 = saved(page).instances[0].box
    assert np.isclose(x0, 0.18 * 64, atol=0.5) and np.isclose(x1 - x0, 0.34 * 64, atol=0.3)
    drag(page, "select", (x1 / 64, y1 / 64), (0.6, 0.6))  # resize by its corner
    resized = saved(page).instances[0].box
    assert np.allclose(resized, [x0, y0, 0.6 * 64, 0.6 * 64], atol=0.7)
    page.click("#undo")
    page.keyboard.press("Control+z")
    assert saved(page).instances == layout.instances
    page.click("#redo")
    assert np.isclose(saved(page).instances[0].box[0], x0)
    page.click("[aria-label='Hide a yellow star']")
    page.click(".name:has-text('a blue square')")
    page.keyboard.press("Delete")
    page.click(".name:has-text('a red circle')")
    page.keyboard.press("Control+d")
    kept = saved(page)
    assert [one.caption for one in kept.instances[:4]] == [
        "a red circle",
        "a yellow star",
        "a green heart",
        "a white cross",
    ]
    assert kept.instances[4].caption == "a red circle" and kept.instances[4].box != kept.instances[0].box
    page.reload()
    page.wait_for_selector("body.ready")
    assert saved(page) == kept


def test_a_picture_is_drawn_downloaded_and_dropped(page, new_page):
    page.select_option("#examples", "mixed")
    page.fill("#seed", "5")
    generate(page)
    png = picture(page)
    origin = read_origin(png)
    assert origin.seed == 5 and len(origin.layout.instances) == 4 and pixels(png).shape == (64, 64, 3)
    other = new_page()
    drop(other, "5.png", "image/png", png)
    other.wait_for_selector(".thumb")
    assert other.input_value("#seed") == "5" and saved(other) == origin.layout
    generate(other)
    assert np.abs(pixels(picture(other)).astype(int) - pixels(png)).max() <= 1
    gray = io.BytesIO()
    Image.new("RGB", (64, 64), "gray").save(gray, format="PNG")
    drop(other, "photo.png", "image/png", gray.getvalue())
    other.wait_for_selector("#background:not([hidden])")
    drop(other, "broken.json", "application/json", b"{")
    other.wait_for_selector("#status.shown[data-kind=error]")


def test_pictures_follow_a_drag_and_the_latest_wins(page):
    page.select_option("#examples", "boxes_pair")
    answers = []
    page.on("response", lambda answer: answers.append(answer) if answer.url.endswith("/v1/images") else None)
    page.click("#live")
    page.locator("#live-time:not(:empty)").wait_for()
    box = saved(page).instances[0].box
    x, y = (box[0] + box[2]) / 128, (box[1] + box[3]) / 128
    drag(page, "select", (x, y), *((x + 0.02 * i, y) for i in range(1, 10)))
    end = saved(page).instances[0].box[0]
    for _ in range(300):
        last = json.loads(answers[-1].request.post_data)
        if last["layout"]["annos"][0]["bbox"][0] == pytest.approx(end, abs=0.1):
            break
        page.wait_for_timeout(100)
    else:
        raise AssertionError("the last change was not drawn")
    assert end > box[0] + 5
    assert last["steps"] == 4 and all(answer.status == 200 for answer in answers)
    assert len(answers) < 36  # moves of the mouse


def test_edit_mode_keeps_the_rest_of_the_picture(page):
    page.select_option("#examples", "boxes_pair")
    generate(page)
    before, layout = pixels(picture(page)), saved(page)
    page.click("#edit")
    page.click(".name >> nth=0")
    caption(page, "a green star")
    generate(page)
    after, changed = pixels(picture(page)), np.zeros((64, 64), bool)
    x0, y0, x1, y1 = map(round, layout.instances[-1].box)
    changed[max(y0 - 2, 0) : y1 + 3, max(x0 - 2, 0) : x1 + 3] = True
    different = (before != after).any(axis=-1)
    assert different[changed].mean() > 0.3 and not different[~changed].any()


def test_the_keyboard_is_enough(page):
    page.locator("#canvas").focus()
    for key in ("b", "Enter", "v", "ArrowRight", "ArrowRight", "Shift+ArrowDown", "Alt+ArrowLeft"):
        page.keyboard.press(key)
    assert saved(page).instances[0].box == (18, 20, 49, 52)
    page.locator("#canvas").focus()
    for key in ("p", "Enter", "g", "Enter", "Control+z"):
        page.keyboard.press(key)
    assert [one.point is not None for one in saved(page).instances] == [False, True]
    names = []
    for _ in range(60):
        page.keyboard.press("Tab")
        names.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert {"open", "save", "generate", "canvas", "caption", "seed", "name"} <= set(names)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector(".thumb")


def test_it_fits_a_phone(new_page):
    page = new_page(PHONE, has_touch=True)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    drag(page, "box", (0.2, 0.2), (0.7, 0.7))
    caption(page, "a red circle")
    generate(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.locator("#canvas").bounding_box()["width"] > 300


@pytest.mark.parametrize("colours", ["light", "dark"])
def test_no_serious_fault_of_accessibility(new_page, colours):
    from axe_playwright_python.sync_playwright import Axe

    page = new_page(colours=colours)
    draw_formats(page)
    page.click("summary")
    found = Axe().run(page).response["violations"]
    serious = {one["id"]: one["nodes"][0]["html"] for one in found if one["impact"] in ("serious", "critical")}
    assert not serious


def test_captions_are_shown_as_text(page):
    text = "<img src=x onerror=document.title='bad'>"
    drag(page, "box", (0.2, 0.2), (0.7, 0.7))
    caption(page, text)
    assert page.locator(".title").inner_text() == text and page.title() == "instdiff studio"
    assert page.locator("img").count() == 0


def test_a_page_says_what_the_api_takes(page, url):
    page.goto(f"{url}docs")
    page.wait_for_selector("section")
    assert "/v1/images" in page.inner_text("#paths") and "guidance_scale" in page.inner_text("#fields")
    with urllib.request.urlopen(f"{url}openapi.json") as answer:
        assert json.load(answer)["paths"]
