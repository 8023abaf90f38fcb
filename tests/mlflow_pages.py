"""MLflow's pages in Chromium: where to click, what to read. docs/screenshots.py uses it too."""

from __future__ import annotations

import io
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Locator, Page

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
)
ROOT = Path(__file__).resolve().parent.parent
PATIENCE = 30_000  # ms that a page may take to show something; it takes some hundred
ASSISTANT_SEEN = "localStorage.setItem('mlflow.assistant.fab.autoOpenedOnFirstLoad_v1', 'true')"
"""As if the user had closed the chat panel that MLflow opens at the first visit."""

TABLE = """() => {
  const rows = {};
  for (const row of document.querySelectorAll('.ag-row'))
    for (const cell of row.querySelectorAll('[role=gridcell]'))
      (rows[row.getAttribute('row-index')] ??= {})[cell.getAttribute('col-id')] = cell.innerText;
  return Object.keys(rows).sort((a, b) => a - b).map(i => rows[i]);
}"""
CURVES = """card => {
  const plot = card.querySelector('.js-plotly-plot');
  if (!plot || !plot.data || !plot.data.length) return null;
  const curves = plot.data.map(t => [t.name, Array.from(t.x, (x, i) => [x, t.y[i]])]);
  return {axis: plot.layout.xaxis.title.text, curves};
}"""
PIXEL = """async image => {
  await image.decode();
  const canvas = document.createElement('canvas');
  canvas.width = canvas.height = 1;
  const context = canvas.getContext('2d');
  context.drawImage(image, 0, 0, 1, 1);
  return Array.from(context.getImageData(0, 0, 1, 1).data).slice(0, 3);
}"""


@contextmanager
def chromium() -> Iterator[Browser | None]:
    """Headless Chromium, as installed on this machine, with a fresh profile; None without one."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        yield None
        return
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=found, args=CHROMIUM_FLAGS.split())
        yield started
        started.close()


@contextmanager
def interface(*config: str | Path) -> Iterator[list[str]]:
    """`egrpo ui` as a process, until the end of the block; yields the addresses that it prints."""
    words = [word for path in config for word in ("--config", str(path))]
    job = subprocess.Popen(
        [sys.executable, "-m", "egrpo", "ui", "--port", "0", *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert job.stdout is not None
        printed = []
        for line in job.stdout:
            if line.startswith("Ctrl-C"):
                break
            printed.append(line.rstrip("\n"))
        yield [line for line in printed if line.startswith("http://127.0.0.1:")]
    finally:
        job.send_signal(signal.SIGTERM)
        job.wait(timeout=60)


class Pages:
    """A browser window on MLflow."""

    def __init__(self, browser: Browser, width: int = 1400, height: int = 900) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": height})
        self.context.set_default_timeout(PATIENCE)
        self.context.add_init_script(ASSISTANT_SEEN)
        self.page: Page = self.context.new_page()

    def close(self) -> None:
        """Close the window."""
        self.context.close()

    def open(self, address: str) -> None:
        """Load a page anew: MLflow takes a view from an address only when it starts."""
        self.page.goto("about:blank")
        self.page.goto(address)

    # ------------------------------------------------------------ the runs page

    def runs(self, expected: list[str]) -> list[str]:
        """Names of the listed runs: waits until they are these, returns what came in the end."""
        found: list[str] = []
        for _ in range(PATIENCE // 250):
            found = self.page.locator(".ag-row a[href*='/runs/']").all_inner_texts()
            if found == expected:
                break
            self.page.wait_for_timeout(250)
        return found

    def matching(self, count: int) -> None:
        """Wait until the page says that it has found this many runs."""
        text = re.compile(rf"^{count} matching runs?$")
        self.page.get_by_text(text).wait_for()

    def filter(self, text: str) -> None:
        """Type into the search box."""
        box = self.page.get_by_test_id("search-box")
        box.fill(text)
        box.press("Enter")

    def rows(self) -> list[dict[str, str]]:
        """Cells of the table of runs, by MLflow's name of the column."""
        found: list[dict[str, str]] = self.page.evaluate(TABLE)
        return found

    def expand(self, run: str) -> None:
        """Show the runs below a run; `Expand rows` works on rows that are loaded later only."""
        name = self.page.get_by_role("link", name=run, exact=True)
        self.page.locator(".ag-row").filter(has=name).get_by_role("button").first.click()

    def hide_banner(self) -> None:
        """Close the remark that this is a shared view."""
        self.page.get_by_role("button", name="Hide banner").click()

    # ------------------------------------------------------------ charts

    def chart(self, title: str, axis: str) -> list[tuple[str, dict[float, float]]]:
        """Name and points of each curve of a chart; ``axis`` is the title of its x axis."""
        cards = self.page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=title)
        cards.first.wait_for()
        for _ in range(PATIENCE // 250):
            for card in cards.all():
                card.scroll_into_view_if_needed()
                found: Any = card.evaluate(CURVES)
                if found and found["axis"] == axis:
                    return [(name, dict(points)) for name, points in found["curves"]]
            self.page.wait_for_timeout(250)
        raise AssertionError(f"no chart of {title} against {axis}")

    def images(self) -> Locator:
        """The card with the grids of the monitor, brought into sight."""
        self.page.get_by_text("Images of the same prompts and noise").scroll_into_view_if_needed()
        card = self.page.get_by_test_id("experiment-view-compare-runs-card").filter(
            has=self.page.get_by_role("slider")
        )
        card.scroll_into_view_if_needed()
        card.locator("img").first.wait_for()
        return card

    def images_at(self, step: int) -> list[list[int]]:
        """Move the slider to an iteration; mean color of each run's grid there."""
        card = self.images()
        number = card.locator("input").last
        number.fill(str(step))
        number.press("Tab")
        shown = card.locator(f"img[src*='step%2B{step}%2B']")
        shown.first.wait_for()
        return [self.mean_color(image) for image in shown.all()]

    def mean_color(self, image: Locator) -> list[int]:
        """Red, green and blue of an image shrunk to one pixel."""
        color: list[int] = image.evaluate(PIXEL)
        return color

    # ------------------------------------------------------------ pictures

    def hide_frame(self) -> None:
        """Leave the room of the sidebar to the page, and that of the chat's button."""
        self.page.get_by_role("button", name="Toggle sidebar").click()
        self.page.add_style_tag(content="[data-assistant-ui] { display: none }")

    def hide_runs(self) -> None:
        """Leave the room of the list of runs to what stands beside it."""
        self.page.locator(
            "[data-component-id='mlflow.experiment_page.table_resizer.collapse']"
        ).click()

    def picture_of_curves(self, address: str, metric: str, file: Path) -> None:
        """The list of training runs beside their curves against both axes."""
        self.open(address)
        self.hide_banner()
        self.hide_frame()
        for axis in ("nfe", "Step"):
            self.chart(metric, axis)
        save(file, self.page.screenshot())

    def picture_of_grids(self, address: str, steps: list[int], file: Path) -> None:
        """The card with the monitor's grids, at some iterations, below each other."""
        self.open(address)
        self.hide_frame()
        shots = []
        for step in steps:
            self.images_at(step)
            shots.append(self.images().screenshot())
        save(file, *shots)

    def picture_of_samples(self, address: str, file: Path) -> None:
        """The same prompts and noise under several runs, beside each other."""
        self.open(address)
        self.hide_banner()
        self.hide_frame()
        self.hide_runs()
        self.page.locator("img[src*='table_images']").nth(2).wait_for()
        self.page.wait_for_function("[...document.images].every(image => image.complete)")
        save(file, self.page.screenshot())


def save(file: Path, *shots: bytes) -> None:
    """Screenshots below each other."""
    from PIL import Image

    images = [Image.open(io.BytesIO(shot)).convert("RGB") for shot in shots]
    size = max(i.width for i in images), sum(i.height for i in images)
    whole, top = Image.new("RGB", size, "white"), 0
    for image in images:
        whole.paste(image, (0, top))
        top += image.height
    whole.save(file, optimize=True)
