"""How quick the app is: first paint, choosing a match, Prove it, a match of the built-in checkpoint, ten visitors.

    pip install -c constraints.txt ".[dev,space]"      and a Chromium on the PATH
    python scripts/bench/space.py

The app runs in a process of its own as `hf-equiv space run` does, offline; a real browser measures what visitors wait
for, five times each (median and largest). Ten visitors come through the programs' endpoint at the same moment, each
with another pair; every answer is compared with the pair it was asked for.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PHOTOS = ROOT / "hf_equiv" / "assets" / "photos"
SEEN = {"cat": "Egyptian cat", "coffee": "espresso", "rocket": "beacon", "astronaut": "sports car"}
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--visitors", type=int, default=10)
    given = parser.parse_args()
    from appserver import served

    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        with served(Path(folder)) as url:
            print(f"started in {time.perf_counter() - begin:.1f} s\n")
            print("| what | median [s] | largest [s] | must | aim |\n| --- | ---: | ---: | ---: | ---: |")
            in_a_browser(url, given.repeat)
            visitors(url, given.visitors)


def in_a_browser(url: str, repeat: int) -> None:
    """What one visitor waits for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        painted, shown, chosen, checked, first, done = ([] for _ in range(6))
        for k in range(repeat):
            context = browser.new_context(viewport={"width": 1280, "height": 900})
            page = context.new_page()
            page.set_default_timeout(300_000)
            begin = time.perf_counter()
            page.goto(url, wait_until="commit")
            page.wait_for_selector(".match")
            shown.append(time.perf_counter() - begin)
            page.wait_for_selector("#shown .match")
            paint = "performance.getEntriesByName('first-contentful-paint')[0].startTime / 1000"
            painted.append(page.evaluate(paint))
            buttons = page.locator("#gallery button")
            before = page.locator("#shown .compare img").first.get_attribute("src")
            begin = time.perf_counter()
            buttons.nth(k % 11 + 1).click()
            changed = "src => document.querySelector('#shown .compare img').src !== src"
            page.wait_for_function(changed, arg=before, polling=5)
            chosen.append(time.perf_counter() - begin)
            checked.append(_until(page, lambda page=page: page.click("#check"), "#verdict .verdict"))
            page.get_by_role("tab", name="Make one", exact=True).click()
            page.wait_for_selector("#go", state="visible")
            begin = time.perf_counter()
            page.click("#go")
            page.wait_for_selector("#made .live img")
            first.append(time.perf_counter() - begin)
            page.wait_for_selector("#made .match")
            done.append(time.perf_counter() - begin)
            context.close()
        browser.close()
    row("first paint", painted, 3, 1.5)
    row("the first match is there", shown, 3, 1.5)
    row("chosen in the gallery, everything shown", chosen, 1, 0.3)
    row("Prove it", checked, 2, 0.5)
    row("Make one: first picture", first, 2, 1)
    row("Make one: done", done, 20, 8)


def _until(page, act: Callable[[], None], selector: str) -> float:
    begin = time.perf_counter()
    act()
    page.wait_for_selector(selector)
    return time.perf_counter() - begin


def row(name: str, seconds: list[float], must: float, aim: float) -> None:
    """One line of the table."""
    print(f"| {name} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {must:g} | {aim:g} |", flush=True)


def visitors(url: str, count: int) -> None:
    """Many visitors at the same moment, and somebody who browses meanwhile."""
    from gradio_client import Client, handle_file

    pairs = list(permutations(SEEN, 2))[:count]
    waited: list[float] = []
    mixed: list[str] = []
    lost: list[str] = []

    def visit(source: str, target: str) -> None:
        client = Client(url, verbose=False)
        start.wait()
        begin = time.perf_counter()
        photos = [handle_file(str(PHOTOS / f"{name}.jpg")) for name in (source, target)]
        try:
            _, answer = client.predict(*photos, "builtin", "any change", "normal", api_name="/make_match")
        except Exception as error:
            lost.append(f"{source} -> {target}: {error}")
            return
        waited.append(time.perf_counter() - begin)
        if answer["source_label"] != SEEN[source] or answer["target_label"] != SEEN[target]:
            mixed.append(f"{source} -> {target}")

    start = threading.Barrier(len(pairs) + 1)
    threads = [threading.Thread(target=visit, args=pair) for pair in pairs]
    for thread in threads:
        thread.start()
    reader = Client(url, verbose=False)
    start.wait()
    browsed = []
    while any(thread.is_alive() for thread in threads):
        begin = time.perf_counter()
        reader.predict(api_name="/list_matches")
        browsed.append(time.perf_counter() - begin)
        time.sleep(0.5)
    for thread in threads:
        thread.join()
    print(f"\n{len(waited)} of {len(pairs)} visitors served, {len(mixed)} mixed up, {len(lost)} lost: ", *lost)
    if waited:
        print(f"they waited {min(waited):.1f} to {max(waited):.1f} s, median {statistics.median(waited):.1f} s")
    print(f"browsing meanwhile: median {statistics.median(browsed):.2f} s, largest {max(browsed):.2f} s")


if __name__ == "__main__":
    main()
