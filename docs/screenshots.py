"""Take the pictures of MLflow that README and docs show: ``python docs/screenshots.py``.

Needs what ``make demo`` leaves in ``results/``, and Chromium (Debian: ``apt install chromium``).
Their steps are those of ``tests/test_mlflow_browser.py``.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from mlflow_pages import Pages, chromium, interface  # noqa: E402

IMAGES = ROOT / "docs/images"
TRAINED_ON, ITERATIONS = "monitor/reward/verifier", [0, 60]


def main() -> None:
    """Write ``docs/images/mlflow_*.png``."""
    with chromium() as browser, interface() as addresses:
        if browser is None:
            sys.exit("no Chromium is installed")
        pages = Pages(browser)
        pages.picture_of_curves(addresses[0], TRAINED_ON, IMAGES / "mlflow_runs.png")
        pages.picture_of_samples(addresses[3], IMAGES / "mlflow_compare.png")
        pages.close()
        pages = Pages(browser, width=1040)
        pages.picture_of_grids(addresses[0], ITERATIONS, IMAGES / "mlflow_images.png")
        pages.close()


if __name__ == "__main__":
    main()
