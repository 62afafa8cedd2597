"""The report in a real headless Chromium: nothing runs, nothing is fetched, and people can read it on any screen."""

import base64
import fcntl
import itertools
import json
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from report_suite import HOSTILE, write_json, write_lines, write_suite, write_translations

from unroll.report.build import build

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

pytestmark = [
    pytest.mark.pipeline,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)"),
]
SERIES = [f"--series-{index}" for index in range(8)]
TIMEOUT = 60  # seconds; far above what a page takes


class Browser:
    """One headless Chromium, driven through its DevTools pipe: JSON messages that end in a zero byte."""

    def __init__(self, profile: Path) -> None:
        read_end, self._write = os.pipe()
        self._read, write_end = os.pipe()
        flags = "--headless --no-sandbox --disable-gpu --remote-debugging-pipe --no-first-run --disable-dev-shm-usage"
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (read_end, write_end)]
        self._process = subprocess.Popen(
            [str(CHROMIUM), *flags.split(), f"--user-data-dir={profile}", "about:blank"],
            close_fds=False,
            preexec_fn=lambda: [
                os.dup2(end, number) for number, end in enumerate(ends, start=3)
            ],  # it reads 3, writes 4
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_end, write_end, *ends):
            os.close(end)
        self._numbers = itertools.count(1)
        self._buffer = b""
        self.events: list[dict[str, Any]] = []
        self._attached: str | None = None
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._attached = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def close(self) -> None:
        os.close(self._write)  # the browser ends when its pipe does
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._read)

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Answer to one DevTools command; events that come before it are kept."""
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        if self._attached:
            message["sessionId"] = self._attached
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == number:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self.events.append(answer)

    def open(self, page: Path, width: int = 1400, height: int = 900, dark: bool = False) -> None:
        """Load a page in a window of that size and wait until it is there."""
        features = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=features)
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.events.clear()
        self.call("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._receive())

    def value(self, expression: str) -> Any:
        """Value of a JavaScript expression on the page."""
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Picture of the whole page."""
        data = self.call("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def seen(self, method: str) -> list[dict[str, Any]]:
        return [event["params"] for event in self.events if event.get("method") == method]

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + TIMEOUT
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._read], [], [], max(0.0, deadline - time.monotonic()))
            chunk = os.read(self._read, 1 << 16) if ready else b""
            assert chunk, f"Chromium did not answer within {TIMEOUT} s (exit code {self._process.poll()})"
            self._buffer += chunk
        message, _, self._buffer = self._buffer.partition(b"\0")
        return json.loads(message)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with hostile text wherever text comes from outside."""
    root = write_suite(tmp_path_factory.mktemp("suite"))
    path = root / "results" / "demo" / "lstm.json"
    content = json.loads(path.read_text())
    content |= {"title": HOSTILE, "model": HOSTILE, "configuration": {HOSTILE: HOSTILE}, "commit": HOSTILE}
    content["reference"] |= {"note": HOSTILE, "source": HOSTILE}
    content["metrics"]["nats_per_char"]["signature"] = HOSTILE
    write_json(path, content)
    hostile = [{"temperature": HOSTILE, "prompt": HOSTILE, "text": f"{HOSTILE}\u202e\x1b[31m\0 \"'`"}]
    write_lines(root / "evaluations" / "demo" / "lstm" / "samples.jsonl", hostile)
    return build("demo", root / "results" / "demo", root / "evaluations" / "demo", root / "reports" / "demo")


@pytest.fixture(scope="module")
def translators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report with sentences and heat-maps, hostile ones among them."""
    root = write_translations(tmp_path_factory.mktemp("translators"))
    folder = root / "evaluations" / "cpu" / "attention"
    example = {"rank": "worst", "id": 0, "chrf": 1.0, "source": HOSTILE, "references": [HOSTILE], "hypothesis": HOSTILE}
    write_json(folder / "examples.json", [example])
    sentence = {"id": 0, "source": [HOSTILE] * 60, "target": ["b"], "weights": [[0.01] * 60], "reason": HOSTILE}
    write_lines(folder / "attention.jsonl", [sentence])
    return build("cpu", root / "results" / "cpu", root / "evaluations" / "cpu", root / "reports" / "cpu")


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_sentences_and_heat_maps_can_be_read(browser: Browser, translators: Path, width: int, dark: bool) -> None:
    """A map wider than the screen scrolls in its frame and not the page; the page's colours reach it."""
    browser.open(translators, width=width, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    assert browser.value("document.scripts.length + document.images.length") == 0
    assert browser.seen("Log.entryAdded") == []
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('svg.attention rect title').length") > 60
    heights = browser.value(
        "[...document.querySelectorAll('.attention text')].map(e => e.getBoundingClientRect().height)"
    )
    assert min(heights) >= 10
    style = "getComputedStyle(document.documentElement).getPropertyValue('--series-0')"
    [red, green, blue] = [int(browser.value(style)[start : start + 2], 16) for start in (1, 3, 5)]
    assert (
        browser.value("getComputedStyle(document.querySelector('.heat rect')).fill") == f"rgb({red}, {green}, {blue})"
    )
    assert [(ratio, text) for ratio, text in browser.value(CONTRASTS) if ratio < 4.5] == []


def test_nothing_is_fetched_and_nothing_is_complained_of(browser: Browser, page: Path) -> None:
    browser.open(page)
    browser.value("new Promise(done => setTimeout(done, 500))")
    requested = [event["request"]["url"] for event in browser.seen("Network.requestWillBeSent")]
    assert [url for url in requested if not url.startswith("data:")] == [page.as_uri()]
    complaints = browser.seen("Log.entryAdded") + browser.seen("Runtime.exceptionThrown")
    assert complaints == []
    assert browser.seen("Runtime.consoleAPICalled") == []


def test_hostile_text_is_shown_and_does_not_run(browser: Browser, page: Path) -> None:
    browser.open(page)
    assert browser.value("document.title") == "demo: leaderboard of unroll"
    assert browser.value("document.scripts.length + document.images.length") == 0
    assert browser.value("document.querySelectorAll('[onerror]').length") == 0
    assert browser.value("document.body.textContent").count(HOSTILE) >= 8


def test_the_policy_stops_a_script_that_slipped_through(browser: Browser, page: Path, tmp_path: Path) -> None:
    """Second line of defence: even unescaped script in the file does not run, and no style but ours applies."""
    slipped = tmp_path / "slipped.html"
    injected = HOSTILE + "<p id=p style='color: rgb(1, 2, 3)'>x</p><style>body{color: rgb(1, 2, 3)}</style>"
    slipped.write_text(page.read_text(encoding="utf-8").replace("</main>", injected + "</main>"), encoding="utf-8")
    browser.open(slipped)
    assert browser.value("document.scripts.length") == 1
    assert browser.value("document.title") == "demo: leaderboard of unroll"
    assert browser.value("getComputedStyle(document.body).color") != "rgb(1, 2, 3)"
    assert browser.value("getComputedStyle(document.querySelector('#p')).color") != "rgb(1, 2, 3)"


@pytest.mark.parametrize("width", [360, 768, 1024, 1400, 2400])
def test_the_page_fits_the_screen(browser: Browser, page: Path, width: int) -> None:
    """No sideways scrolling of the page, and every score of the table within reach."""
    browser.open(page, width=width)
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('.leaderboard .score').length") == 5
    boxes = browser.value(
        "[...document.querySelectorAll('.leaderboard .score strong')].map(e => e.getBoundingClientRect().toJSON())"
    )
    assert all(box["width"] > 20 and box["height"] > 10 and 0 <= box["left"] < box["right"] <= width for box in boxes)
    clipped = "[...document.querySelectorAll('.name')].filter(e => e.scrollWidth > e.clientWidth + 1).length"
    assert browser.value(clipped) == 0


def test_the_header_of_the_table_stays_in_sight(browser: Browser, page: Path) -> None:
    """A table longer than the window scrolls in its frame under its header."""
    browser.open(page, width=1400, height=420)
    frame, header = "document.querySelector('.table-frame')", "document.querySelector('.leaderboard thead th')"
    assert browser.value(f"{frame}.scrollTop = 999, {frame}.scrollTop") > 50
    assert browser.value(f"{header}.getBoundingClientRect().top - {frame}.getBoundingClientRect().top") <= 2


# Ratio of luminances (WCAG 2.1) of every element with text of its own against the nearest background behind it.
CONTRASTS = """
(() => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const luminance = color => channels(color).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = element => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (channels(color)[3] !== 0) return color;
    }
    return 'rgb(255, 255, 255)';
  };
  return [...document.body.querySelectorAll('*')]
    .filter(e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) && !e.closest('.skip'))
    .filter(e => e.tagName !== 'title')
    .map(e => {
      const style = getComputedStyle(e);
      const color = e.closest('svg') ? style.fill : style.color;
      const [high, low] = [luminance(color), luminance(behind(e))].sort((a, b) => b - a);
      return [(high + 0.05) / (low + 0.05), e.tagName + ' ' + e.textContent.trim().slice(0, 40)];
    });
})()
"""


@pytest.mark.parametrize("dark", [False, True])
def test_all_text_stands_out_from_its_background(browser: Browser, page: Path, dark: bool) -> None:
    browser.open(page, dark=dark)
    browser.value("document.querySelectorAll('details').forEach(e => e.open = true)")
    contrasts = browser.value(CONTRASTS)
    assert len(contrasts) > 200
    assert [(ratio, text) for ratio, text in contrasts if ratio < 4.5] == []


@pytest.mark.parametrize("dark", [False, True])
def test_curves_stand_out_from_their_background(browser: Browser, page: Path, dark: bool) -> None:
    """Every colour that a picture takes from the page is defined there, and its lines can be seen (3 to 1)."""
    browser.open(page, dark=dark)
    names = set(re.findall(r"var\((--[\w-]+)\)", page.read_text(encoding="utf-8")))
    assert {"--ink", "--faint", "--grid", "--series-0", "--series-4"} <= names
    style = "getComputedStyle(document.documentElement)"
    assert [name for name in names if not browser.value(f"{style}.getPropertyValue('{name}')")] == []
    card, *series = [browser.value(f"{style}.getPropertyValue('{name}')") for name in ("--card", *SERIES)]
    assert [color for color in series if contrast(color, card) < 3] == []


def contrast(a: str, b: str) -> float:
    """Ratio of the luminances (WCAG 2.1) of two colours such as #0072b2."""
    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def luminance(color: str) -> float:
    channels = [int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.03928 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_in_pictures_can_be_read_on_a_phone(browser: Browser, page: Path) -> None:
    browser.open(page, width=360)
    heights = browser.value("[...document.querySelectorAll('.plot text')].map(e => e.getBoundingClientRect().height)")
    assert min(heights) >= 8


def test_the_page_can_be_read_aloud(browser: Browser, page: Path) -> None:
    """Language, headings without gaps, named pictures and regions, identifiers that stand once, links that lead on."""
    browser.open(page)
    assert browser.value("document.documentElement.lang") == "en"
    levels = browser.value("[...document.querySelectorAll('h1, h2, h3, h4')].map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert browser.value("[...document.querySelectorAll('svg')].every(e => e.ariaLabel || e.ariaHidden)") is True
    identifiers = browser.value("[...document.querySelectorAll('[id]')].map(e => e.id)")
    assert len(identifiers) == len(set(identifiers))
    targets = browser.value("[...document.querySelectorAll('a[href], use')].map(e => e.getAttribute('href').slice(1))")
    assert set(targets) <= set(identifiers)
