"""A real JupyterLab on 127.0.0.1 with a token, and a real Chromium that opens notebooks in it."""

import contextlib
import json
import os
import re
import secrets
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from papermill.iorw import load_notebook_node
from papermill.parameterize import parameterize_notebook

ROOT = Path(__file__).parent.parent.parent
NOTEBOOKS = ROOT / "notebooks"


# a folded cell shows no prompt of its input: what it left tells that it ran
ALL_HAVE_RUN = r"""() => {
  const cells = [...document.querySelectorAll(".jp-NotebookPanel:not(.lm-mod-hidden) .jp-CodeCell")];
  const has_run = (cell) => {
    const prompt = cell.querySelector(".jp-InputPrompt").textContent;
    return prompt === "" ? cell.querySelector(".jp-OutputArea-child") : /[0-9]/.test(prompt);
  };
  return cells.length > 0 && cells.every(has_run);
}"""
SOME_RUN = ALL_HAVE_RUN.replace("every", "some").replace("[0-9]", "[0-9*]")


def until(page, condition, argument=None, seconds=90):
    """Wait for a JavaScript condition (the page's security policy forbids Playwright's own waiting for one)."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition, argument):
        if time.monotonic() > deadline:
            seen = Path(tempfile.mkdtemp()) / "page.png"
            page.screenshot(path=seen)
            raise AssertionError(f"not true within {seconds} s, see {seen}: {condition}")
        time.sleep(0.1)


class Lab:
    """One server and one browser; each notebook is a copy with parameters of its own in a temporary folder."""

    def __init__(self, folder, browser):
        self.folder, self.browser, self.token = folder, browser, secrets.token_hex(16)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.log = (folder / "lab.log").open("w")
        settings = folder / "settings"
        news = settings / "@jupyterlab" / "apputils-extension" / "notification.jupyterlab-settings"
        news.parent.mkdir(parents=True)
        news.write_text('{"fetchNews": "false", "checkForUpdates": false}')
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1"),
                *(f"--port={self.port}", f"--IdentityProvider.token={self.token}", "--LabApp.news_url="),
                *(f"--ServerApp.root_dir={folder}", "--ServerApp.port_retries=0"),
            ],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=os.environ
            | {
                "PYTHONPATH": str(ROOT),
                "JUPYTER_CONFIG_DIR": str(folder / "config"),
                "JUPYTERLAB_SETTINGS_DIR": str(settings),
                "MPLBACKEND": "",
            },
        )
        self.wait_until_it_answers()

    def wait_until_it_answers(self):
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline and self.process.poll() is None:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api", timeout=2):
                return
            time.sleep(0.2)
        raise RuntimeError((self.folder / "lab.log").read_text()[-2000:])

    def write(self, name, notebook=None, **parameters):
        """A notebook of the project, or a given one, with other parameters; returns its file name."""
        notebook = notebook or load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
        if parameters:
            notebook = parameterize_notebook(notebook, parameters, report_mode=False)
        for cell in notebook.cells:
            cell.setdefault("id", secrets.token_hex(4))
        notebook.metadata.pop("papermill", None)
        nbformat.write(notebook, self.folder / f"{name}.ipynb")
        return f"{name}.ipynb"

    def open(self, name, **options):
        """A page that shows the notebook, its kernel ready."""
        page = self.browser.new_page(**({"viewport": {"width": 1400, "height": 1000}} | options))
        page.alerts = []

        def answer(dialog):
            if dialog.type == "beforeunload":  # JupyterLab asks before an unsaved notebook is left
                dialog.accept()
            else:
                page.alerts.append(dialog.message)
                dialog.dismiss()

        page.on("dialog", answer)
        page.goto(f"http://127.0.0.1:{self.port}/lab/tree/{name}?reset&token={self.token}")
        self.wait_for_kernel(page)
        return page

    def wait_for_kernel(self, page):
        """Until its session has an idle kernel: what is run earlier makes JupyterLab ask which kernel to use."""
        page.wait_for_selector(".jp-Notebook .jp-CodeCell", timeout=90_000)
        name = page.url.split("/tree/")[1].split("?")[0]
        address = f"http://127.0.0.1:{self.port}/api/sessions?token={self.token}"
        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            with urllib.request.urlopen(address, timeout=10) as answer:
                sessions = json.load(answer)
            if any(s["path"] == name and s["kernel"]["execution_state"] == "idle" for s in sessions):
                break
            time.sleep(0.2)
        front = ".jp-NotebookPanel:not(.lm-mod-hidden)"
        page.wait_for_selector(f'{front} .jp-Notebook-ExecutionIndicator[data-status="idle"]', timeout=90_000)

    def run_all(self, page):
        """Run > Run All Cells, then wait until the last cell has run."""
        for _ in range(10):  # a page that has just been loaded can miss the first click
            page.click(".lm-MenuBar-itemLabel:text-is('Run')")
            page.click(".lm-Menu-itemLabel:text-is('Run All Cells')")
            page.wait_for_timeout(3000)
            if page.evaluate(SOME_RUN):
                break
        until(page, ALL_HAVE_RUN, seconds=400)
        errors = page.locator(".jp-RenderedText[data-mime-type='application/vnd.jupyter.stderr']").all_inner_texts()
        failed = [text for text in errors if "Error" in text or "Traceback" in text]
        assert not failed, failed

    def close(self):
        self.process.terminate()
        self.process.wait(30)
        self.log.close()


@pytest.fixture(scope="session")
def lab(tmp_path_factory, browser):
    server = Lab(tmp_path_factory.mktemp("lab"), browser)
    yield server
    server.close()


@pytest.fixture(name="until", scope="session")
def until_fixture():
    return until


UNNAMED = """root => [...document.querySelectorAll(`${root} :is(input, select, button, [tabindex='0'])`)]
  .filter(e => e.type !== "hidden" && !(e.labels && e.labels.length) && !e.textContent.trim()
    && !e.getAttribute("aria-label") && !e.getAttribute("aria-labelledby")).map(e => e.outerHTML.slice(0, 200))"""
UNDESCRIBED = "root => [...document.querySelectorAll(`${root} img`)].filter(e => !e.alt).length"


@pytest.fixture(scope="session")
def accessible():
    """Every control of a widget has a name and every image a description; at 200 % zoom nothing runs out of sight."""

    def check(page, root):
        assert page.evaluate(UNNAMED, root) == []
        assert page.evaluate(UNDESCRIBED, root) == 0
        page.set_viewport_size({"width": 700, "height": 500})  # what a window of 1400 x 1000 shows at 200 % zoom
        page.wait_for_timeout(300)
        overflow = page.locator(root).first.evaluate("e => e.scrollWidth - e.clientWidth")
        page.set_viewport_size({"width": 1400, "height": 1000})
        page.wait_for_timeout(300)
        assert overflow <= 1

    return check


@pytest.fixture
def picture():
    """Keep a screenshot of a widget in notebooks/images/ when DKTO_SCREENSHOTS is set."""

    def keep(locator, name):
        if os.environ.get("DKTO_SCREENSHOTS"):
            page, height = locator.page, round(locator.bounding_box()["height"])
            page.set_viewport_size({"width": 1400, "height": max(1000, height + 400)})  # whole, not scrolled together
            page.wait_for_timeout(500)
            (NOTEBOOKS / "images").mkdir(exist_ok=True)
            locator.screenshot(path=NOTEBOOKS / "images" / f"{re.sub(r'[^a-z_]', '', name)}.png")
            page.set_viewport_size({"width": 1400, "height": 1000})

    return keep
