"""How quick the app is: first paint, choosing a match, Prove it, a match made, a flood of requests, a heavy dataset.

    pip install -c constraints.txt ".[dev,space]"      and a Chromium on the PATH
    python scripts/bench/space.py

The app runs in a process of its own as `hf-equiv space run` does, with a Hub on the loopback interface; a real browser
measures what visitors wait for, five times each (median and largest). Ten visitors come through the programs' endpoint
at the same moment, each with another pair; every answer is compared with the pair it was asked for. Then one visitor
sends a hundred requests at once, and a link names a dataset of 240 MB, while others open the page and look around.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import permutations
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
PHOTOS = ROOT / "hf_equiv" / "assets" / "photos"
SHIPPED = ROOT / "spaces_app" / "results" / "match"
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-sync"]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--visitors", type=int, default=10)
    parser.add_argument("--flood", type=int, default=100)
    given = parser.parse_args()
    from appserver import served

    with tempfile.TemporaryDirectory() as folder, a_hub() as endpoint:
        os.environ |= {"HF_ENDPOINT": endpoint, "HF_TOKEN": "hf_alice", "HF_HUB_DISABLE_XET": "1"}
        os.environ |= {"HF_HOME": f"{folder}/home", "HF_HUB_OFFLINE": "0"}
        heavy_dataset(Path(folder) / "heavy")
        begin = time.perf_counter()
        with served(Path(folder), HF_HUB_OFFLINE="0") as url:
            print(f"started in {time.perf_counter() - begin:.1f} s; the page has {len(_read(url)) / 1e3:.0f} kB\n")
            print("| what | median [s] | largest [s] | must |\n| --- | ---: | ---: | ---: |")
            in_a_browser(url, given.repeat)
            visitors(url, given.visitors)
            meanwhile(url, "one visitor sends many requests", flooding(url, given.flood))
            meanwhile(url, "a heavy dataset is opened", opening(url))


def in_a_browser(url: str, repeat: int) -> None:
    """What one visitor waits for."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        painted, shown, chosen, checked, film, first, done = ([] for _ in range(7))
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
            chosen.append(_choose(page, k))
            checked.append(_until(page, lambda page=page: page.click("#check"), "#verdict .good"))
            page.get_by_role("tab", name="Melt", exact=True).click()
            begin = time.perf_counter()
            with page.expect_download() as download:
                page.get_by_role("link", name="GIF").click()
            download.value.path()
            film.append(time.perf_counter() - begin)
            page.get_by_role("tab", name="Make one", exact=True).click()
            page.wait_for_selector("#go", state="visible")
            begin = time.perf_counter()
            page.click("#go")
            page.wait_for_selector("#made .live img")
            first.append(time.perf_counter() - begin)
            page.wait_for_selector("#made .outcome")
            done.append(time.perf_counter() - begin)
            context.close()
        browser.close()
    row("first paint", painted, 0.5)
    row("the first match is there", shown, 1.5)
    row("chosen in the gallery, everything shown", chosen, 0.3)
    row("Prove it", checked, 1)
    row("the film as a GIF", film, 1)
    row("Make one: first picture", first, 2)
    row("Make one: done", done, 20)


def _read(url: str) -> bytes:
    with urllib.request.urlopen(url, timeout=60) as page:
        return page.read()


def _choose(page, k: int) -> float:
    """Choose another match, and return the seconds until its pictures are there."""
    before = page.locator("#shown .match").get_attribute("data-key")
    there = """key => document.querySelector('#shown .match').dataset.key !== key
        && [...document.querySelectorAll('#shown img')].every((img) => img.complete && img.naturalWidth)"""
    begin = time.perf_counter()
    page.locator("#gallery button").nth(k % 11 + 1).click()
    page.wait_for_function(there, arg=before, polling=5)
    return time.perf_counter() - begin


def _until(page, act: Callable[[], None], selector: str) -> float:
    begin = time.perf_counter()
    act()
    page.wait_for_selector(selector)
    return time.perf_counter() - begin


def row(name: str, seconds: list[float], must: float) -> None:
    """One line of the table."""
    print(f"| {name} | {statistics.median(seconds):.2f} | {max(seconds):.2f} | {must:g} |", flush=True)


def visitors(url: str, count: int) -> None:
    """Many visitors at the same moment, and somebody who browses meanwhile."""
    from gradio_client import Client, handle_file

    seen = {row["source_class"]: row["source_label"] for row in shipped_rows()}
    pairs = list(permutations(seen, 2))[:count]
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
        if answer["source_label"] != seen[source] or answer["target_label"] != seen[target]:
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


def meanwhile(url: str, name: str, start: Callable[[], Callable[[], str]]) -> None:
    """Others open the page, choose a match and list the matches, while something else goes on."""
    from gradio_client import Client
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page()
        page.goto(url)
        page.wait_for_selector("#gallery button")
        reader = Client(url, verbose=False)
        opened, chosen, listed = [], [], []
        end, begun = start(), time.perf_counter()
        for k in range(12):
            begin = time.perf_counter()
            _read(url)
            opened.append(time.perf_counter() - begin)
            chosen.append(_choose(page, k))
            begin = time.perf_counter()
            reader.predict(api_name="/list_matches")
            listed.append(time.perf_counter() - begin)
        lasted = time.perf_counter() - begun
        print(f"\nWhile {name} ({lasted:.0f} s were watched; {end()}):\n")
        print("| what | median [s] | largest [s] | must |\n| --- | ---: | ---: | ---: |")
        row("the page is opened", opened, 1)
        row("chosen in the gallery", chosen, 1)
        row("matches listed by a program", listed, 1)
        browser.close()


def flooding(url: str, count: int) -> Callable[[], Callable[[], str]]:
    """Return a function that sends many requests as one visitor, who has as many sessions as he likes."""

    def start() -> Callable[[], str]:
        from gradio_client import Client, handle_file

        photos = [handle_file(str(PHOTOS / f"{name}.jpg")) for name in ("cat", "coffee")]
        clients = [Client(url, verbose=False) for _ in range(count // 10)]
        asked = [(*photos, "builtin", "any change", "normal")] * 7
        sent = [client.submit(*what, api_name="/make_match") for client in clients for what in asked]
        sent += [client.submit("cat->coffee", api_name="/check_match") for client in clients for _ in range(3)]

        def end() -> str:
            refused = sum(job.done() and job.exception() is not None for job in sent)
            served = sum(job.done() for job in sent) - refused
            for job in sent:
                job.cancel()
            return f"of {len(sent)} requests {served} were answered, {refused} refused in words, the others open"

        return end

    return start


def opening(url: str) -> Callable[[], Callable[[], str]]:
    """Return a function by which two visitors open a link to a heavy dataset."""

    def start() -> Callable[[], str]:
        def visit() -> None:
            from gradio_client import Client

            begin = time.perf_counter()
            try:
                rows = Client(url, verbose=False).predict("alice/heavy", api_name="/list_matches")
                told.append(f"{len(rows)} matches after {time.perf_counter() - begin:.0f} s")
            except Exception as error:
                told.append(str(error))

        told: list[str] = []
        threads = [threading.Thread(target=visit) for _ in range(2)]
        for thread in threads:
            thread.start()
        time.sleep(2)

        def end() -> str:
            for thread in threads:
                thread.join()
            return "; ".join(told)

        return end

    return start


@contextmanager
def a_hub() -> Iterator[str]:
    """Serve a Hub in a process of its own, and give its address."""
    script = "import loopback_hub, time; print(loopback_hub.Hub().start().endpoint, flush=True); time.sleep(1e6)"
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT / "tests") as process:
        try:
            yield process.stdout.readline().strip()
        finally:
            process.terminate()


def shipped_rows() -> list[dict]:
    """Return the matches of the four photos that ship with the app."""
    from hf_equiv.runs.shards import read_shard

    (shard,) = SHIPPED.glob("matches/*.parquet")
    return read_shard(shard, images=True)


def heavy_dataset(folder: Path) -> None:
    """Publish a run with pictures of noise, 240 MB of them."""
    import torch
    from huggingface_hub import HfApi

    from hf_equiv.data.image_file import encode_png
    from hf_equiv.runs.schema import MATCH
    from hf_equiv.runs.shards import shard_bytes

    shutil.copytree(SHIPPED, folder)
    (shard,) = folder.glob("matches/*.parquet")
    names = ("source", "match", "target")
    rows = [row | {name: encode_png(torch.rand(3, 1480, 1480)) for name in names} for row in shipped_rows()]
    shard.write_bytes(shard_bytes(rows, MATCH, {}))
    api = HfApi()
    api.create_repo("alice/heavy", repo_type="dataset", private=False)
    api.upload_folder(repo_id="alice/heavy", repo_type="dataset", folder_path=folder)


if __name__ == "__main__":
    main()
