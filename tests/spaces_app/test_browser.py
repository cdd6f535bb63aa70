"""The app in a browser: all that a visitor does, on a desktop, on a phone, in dark mode, by keyboard alone."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from hf_equiv.data.image_file import decode_png, encode_png, open_image

pytestmark = pytest.mark.browser

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]
FLAGS += ["--disable-component-update"]
PHOTOS = Path(__file__).parents[2] / "hf_equiv" / "assets" / "photos"
TABS = ["Look", "Make one", "Melt", "Why it works", "About"]
READY = {"Make one": "#go", "Melt": "#walk .play", "Why it works": "#pushed-null .meter", "About": "text=Use it well"}
WAIT = 60_000  # ms; a loaded machine is slow
SHIFT = """() => new Promise((told) => {
  new PerformanceObserver((found) => told(found.getEntries().reduce((sum, shift) => sum + shift.value, 0)))
    .observe({ type: 'layout-shift', buffered: true });
  setTimeout(told, 2000, 0);  // nothing moved
})"""
CUT = """() => [...document.querySelectorAll('.facts > div, #verdict table')].filter((part) => part.offsetParent)
  .filter((part) => part.getBoundingClientRect().right > part.closest('.block').getBoundingClientRect().right + 1)
  .map((part) => part.className || part.tagName)"""


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
        page.wait_for_function("window.linkRead")
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


def test_the_first_screen_needs_no_script(browser, url):
    """Headline and pictures, the tags of link previews, and a picture to preview; also for the match of a link."""
    context = browser.new_context(viewport={"width": 390, "height": 844}, java_script_enabled=False)
    page = context.new_page()
    page.goto(url)
    assert page.locator("h2").inner_text() == "This cat is an espresso."
    assert (
        "AI sees an espresso, 93\N{NO-BREAK SPACE}%\N{NO-BREAK SPACE}sure"
        in page.locator("#first .compare").inner_text()
    )
    assert "AI guesses an Egyptian cat" in page.locator("#first .photo").first.inner_text()
    first = page.locator("#first .compare img").first.get_attribute("src")
    assert decode_png(context.request.get(f"{url}/{first}").body()).shape == (3, 224, 224)
    html = context.request.get(url).text()
    assert len(html) < 600_000, "pictures come by their address"
    assert html.index('id="first"') < html.index('rel="stylesheet"'), "it waits for no style sheet"
    assert context.request.get(f"{url}/picture?match=nothing&of=match").status == 404
    box = page.locator("#first .compare").bounding_box()
    assert box["y"] + box["height"] < 844, "the picture and its caption fit the first screen of a phone"
    page.goto(f"{url}/?match=rocket->cat&x=<script>")
    tags = {m.get_attribute("property"): m.get_attribute("content") for m in page.locator("meta[property]").all()}
    assert tags["og:title"] == page.locator("h2").inner_text() == "This rocket is an Egyptian cat?"
    assert "You see a rocket." in tags["og:description"]
    assert tags["og:image"] == f"{url}/preview.png?match=rocket-%3Ecat"
    assert context.request.get(tags["og:image"]).headers["content-type"] == "image/png"
    context.close()


def test_a_match_is_shown_and_proved(visit):
    page = visit()
    assert page.locator("#first").count() == 0, "the app has taken over"
    assert re.search(
        r"You see a cat. To the AI model it is 99\.9\d*\s% the same as the coffee\.",
        page.locator("#shown .lead").inner_text(),
    )
    assert page.get_by_role("button", name="Watch it melt").is_visible()
    page.set_viewport_size({"width": 390, "height": 500})
    page.locator("#gallery [data-key='coffee->cat']").click()
    page.wait_for_function("document.querySelector('#shown h2').innerText === 'This coffee is an Egyptian cat?'")
    assert -1 <= page.locator("#shown h2").bounding_box()["y"] < 100, "the page goes to the match"
    page.set_viewport_size({"width": 1280, "height": 900})
    page.wait_for_selector("#melt", state="hidden")
    page.click("#check")
    page.wait_for_selector("#verdict .good")
    told = "Checked just now: the AI guesses an Egyptian cat. All 16 numbers are the same as stated above ("
    assert told in page.locator("#verdict").inner_text()
    page.click("#verdict summary")
    assert page.get_by_role("rowheader", name="distance to the AI model").count() == 1
    assert page.get_by_role("cell", name="same", exact=True).count() >= 12
    assert page.get_by_role("cell", name="differs").count() == 0
    shot(page, "look")


def test_the_border_moves(visit):
    page = visit()
    slider = page.locator("#shown .compare input")
    slider.focus()
    before = page.evaluate("getComputedStyle(document.querySelector('.compare .over')).clipPath")
    for _ in range(5):
        page.keyboard.press("ArrowRight")
    assert page.evaluate("getComputedStyle(document.querySelector('.compare .over')).clipPath") != before
    assert slider.input_value() == "55"


def test_the_game_is_played(visit):
    page = visit()
    assert page.locator("#game h2").inner_text() == "Which of these two is the cat?"
    page.wait_for_selector("#game button[data-kind=over] img[src]")
    page.locator("#game button[data-kind=over]").click()
    assert "Right" in page.locator("#game .answer").inner_text()
    page.click("#game .next")
    page.wait_for_function("!document.querySelector('#game .told')")
    page.wait_for_selector("#game button[data-kind=under] img[src]")
    page.locator("#game button[data-kind=under]").click()
    assert "1 of 2 so far" in page.locator("#game .answer").inner_text()


def test_the_address_keeps_match_and_tab(visit):
    page = visit("/?match=rocket->cat")
    page.wait_for_function("document.querySelector('#shown h2').innerText === 'This rocket is an Egyptian cat?'")
    page.locator("#gallery [data-key='cat->coffee']").click()
    page.wait_for_url("**/?match=cat-%3Ecoffee")
    page.get_by_role("button", name="Watch it melt").click()
    page.wait_for_selector("#walk .play", state="visible")
    page.wait_for_url("**/?tab=melt")
    page.reload()
    page.wait_for_selector("#walk .play", state="visible")
    page.wait_for_function("window.linkRead")
    page.go_back()
    page.wait_for_url("**/?match=cat-%3Ecoffee")
    page.wait_for_selector("#shown", state="visible")


def test_back_and_forward_take_the_steps_of_a_visitor(visit):
    page = visit()
    shown = "key => document.querySelector('#shown .match').dataset.key === key"
    page.evaluate("window.same = true")
    page.locator("#gallery [data-key='coffee->cat']").click()
    page.wait_for_function(shown, arg="coffee->cat")
    go_to(page, "Melt")
    go_to(page, "About")
    page.go_back()
    page.wait_for_selector("#walk .play", state="visible")
    page.go_back()
    page.wait_for_selector("#shown", state="visible")
    page.wait_for_url("**/?match=coffee-%3Ecat")
    page.go_back()
    page.wait_for_function(shown, arg="cat->coffee")
    page.go_forward()
    page.wait_for_function(shown, arg="coffee->cat")
    assert page.evaluate("window.same"), "the page was never loaded again"
    page.go_back()
    page.go_back()
    assert page.url == "about:blank", "no step is kept twice"


def test_a_dataset_that_cannot_be_shown_changes_nothing(visit):
    page = visit()
    shown = page.locator("#shown").inner_text()
    page.get_by_role("button", name="Other collections of lookalikes").click()
    box = page.get_by_label("Collection", exact=True)
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
    assert page.get_by_text("Use it well", exact=True).is_visible()


@pytest.mark.parametrize(
    ("query", "said"),
    [
        ("match=nothing<b>", "This link names no lookalike of ours. You see the first lookalike of this page instead."),
        ("dataset=/etc", "You see the first lookalike of this page instead."),
        ("tab=nowhere", "There is no tab 'nowhere'. Choose one of these."),
    ],
)
def test_a_bad_link_opens_the_built_in_results(visit, query, said):
    page = visit(f"/?{query}")
    page.wait_for_selector("#gallery button[aria-pressed=true]")
    page.wait_for_selector(f"text={said}")
    assert not re.search("match|dataset", page.url), "a link from here leads here"


def test_screen_readers_are_told_the_progress(visit):
    page = visit()
    page.click("#check")
    page.wait_for_selector("#verdict [aria-live=polite] .verdict")
    go_to(page, "Make one")
    page.get_by_label("quick").check()
    page.click("#go")
    told = "document.querySelector('#told [aria-live=polite]').textContent"
    page.wait_for_function(f"{told}.includes('Changing pixels')")
    assert "evaluations" not in page.evaluate(told), "a screen reader would read a changing number all the time"
    page.wait_for_selector("#made .outcome")
    assert page.locator("#made .outcome").inner_text() in page.evaluate(told)


def take_away(page, where: str) -> None:
    page.locator(f"{where} button[aria-label*='emove'], {where} button[aria-label*='lear']").first.click()


def upload(page, where: str, path: Path) -> None:
    page.locator(f"{where} input[type=file]").set_input_files(str(path))


def open_make(visit, **context):
    page = visit("/?tab=make", **context)
    page.wait_for_selector("#go", state="visible")
    page.wait_for_selector("#seen-target .guess")
    return page


def begin_slow(page):
    """Press the button for a match that takes all evaluations and can be stopped in time: coffee, as the cat, 4/255."""
    page.click("#swap")
    page.wait_for_selector("#source img[src*='coffee']")
    page.get_by_label("How far each pixel may move").click()
    page.get_by_role("option", name="4 of 255").click()
    page.click("#go")


def test_a_whole_match_from_upload_to_all_that_can_be_done_with_it(visit, tmp_path, encoder):
    """The second upload of a session after a bad one, in formats that a browser changes or does not show."""
    page = open_make(visit)
    text = tmp_path / "text.png"
    text.write_text("I am a text")
    take_away(page, "#source")
    upload(page, "#source", text)
    page.wait_for_selector("#seen-source >> text=This is not a picture.")
    page.wait_for_selector("#source img", state="detached")  # put away again
    assert page.locator("text=This is not a picture.").count() == 1
    for note in ("#seen-target", "#seen-source"):
        page.wait_for_timeout(1000)  # Gradio drops a click while it works on the last one
        page.click("#swap")
        page.wait_for_selector(f"{note} >> text=This is not a picture.")  # it goes with its box
    page.click("#go")
    page.wait_for_selector("#made >> text=Choose a photo for")
    assert str(Path.home()) not in page.content()
    clear, tiff = tmp_path / "my rocket.png", tmp_path / "my cat.tiff"
    rocket = Image.open(PHOTOS / "rocket.jpg").convert("RGBA").resize((300, 200))
    rocket.putalpha(Image.linear_gradient("L").resize((300, 200)))
    rocket.save(clear)
    Image.open(PHOTOS / "cat.jpg").resize((300, 200)).save(tiff)
    upload(page, "#source", clear)
    take_away(page, "#target")
    upload(page, "#target", tiff)
    page.wait_for_selector("#target img[src$='.png']")  # shown after conversion
    page.wait_for_function("document.querySelector('#target img').naturalWidth === 300")
    assert "Choose a photo for" not in page.locator("#made").inner_text()
    page.click("#go")
    page.wait_for_selector("#made .live img")  # while it is made
    assert (
        " s left" in page.locator("#made .bar-line").inner_text()
        or "up to 120 s" in page.locator("#made .bar-line").inner_text()
    )
    shot(page, "making")
    page.wait_for_selector("#made .outcome")
    assert page.evaluate("document.activeElement.className") == "outcome"
    page.click("text=How it went")
    files = {}
    for button in ("Download the PNG", "All numbers (JSON)", "Download a picture to share"):
        with page.expect_download() as download:
            page.get_by_text(button).click()
        files[button] = Path(download.value.path()).read_bytes()
    row = json.loads(files["All numbers (JSON)"])
    pictures = page.locator("#made .three .photo img")
    shown = [base64.b64decode(pictures.nth(k).get_attribute("src").partition(",")[2]) for k in (0, 1)]
    used = [encode_png(x) for x in encoder.preprocess([open_image(clear), open_image(tiff)])]
    assert shown == used, "the pixels are those that the command line takes from the same files"
    with torch.no_grad():
        z, aim = (encoder(decode_png(png)[None]).double() for png in (files["Download the PNG"], used[1]))
    assert float((z - aim).norm() / aim.norm()) == pytest.approx(row["embedding_error_8bit"], abs=1e-6)
    assert row["match_label"] == row["target_label"]
    assert Image.open(io.BytesIO(files["Download a picture to share"])).size == (1200, 630)
    page.click("#prove")
    page.wait_for_selector("#proven .good")
    page.click("#try-0")
    page.wait_for_selector("#trial >> text=Broken:")
    page.wait_for_selector("#others >> text=my-model")
    page.wait_for_url("**made=*")
    outcome = page.locator("#made .outcome").inner_text()
    shot(page, "made")
    page.wait_for_timeout(1000)  # pictures that fade in have little contrast
    assert finding(page) == []
    page.reload()
    page.wait_for_selector("#made .outcome")
    assert page.locator("#made .outcome").inner_text() == outcome
    page.wait_for_selector("#source img[src*='source.png']")  # the photos of the link


def test_a_match_can_be_stopped(visit):
    page = open_make(visit)
    assert not page.locator("#halt").is_visible()
    begin_slow(page)
    page.wait_for_selector("#made .live img")
    assert page.evaluate("document.getElementById('two').inert"), "the photos are in use"
    page.click("#halt")
    page.wait_for_selector("#made .outcome")
    assert not page.evaluate("document.getElementById('two').inert")
    assert "Stopped early: " in page.locator("#made").inner_text()
    assert "You pressed Stop." in page.locator("#made").inner_text()
    assert not page.locator("#halt").is_visible()


def test_pushes_and_directions(visit):
    page = visit()
    go_to(page, "Why it works")
    seen = {kind: page.locator(f"#pushed-{kind}").inner_text() for kind in ("top", "random", "null")}
    assert "Egyptian cat" not in seen["top"]
    assert all("Egyptian cat" in seen[kind] for kind in ("random", "null"))
    page.locator("#push-top input[type=range]").focus()
    page.keyboard.press("Home")
    page.wait_for_function("document.querySelector('#pushed-top').innerText.includes('Egyptian cat')")
    page.get_by_role("button", name="Details: all directions").click()
    page.wait_for_selector("#moved svg", state="visible")
    assert not page.locator("input[type=number]:visible").count(), "they may be left empty"
    before = page.locator("#moved figcaption").first.inner_text()
    assert re.search(r"moved by \d", before)
    page.locator("#along input[type=range]").focus()
    for _ in range(8):
        page.keyboard.press("ArrowLeft")
    page.wait_for_function("text => document.querySelector('#moved figcaption').innerText !== text", arg=before)
    page.get_by_label("Direction (kind and number)").click()
    page.get_by_role("option", name="null 0", exact=True).click()
    page.wait_for_selector("text=Undetermined: float noise hides it")
    shot(page, "why")


def test_a_walk_plays_pauses_and_seeks(visit):
    page = visit()
    go_to(page, "Melt")
    page.wait_for_function("+document.querySelector('#walk .player').dataset.at > 0")  # of itself
    page.click("#walk .play")
    at = page.locator("#walk .player").get_attribute("data-at")
    page.wait_for_timeout(500)
    assert page.locator("#walk .player").get_attribute("data-at") == at
    assert page.locator("#walk .frames img:not([hidden])").count() == 1
    assert "espresso" in page.locator("#walk .now").inner_text()
    mark = page.locator("#walk .mark").get_attribute("cx")
    page.locator("#walk .seek").focus()
    page.keyboard.press("End")
    last = page.locator("#walk .frames img").count() - 1
    assert page.locator("#walk .player").get_attribute("data-at") == str(last)
    assert page.locator("#walk .mark").get_attribute("cx") != mark
    for link in page.locator("#walk .files a").all():
        with page.expect_download() as download:
            link.click()
        assert Image.open(download.value.path()).n_frames > last
    shot(page, "melt")


def test_a_walk_waits_for_those_who_want_no_motion(visit):
    page = visit("/?tab=melt", reduced_motion="reduce")
    page.wait_for_selector("#walk .play", state="visible")
    page.wait_for_timeout(1000)
    assert page.locator("#walk .player").get_attribute("data-at") == "0"


@pytest.mark.parametrize(("scheme", "width"), [("light", 1280), ("dark", 320)])
def test_axe_finds_nothing(visit, scheme, width):
    page = visit(color_scheme=scheme, viewport={"width": width, "height": 900})
    page.click("#check")
    page.wait_for_selector("#verdict .good")
    for tab in TABS:
        go_to(page, tab)
        for details in page.locator("summary:visible, #directions > button:visible").all():
            details.click()
        if tab == "Why it works":
            page.wait_for_selector("#moved svg", state="visible")
        assert finding(page) == [], tab
        assert page.evaluate(CUT) == [], f"{tab}: these are cut at the right"
    if scheme == "dark":
        ground = page.evaluate("getComputedStyle(document.querySelector('.gradio-container')).backgroundColor")
        assert max(int(c) for c in re.findall(r"\d+", ground)[:3]) < 60
    for image in page.query_selector_all("img"):
        assert image.get_attribute("alt") is not None


def test_on_a_small_phone(visit):
    page = visit(viewport={"width": 320, "height": 640}, is_mobile=True, has_touch=True)
    assert page.evaluate(SHIFT) < 0.08, "the first screen stays in its place while the app loads"
    for tab in ("look", "make", "melt", "why", "about"):
        page.goto(page.url.split("?")[0] + f"?tab={tab}")
        page.wait_for_selector("#shown .match", state="attached")
        page.wait_for_timeout(1500)
        assert [tab.is_visible() for tab in page.get_by_role("tab").all()] == [True] * len(TABS)
        wide = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        assert wide <= 0, f"{tab}: the page is {wide} px wider than the screen"
        for target in page.locator("summary, input[type=range], button.label-wrap, .files a").all():
            assert not target.is_visible() or target.bounding_box()["height"] >= 24
        shot(page, f"phone-{tab}")


def test_by_keyboard_alone(visit):
    page = visit()
    page.get_by_role("tab", name=TABS[0], exact=True).focus()
    page.keyboard.press("ArrowLeft")
    page.wait_for_selector("text=Use it well")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector("#go", state="visible")
    for _ in range(40):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.id") == "go":
            break
    assert page.evaluate("document.activeElement.id") == "go", "the button is reached by Tab"
    page.keyboard.press("Enter")
    page.wait_for_selector("#made .live img, #made .outcome")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")  # Stop
    page.wait_for_selector("#made .outcome")
