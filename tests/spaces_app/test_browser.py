"""The app in a browser: all that a visitor does, on a desktop, on a phone, in dark mode, by keyboard alone."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_equiv.data.image_file import decode_png

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update"]
PHOTOS = Path(__file__).parents[2] / "hf_equiv" / "assets" / "photos"
TABS = ["Two photos, one embedding", "Try it", "Sensitivity", "Walk", "About"]
READY = {"Try it": "#go", "Sensitivity": "#moved svg", "Walk": "#walk .player", "About": "text=The paper"}
WAIT = 60_000  # ms; a loaded machine is slow


@pytest.fixture(scope="module")
def browser():
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield running
        running.close()


@pytest.fixture
def visit(browser, url):
    """Open the app as a new visitor; errors of the page and requests to other hosts fail the test."""
    contexts, complaints = [], []

    def open_page(path: str = "/", **context):
        contexts.append(browser.new_context(**({"viewport": {"width": 1280, "height": 900}} | context)))
        page = contexts[-1].new_page()
        page.set_default_timeout(WAIT)
        page.on("console", lambda m: complaints.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda e: complaints.append(str(e)))
        page.on("request", lambda r: None if r.url.startswith((url, "data:", "blob:")) else complaints.append(r.url))
        page.goto(url + path)
        page.wait_for_selector("#shown .match", state="attached")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not complaints


def go_to(page, tab: str) -> None:
    page.get_by_role("tab", name=tab, exact=True).click()
    if tab in READY:
        page.wait_for_selector(READY[tab], state="visible")


def shot(page, name: str) -> None:
    """Save a screenshot in the folder HF_EQUIV_SCREENSHOTS."""
    if folder := os.environ.get("HF_EQUIV_SCREENSHOTS"):
        page.screenshot(path=Path(folder) / f"{name}.png", full_page=True)


def finding(page) -> list[str]:
    from axe_playwright_python.sync_playwright import Axe

    found = Axe().run(page).response["violations"]
    return [f"{v['impact']}: {v['id']}: {v['nodes'][0]['html'][:120]}" for v in found]


def test_a_match_is_shown_and_checked(visit):
    page = visit()
    first = page.locator("#shown .headline").inner_text()
    assert "cannot tell the match from the target" in first
    page.locator("#gallery button").nth(4).click()
    page.wait_for_selector("#gallery button:nth-child(1)[aria-pressed=true]")
    page.wait_for_function("document.querySelector('#shown').innerText.includes('“espresso”')")
    page.click("#check")
    page.wait_for_selector("#numbers table")
    assert "All numbers hold" in page.locator("#verdict").inner_text()
    assert page.get_by_role("rowheader", name="embedding error of the PNG").count() == 1
    assert page.get_by_role("cell", name="agrees").count() >= 12
    assert page.get_by_role("cell", name="differs").count() == 0
    shot(page, "matches")


def test_the_border_moves(visit):
    page = visit()
    slider = page.locator("#shown .compare input")
    slider.focus()
    before = page.evaluate("getComputedStyle(document.querySelector('.compare .over')).clipPath")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.querySelector('.compare .over')).clipPath") != before
    assert slider.input_value() == "55"


def test_a_link_leads_to_its_match(visit):
    page = visit("/?pair=rocket->cat")
    assert "beacon" in page.locator("#shown .say").inner_text()
    link = page.locator("#shown a", has_text="Link to this match").get_attribute("href")
    again = visit("/" + link)
    assert again.locator("#shown .say").inner_text() == page.locator("#shown .say").inner_text()
    walk = visit("/?tab=walk")
    walk.wait_for_selector("#walk .player", state="visible")


def test_a_dataset_that_cannot_be_shown_changes_nothing(visit):
    page = visit()
    shown = page.locator("#shown").inner_text()
    box = page.get_by_label("Results")
    box.fill("nobody/nothing")
    box.press("Enter")
    page.wait_for_selector("text='nobody/nothing' cannot be shown")
    page.wait_for_function("document.querySelector('#dataset input').value.startsWith('built-in')")
    page.wait_for_function("text => document.querySelector('#shown').innerText === text", arg=shown)
    page.click("#check")
    page.wait_for_selector("#verdict .good")


def test_a_tab_chosen_while_the_page_opens_stays(visit):
    page = visit()
    page.reload(wait_until="commit")
    page.get_by_role("tab", name="About", exact=True).click()
    page.wait_for_selector("#shown .match", state="attached")
    page.wait_for_timeout(500)
    assert page.get_by_text("The paper", exact=True).is_visible()


@pytest.mark.parametrize("query", ["pair=nothing<b>", "dataset=/etc", "tab=nowhere"])
def test_a_bad_link_opens_the_built_in_results(visit, query):
    page = visit(f"/?{query}")
    page.wait_for_selector("#gallery button[aria-pressed=true]")
    if "tab" not in query:
        page.wait_for_selector("text=Shown instead: built-in checkpoint")


def test_screen_readers_are_told_the_progress(visit):
    page = visit()
    page.click("#check")
    page.wait_for_selector("#verdict [aria-live=polite] .verdict")
    go_to(page, "Try it")
    page.get_by_label("quick").check()
    page.click("#go")
    told = "document.querySelector('#told [aria-live=polite]').textContent"
    page.wait_for_function(f"{told}.includes('Looking for pixels')")
    assert "evaluations" not in page.evaluate(told), "a screen reader would read a changing number all the time"
    page.wait_for_selector("#made .match")
    assert page.locator("#made .headline").inner_text() in page.evaluate(told)


def test_a_whole_match_from_upload_to_download(visit, tmp_path, encoder):
    page = visit()
    go_to(page, "Try it")
    for name, where in (("rocket", "#source"), ("cat", "#target")):
        path = tmp_path / f"my {name}.png"
        Image.open(PHOTOS / f"{name}.jpg").resize((300, 200)).save(path)
        page.locator(f"{where} button[aria-label*='emove'], {where} button[aria-label*='lear']").first.click()
        page.locator(f"{where} input[type=file]").set_input_files(str(path))
        page.wait_for_selector(f"{where} img")
    page.wait_for_timeout(500)
    page.click("#go")
    page.wait_for_selector("#made .live img")  # while it is made
    shot(page, "making")
    page.wait_for_selector("#made .match")
    shot(page, "made")
    files = {}
    for button in ("#png", "#row"):
        with page.expect_download() as download:
            page.click(button)
        files[button] = Path(download.value.path()).read_bytes()
    row = json.loads(files["#row"])
    with torch.no_grad():
        z = encoder(decode_png(files["#png"])[None]).double()
        aim = encoder(encoder.preprocess([Image.open(tmp_path / "my cat.png")])).double()
    assert float((z - aim).norm() / aim.norm()) == pytest.approx(row["embedding_error_8bit"], abs=1e-6)
    assert row["embedding_error_8bit"] < 1e-3
    assert row["match_label"] == row["target_label"]


def test_a_match_can_be_stopped(visit):
    page = visit("/?tab=try")
    page.wait_for_selector("#go", state="visible")
    page.click("#go")
    page.wait_for_selector("#made .live img")
    page.click("#halt")
    page.wait_for_selector("#made .match")
    assert "Stopped after" in page.locator("#made").inner_text()


def test_an_upload_that_is_no_photo_is_answered_in_words(visit, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("I am a text")
    page = visit("/?tab=try")
    page.wait_for_selector("#go", state="visible")
    page.locator("#source button[aria-label*='emove'], #source button[aria-label*='lear']").first.click()
    page.locator("#source input[type=file]").set_input_files(str(path))
    page.wait_for_selector("text=Convert it to PNG or JPEG")
    page.wait_for_selector("#source img", state="detached")  # put away again
    pick = page.get_by_label("or one of these photos as the source")
    assert pick.input_value() == ""
    pick.click()
    page.get_by_role("option", name="cat").click()  # the one that was there at first
    page.wait_for_selector("#source img")


def test_two_visitors_at_once(visit):
    pages = {name: visit("/?tab=try") for name in ("rocket", "astronaut")}
    for name, page in pages.items():
        page.wait_for_selector("#go", state="visible")
        page.get_by_label("or one of these photos as the target").click()
        page.get_by_role("option", name=name).click()
        page.get_by_label("quick").check()
        page.wait_for_timeout(700)
        page.click("#go")
    seen = {}
    for name, page in pages.items():
        page.wait_for_selector("#made .match")
        seen[name] = page.locator("#made .chips dd").nth(2).inner_text()
    assert seen == {"rocket": "beacon", "astronaut": "sports car"}


def test_moving_along_a_direction(visit):
    page = visit()
    go_to(page, "Sensitivity")
    said = page.locator("#moved figcaption").first
    before = said.inner_text()
    assert re.search(r"moved by \d", before)
    page.locator("#along input[type=range]").focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("text => document.querySelector('#moved figcaption').innerText !== text", arg=before)
    page.get_by_label("Direction (kind and number)").click()
    page.get_by_role("option", name="null 0", exact=True).click()
    page.wait_for_selector("text=Undetermined: float noise hides it")
    shot(page, "sensitivity")


def test_a_walk_plays_pauses_and_seeks(visit):
    page = visit()
    go_to(page, "Walk")
    now = page.locator("#walk .now")
    start, mark = now.inner_text(), page.locator("#walk .mark").get_attribute("cx")
    page.click("#walk .play")
    page.wait_for_function("text => document.querySelector('#walk .now').innerText !== text", arg=start)
    page.click("#walk .play")
    assert page.locator("#walk .mark").get_attribute("cx") != mark
    assert page.locator("#walk .frames img:not([hidden])").count() == 1
    paused = now.inner_text()
    page.wait_for_timeout(500)
    assert now.inner_text() == paused
    page.locator("#walk .seek").focus()
    page.keyboard.press("End")
    assert now.inner_text().startswith("step 33")
    shot(page, "walk")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(visit, scheme):
    page = visit(color_scheme=scheme)
    page.click("#check")
    page.wait_for_selector("#numbers table")
    for tab in TABS:
        go_to(page, tab)
        assert finding(page) == [], tab
    if scheme == "dark":
        ground = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
        assert max(int(c) for c in re.findall(r"\d+", ground)[:3]) < 60
    for image in page.query_selector_all("img"):
        assert image.get_attribute("alt") is not None


def test_on_a_phone(visit):
    page = visit(viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    for tab in ("", "try", "sensitivity", "walk", "about"):
        page.goto(page.url.split("?")[0] + f"?tab={tab or 'matches'}")
        page.wait_for_selector("#shown .match", state="attached")
        page.wait_for_timeout(1500)
        assert [tab.is_visible() for tab in page.get_by_role("tab").all()] == [True] * len(TABS)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{tab}: the page is {wide} px wider than the screen"
        shot(page, f"phone-{tab or 'matches'}")


def test_by_keyboard_alone(visit):
    page = visit()
    page.get_by_role("tab", name=TABS[0], exact=True).focus()
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    page.wait_for_selector("#go", state="visible")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    assert page.evaluate("document.activeElement.id") == "go", "the button is reached by Tab"
    page.keyboard.press("Enter")
    page.wait_for_selector("#made .live img, #made .match")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Stop
    page.wait_for_selector("#made .match")
