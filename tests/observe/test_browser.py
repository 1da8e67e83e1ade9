"""The live page and the report in a real browser: drawn, silent, self-contained, with a keyboard, on a narrow screen."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.browser import NAMES, Browser, browser_program
from tests.helpers.run_folders import HOSTILE, experts, lines, make_run, records
from tinytron.cli.watch import open_runs
from tinytron.observe.folder import LocalFolder
from tinytron.observe.report import report
from tinytron.observe.server import WatchServer

pytestmark = pytest.mark.skipif(browser_program() is None, reason=f"no browser is installed ({', '.join(NAMES)})")
Open = Callable[..., Browser]
# The number of colors in each canvas: axes and a grid alone have few.
COLORS = """
[...document.querySelectorAll(".plot canvas, canvas.heat")].map((canvas) => {
  const {data} = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
  const pixels = new Uint32Array(data.buffer);
  return new Set(pixels.filter((pixel) => pixel >>> 24 > 200)).size;
})
"""
TITLES = "[...document.querySelectorAll('figure h3')].map((title) => title.textContent)"


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Open]:
    made: list[Browser] = []

    def start(url: str, *size: int, dark: bool = False) -> Browser:
        one = Browser(tmp_path / f"profile{len(made)}", *size, dark=dark)
        made.append(one)
        one.open(url)
        one.until("document.querySelector('.plot canvas')")
        one.evaluate("document.querySelectorAll('details').forEach((details) => { details.open = true; })")
        one.wait(0.3)
        return one

    yield start
    for one in made:
        one.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run with everything: nested curves, experts, phases, hostile texts, a spike, a damaged line, a checkpoint."""
    entries: list[dict[str, Any]] = records(80)
    for entry in entries:
        if entry["stage"] == "train":
            for layer in (load := experts(entry["step"]))["expert_load"]:
                layer["fractions"] = [0.2 + 0.1 * math.sin(entry["step"] / 9 + n + layer["layer"]) for n in range(4)]
            entry |= load | {"phases": {"data": 0.1, "forward": 0.5, "backward": 0.9}}
            entry |= {f"grad_norms/blocks.{n}.weight": n + 1 / entry["step"] for n in range(12)}
    entries[0] |= {HOSTILE: 1.0, "sample": HOSTILE}
    entries[-5]["loss"] = 9.0
    made = make_run(tmp_path / "runs" / "one", entries, seed=HOSTILE)
    with open(made / "log.jsonl", "a") as file:
        file.write("{half\n")
    (made / "00050_meta.pt").write_bytes(bytes(1000))
    return made


@pytest.fixture
def url(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server of two runs."""
    monkeypatch.setattr(LocalFolder, "pause", 0.05)
    other = make_run(tmp_path / "runs" / "two", records(60), seed=2)
    with WatchServer(open_runs([str(folder), str(other)]), port=0) as server:
        server.start_following()
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        yield server.url
        server.stop_following()
        server.shutdown()


def text(browser: Browser) -> str:
    found: str = browser.evaluate("document.body.innerText")
    return found


def test_the_page_shows_and_follows_runs(url: str, folder: Path, browser: Open) -> None:
    page = browser(url)
    page.until("page.runs.length === 2 && page.runs.every((run) => run.summary.read === 1)")
    page.wait(0.5)
    titles = page.evaluate(TITLES)
    for title in (
        "Loss nats per token",
        "Learning rate",
        "Gradient norms",
        "Phases seconds",
        "Load of the busiest expert, by layer",
    ):
        assert title in titles
    colors = page.evaluate(COLORS)
    assert len(colors) >= len(titles) - 1 > 10
    assert page.evaluate("[...alive].filter(({u}) => !(u.scales.y.min < u.scales.y.max)).length") == 0
    assert min(colors) > 3, dict(zip(titles, colors, strict=False))
    shown = text(page)
    for part in ("the loss rose to 9", "1 damaged or half-written line passed over", "train.seed", "Spike"):
        assert part in shown
    assert HOSTILE.split("\u2028")[0] in shown
    with open(folder / "log.jsonl", "a") as file:
        file.write(lines(records(20, first=81)))
    page.until("page.runs[0].summary.step === 100")
    page.until("document.querySelector('#runs .state').textContent === 'finished'")
    assert page.evaluate("window.pwned") is None
    assert page.errors == []
    assert page.requests
    assert all(address.startswith((url, "data:")) for address in page.requests), page.requests


def test_the_keyboard_reads_values_zooms_and_hides_runs(url: str, browser: Open) -> None:
    page = browser(url)
    page.until("page.runs.length === 2 && page.runs.every((run) => run.summary.read === 1)")
    page.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the charts"
    for _ in range(40):
        page.press("Tab")
        if page.evaluate("document.activeElement.classList.contains('plot')"):
            break
    assert page.evaluate("document.activeElement.getAttribute('aria-label')").startswith("Loss, step 80: ")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.press("Home")
    page.press("ArrowRight")
    assert page.evaluate("document.getElementById('spoken').textContent").startswith("Loss, step 2: one")
    whole = page.evaluate("document.getElementById('whole').disabled")
    page.press("+", "+")
    ranges = page.evaluate("[...alive].map((chart) => chart.u.scales.x.max)")
    assert whole
    assert set(ranges) == {ranges[0]}
    assert ranges[0] < 30
    page.press("0", "0")
    assert page.evaluate("view.zoom") is None
    page.evaluate("document.querySelector('#runs input').focus()")
    page.press(" ", " ")
    page.wait(0.3)
    assert page.evaluate("visible().map((run) => run.name)") == ["two"]
    assert "Gradient norms" not in page.evaluate(TITLES)
    page.evaluate("document.getElementById('log-y').click()")
    page.evaluate("document.getElementById('log-x').click()")
    page.wait(0.3)
    assert min(page.evaluate(COLORS)) > 3
    assert page.errors == []


def test_zooming_into_a_long_run_shows_its_steps(url: str, folder: Path, browser: Open) -> None:
    with open(folder / "log.jsonl", "a") as file:
        file.write(lines(records(9920, first=81)))
    page = browser(url)
    page.until("page.runs[0].summary.step === 10000 && page.runs[0].curves.some((curve) => curve.mean_x)")
    page.wait(0.5)
    points = "page.charts.get('loss').own[0].filter((step) => step >= 5000 && step <= 5200).length"
    assert page.evaluate(points) < 100
    page.evaluate("zoomTo([5000, 5200])")
    page.until(f"{points} === 201")
    assert page.evaluate("page.charts.get('loss').u.scales.x.max") == 5200
    page.evaluate("zoomTo(null)")
    page.until(f"{points} < 100")
    assert page.evaluate("page.charts.get('loss').u.scales.x.max") == 10_000
    assert page.errors == []


@pytest.mark.parametrize("dark", [False, True])
def test_the_report_opens_alone_on_a_narrow_screen(dark: bool, folder: Path, tmp_path: Path, browser: Open) -> None:
    (run,) = open_runs([str(folder)])
    run.refresh()
    (tmp_path / "report.html").write_text(report([run]), encoding="utf-8")
    page = browser((tmp_path / "report.html").as_uri(), 360, 740, dark=dark)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert (
        page.evaluate(
            "Math.max(...[...document.querySelectorAll('figure')].map((f) => f.getBoundingClientRect().right))"
        )
        <= 360
    )
    assert min(page.evaluate(COLORS)) > 3
    dark_ground = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(16, 20, 27)"
    assert dark_ground == dark
    assert "the loss rose to 9" in text(page)
    assert page.evaluate("window.pwned") is None
    assert page.errors == []
    assert page.requests == [(tmp_path / "report.html").as_uri()]
