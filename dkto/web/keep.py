"""Write down the run that the page shows where the model cannot run: `python -m dkto.web.keep`, needs chromium."""

import base64
import io
import json
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from PIL import Image

from dkto.common.ends import guarded
from dkto.common.files import write_atomically
from dkto.web.page import KEPT, build_page

SETTINGS = "#count=24&steps=60&judge=dark"
QUALITY = 88  # of the sheet of images, as WebP
PATIENCE = 900  # seconds


def wait_until(page: Any, condition: str, seconds: float = PATIENCE) -> None:
    """Wait for a condition in JavaScript; the page forbids what Playwright's own waiting needs.

    Raises:
        TimeoutError: if it does not become true.
    """
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition):
        if time.monotonic() > deadline:
            raise TimeoutError(f"the page did not come to {condition} within {seconds:g} s")
        time.sleep(0.05)


def record(page: Any) -> dict:
    """The run that an open page draws, judges by its rule and tunes with its settings; its images as one WebP."""
    wait_until(page, "Boolean(state.machine)")
    page.click("#draw")
    wait_until(page, "state.pool.length === state.drawing && !working")
    page.click("#tune")
    wait_until(page, "Boolean(state.tuned) && state.held.every((one) => KEPT_POSITIONS.every((at) => one.at.has(at)))")
    wait_until(page, "!working")
    found = page.evaluate("keptRun()")
    buffer = io.BytesIO()
    png = base64.b64decode(found["sprite"].partition(",")[2])
    Image.open(io.BytesIO(png)).convert("RGB").save(buffer, format="WEBP", quality=QUALITY)
    return found | {"sprite": f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"}


def keep(path: Path = KEPT) -> None:
    """Build the page, run it in chromium with `SETTINGS`, and keep the run."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as api:
        browser = api.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.goto(build_page(Path(folder)).as_uri() + SETTINGS)
        text = json.dumps(record(page), separators=(",", ":")) + "\n"
        browser.close()
    write_atomically(path, lambda part: part.write_text(text))


if __name__ == "__main__":
    sys.exit(guarded(keep, "dkto"))
