"""The page: well-formed, every figure with its table, nothing from outside, and a browser that has no complaint."""

import json
import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from edgeprune.runtimes.profiling.html_page import render_page, tiles
from edgeprune.runtimes.profiling.profiler import Profile

# One worker measures the profile that they share.
pytestmark = pytest.mark.xdist_group("profiling")

BROWSERS = (
    "chromium-headless-shell",
    "chrome-headless-shell",
    "chromium",
    "chromium-browser",
    "google-chrome",
)
VOID = {"meta", "img", "link", "br", "hr", "input"}


class Outline(HTMLParser):
    """Checks that elements close in the order in which they opened, and collects what tests ask for."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.figures: list[dict[str, int]] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.feed(page)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag == "figure":
            self.figures.append({})
        elif "figure" in self.open:
            counts = self.figures[-1]
            counts[tag] = counts.get(tag, 0) + 1
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, f"</{tag}> closes {self.open[-3:]}"


@pytest.fixture(scope="module")
def page(profiled: Profile) -> str:
    return render_page(profiled.report, profiled.overlays)


@pytest.fixture(scope="module")
def outline(page: str) -> Outline:
    return Outline(page)


def test_every_figure_has_its_table(outline):
    drawn = [counts for counts in outline.figures if "img" not in counts]
    # Eight measured ones, and two for each of the two devices.
    assert len(drawn) == 8 + 4
    for counts in drawn:
        assert counts["svg"] >= 1
        assert counts["details"] == counts["summary"] == counts["table"] == 1
        assert counts["td"] >= 2


def test_kept_tokens_are_shown_with_words_for_those_who_do_not_see(outline):
    images = [value for tag, name, value in outline.attributes if (tag, name) == ("img", "alt")]
    assert len(images) == 2
    assert all(text.startswith("Kept visual tokens of ") for text in images)


def test_drawings_have_names(outline, page):
    drawings = page.count("<svg role=")
    assert drawings == 12
    assert sum(name == "aria-label" and tag == "svg" for tag, name, _ in outline.attributes) == drawings


def test_nothing_comes_from_outside(outline, page):
    assert not re.search(r"https?:|<script|@import|url\(", page)
    assert {value[:11] for tag, name, value in outline.attributes if name in ("src", "href")} == {
        "data:image/"
    }
    (policy,) = [value for tag, name, value in outline.attributes if value.startswith("default-src")]
    assert policy.startswith("default-src 'none'")


def test_names_are_escaped(page):
    assert "<b>first</b>" not in page
    assert "&lt;b&gt;first&lt;/b&gt; &amp; only" in page


def test_anchors_are_unique(outline):
    names = [value for _, name, value in outline.attributes if name == "id"]
    assert len(names) == len(set(names)) == 12


def test_predictions_are_called_predictions(page):
    predicted = page.partition("Predicted, not measured")[2]
    assert predicted.count("Predicted: ") == 4
    assert "Below 208 tokens" in predicted


def test_the_page_of_one_bundle_without_a_peak(profiled):
    report = profiled.report
    alone = replace(
        report, bundles=report.bundles[:1], comparisons=(), predictions=(), peak=None, knee_tokens=None
    )
    assert len(Outline(render_page(alone)).figures) == 6
    assert "saving efficiency" not in [tile.name for tile in tiles(alone)]


def test_the_page_of_answers_of_one_token(profiled):
    bundles = tuple(
        replace(
            bundle,
            decode_ms=None,
            tokens_per_second=None,
            decode_steps=(),
            stages=tuple(stage for stage in bundle.stages if stage.group != "decode"),
        )
        for bundle in profiled.report.bundles
    )
    assert 'id="decode"' not in render_page(replace(profiled.report, bundles=bundles))


# --- in a browser -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> str:
    """A Chromium without a window."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(BROWSERS)} to open the page in it")
    return found


def opened(browser: str, page: str, folder: Path) -> tuple[str, list[str], list[str]]:
    """Open a page; returns what became of it, what was said on the console, and what was asked for."""
    (folder / "page.html").write_text(page, encoding="utf-8")
    quiet = (
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
    )
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", *quiet, "--enable-logging=stderr"]
    command += [f"--user-data-dir={folder / 'browser'}", f"--log-net-log={folder / 'net.json'}", "--dump-dom"]
    ran = subprocess.run(
        [*command, (folder / "page.html").as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr
    console = [line for line in ran.stderr.splitlines() if ":CONSOLE" in line]
    events = json.loads((folder / "net.json").read_text())["events"]
    parameters = [event["params"] for event in events if isinstance(event.get("params"), dict)]
    asked = sorted({str(found["url"]) for found in parameters if "url" in found})
    return ran.stdout, console, [url for url in asked if not url.startswith(("file:", "data:"))]


def test_a_browser_shows_the_page_and_asks_for_nothing(browser, page, tmp_path):
    dom, console, asked = opened(browser, page, tmp_path)
    assert console == []
    assert asked == []
    assert dom.count("<figure") == page.count("<figure")
    assert dom.count("<svg") == page.count("<svg")


def test_the_browser_would_have_noticed(browser, tmp_path):
    page = "<body><img src='http://edgeprune.invalid/x.png'><script>throw new Error('boom')</script></body>"
    _, console, asked = opened(browser, page, tmp_path)
    assert len(console) == 1
    assert asked == ["http://edgeprune.invalid/x.png"]
