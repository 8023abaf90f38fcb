"""The picture of a study's page in the documentation.

``python tests/page_screenshot.py results/laptop/index.html docs/images/page.png``
"""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from mlflow_pages import CHROMIUM, chromium
from PIL import Image

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

WIDTH = 1060
GROUND = (251, 251, 249)


def _part(page: Page, first: str, last: str) -> Image.Image:
    """The page from the top of one element to the bottom of another, as wide as it is."""
    top = page.locator(first).bounding_box()
    end = page.locator(last).bounding_box()
    assert top
    assert end
    clip = {"x": 0, "y": top["y"], "width": WIDTH, "height": end["y"] + end["height"] - top["y"]}
    return Image.open(io.BytesIO(page.screenshot(clip=clip, full_page=True)))


def take(browser: Browser, story: Path, target: Path) -> None:
    """Beginning, gallery and plan of a page with plans, side by side, as a small PNG."""
    page = browser.new_page(viewport={"width": WIDTH, "height": 900}, color_scheme="light")
    page.goto(story.resolve().as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(d => d.open = false)")
    left = _part(page, "body", "#outcome")
    right = [_part(page, "#gallery", "#gallery"), _part(page, "#plan", "#plan")]
    page.close()
    height = max(left.height, sum(part.height for part in right))
    whole = Image.new("RGB", (2 * WIDTH, height), GROUND)
    whole.paste(left, (0, 0))
    y = 0
    for part in right:
        whole.paste(part, (WIDTH, y))
        y += part.height
    small = whole.resize((1600, round(height * 1600 / whole.width)), Image.Resampling.LANCZOS)
    _few_colors(small).save(target, optimize=True)


def _few_colors(image: Image.Image) -> Image.Image:
    """256 colors: half for what most pixels have, grays; half for what few have, the images."""
    methods = Image.Quantize.MEDIANCUT, Image.Quantize.MAXCOVERAGE
    both = Image.new("P", (1, 1))
    both.putpalette(
        [part for m in methods for part in (image.quantize(128, m).getpalette() or [])[: 3 * 128]]
    )
    return image.quantize(palette=both, dither=Image.Dither.NONE)


if __name__ == "__main__":
    with chromium() as started:
        if started is None:
            sys.exit(f"none of {', '.join(CHROMIUM)} is installed")
        take(started, Path(sys.argv[1]), Path(sys.argv[2]))
