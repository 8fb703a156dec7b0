"""The site: what Sphinx reads, formulas without a script, links that lead somewhere, nothing from elsewhere."""

import base64
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from dkto.web.page import SERVED, SINGLE
from dkto.workshop import site
from dkto.workshop.site import (
    PAGE,
    SCREEN,
    build_site,
    check_pages,
    literal_formulas,
    live_playground,
    mathml,
    write_source,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture
def checkout(tmp_path):
    """A small project: a README with every sort of link, one module, two lessons that ran, one card."""
    root = tmp_path / "checkout"
    (root / "dkto" / "runs").mkdir(parents=True)
    (root / "toy").mkdir()
    (root / "notebooks").mkdir()
    text = "# Guide\n\n[one](10_first.ipynb) ![it](../picture.png) [home](../README.md)\n"
    text += "\n## Lessons\n\n### Part 1: likes\n\n"
    text += "| [10_first](10_first.ipynb) | Why? | 4 |\n| [11_lost](10_first.ipynb) | What? | 4 |\n"
    (root / "notebooks" / "README.md").write_text(text)
    shutil.copyfile(ROOT / "dkto" / "runs" / "yaml12.py", root / "dkto" / "runs" / "yaml12.py")
    (root / "dkto" / "empty.py").write_text("ONE = 1\n")
    (root / "picture.png").write_bytes((ROOT / "notebooks" / "likes" / "00.png").read_bytes())
    (root / "README.md").write_text(
        "# small\n\n![a picture](picture.png)\n\n"
        "[first](notebooks/10_first.ipynb), [`code`](dkto/runs/yaml12.py), [paper](https://example.org), "
        "[here](#files), [guide](notebooks/README.md), "
        '[0.01](papermill_runs/reference/20_second/notebook.ipynb "kl"), [62 %](m.json "b")\n\n'
        "## Files\n\nmore\n"
    )
    for name in ("10_first", "20_second"):
        image = (ROOT / "notebooks" / "likes" / "00.png").read_bytes()
        figure = new_output("display_data", {"image/png": base64.b64encode(image).decode(), "text/plain": "figure"})
        text = "See [the next](20_second.ipynb) and [`solutions/x.ipynb`](solutions/10_first.ipynb)."
        text += "\n\n$$ r = \\big(a\\big) $$"
        cells = [new_markdown_cell(f"# {name}?\n\n{text}"), new_code_cell("1 + 1", outputs=[figure], execution_count=1)]
        notebook = new_notebook(cells=cells)
        notebook.metadata = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
        folder = root / "papermill_runs" / "reference" / name
        folder.mkdir(parents=True)
        nbformat.write(notebook, folder / "notebook.ipynb")
    (folder / "reproduction_card.csv").write_text("paper,ours\n86.4 %,<b>1</b>\n")
    (root / PAGE / SERVED).mkdir(parents=True)
    for name in (f"{SERVED}/index.html", SINGLE):
        (root / PAGE / name).write_text("<!doctype html><title>Teach</title>")
    (root / SCREEN).parent.mkdir()
    shutil.copyfile(root / "picture.png", root / SCREEN)
    return root


def test_what_sphinx_reads(checkout, tmp_path):
    write_source(tmp_path / "source", checkout / "papermill_runs" / "reference", checkout)
    index = (tmp_path / "source" / "index.md").read_text()
    assert "[first](lessons/10_first.ipynb), `code`, [paper](https://example.org), [here](#files)" in index
    assert "[0.01](lessons/20_second.ipynb), 62 %\n" in index and "[guide](guides/notebooks-readme.md)" in index
    guide = (tmp_path / "source" / "guides" / "notebooks-readme.md").read_text()
    assert guide.startswith("# Guide\n\n[one](../lessons/10_first.ipynb) ![it](../picture.png) [home](../index.md)\n")
    contents = index[index.index("```{toctree}") :]
    captions = ["Part 1: likes", "Other kept runs", "Guides and results", "Verdict cards", "Reference"]
    assert re.findall(":caption: (.*)", contents) == captions and "11" not in contents
    assert "\n10 Why? <lessons/10_first>\n" in contents and "\nlessons/20_second\n" in contents
    assert (tmp_path / "source" / "picture.png").is_file()
    assert [path.stem for path in (tmp_path / "source" / "api").iterdir()] == ["dkto.runs.yaml12"]
    assert index.startswith('# small\n\n```{raw} html\n<a class="teach" href="teach/index.html">')
    lesson = json.loads((tmp_path / "source" / "lessons" / "10_first.ipynb").read_text())
    text = "".join(lesson["cells"][0]["source"])
    assert "[the next](20_second.ipynb)" in text and "and `solutions/x.ipynb`." in text
    assert "&lt;b&gt;1" in (tmp_path / "source" / "cards" / "20_second-reproduction_card.md").read_text()


@pytest.mark.slow
def test_no_link_of_the_readme_leads_into_the_checkout(tmp_path):
    write_source(tmp_path / "source", ROOT / "papermill_runs" / "reference", ROOT)
    targets = re.findall(r"\]\(([^)]+)\)", (tmp_path / "source" / "index.md").read_text())
    inside = [target for target in targets if not target.startswith(("http", "#"))]
    assert len(inside) > 5 and all((tmp_path / "source" / target).is_file() for target in inside)


def test_a_site_is_built_and_checked(checkout, tmp_path):
    page = build_site(tmp_path / "site", root=checkout)
    lesson = (page.parent / "lessons" / "10_first.html").read_text()
    assert "<math" in lesson and "mathjax@" not in lesson and "_images/" in lesson
    assert "read_yaml" in (page.parent / "api" / "dkto.runs.yaml12.html").read_text()
    assert check_pages(page.parent) == [] and (page.parent / "teach" / "index.html").is_file()
    assert 'href="teach/index.html"' in page.read_text()
    (checkout / "README.md").write_text("# small\n\n[broken](#nowhere)\n")
    with pytest.raises(RuntimeError, match="Sphinx is not content"):
        build_site(tmp_path / "site", root=checkout)


@pytest.fixture
def small_playground(monkeypatch):
    sizes = {"pretrain_steps": 3, "max_train_steps": 2, "num_samples": 40, "num_train_timesteps": 40}
    monkeypatch.setitem(site.INSTRUMENTS, "Playground", lambda: live_playground(**sizes))


def test_an_instrument_becomes_one_without_a_kernel_or_an_image_of_it(checkout):
    shutil.copyfile(checkout / "picture.png", checkout / "notebooks" / "images" / "likes.png")
    shown, texts = {}, ("<dkto.widgets.explorer.Explorer object at 0x1>", "Likes(x=1)", "<toy.Other object at 0x1>")
    for text in texts:
        output = new_output("display_data", {"text/plain": text})
        shown[text] = site._touchable(output, checkout)["data"]
    explorer, likes, other = shown.values()
    assert "standalone({" in explorer["text/html"]
    assert base64.b64decode(likes["image/png"]) == (checkout / "picture.png").read_bytes()
    assert other == {"text/plain": "<toy.Other object at 0x1>"}


@pytest.mark.browser
def test_instruments_of_a_page_from_disk_work_without_a_kernel(checkout, small_playground, tmp_path, browser):
    path = checkout / "papermill_runs" / "reference" / "10_first" / "notebook.ipynb"
    notebook = nbformat.read(path, as_version=4)
    for name in ("Explorer", "Playground"):
        output = new_output("display_data", {"text/plain": f"{name}()"})
        notebook.cells.append(new_code_cell("display(it)", outputs=[output], execution_count=2))
    nbformat.write(notebook, path)
    index = build_site(tmp_path / "site", root=checkout)
    page, said = browser.new_page(), []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto((index.parent / "lessons" / "10_first.html").as_uri())
    explorer, playground = page.locator(".dkto-explorer"), page.locator(".dkto-playground")

    def drawn():
        return explorer.locator(".dkto-panels canvas").nth(3).evaluate("canvas => canvas.toDataURL()")

    before = drawn()
    explorer.locator("[data-setting=beta]").press("ArrowRight")
    assert drawn() != before
    explorer.locator(".dkto-formula").fill("tanh(x / 3)")
    explorer.get_by_role("button", name="Draw", exact=True).click()
    assert explorer.locator("select").input_value() == "mine"
    explorer.locator(".dkto-formula").fill("-x")
    explorer.get_by_role("button", name="Draw", exact=True).click()
    assert "must be increasing" in explorer.locator("[role=alert]").text_content()
    assert explorer.locator("input[type=file]").is_disabled()
    playground.locator("[data-setting=method]").select_option("dpo")
    assert playground.get_attribute("data-key") == "dpo beta=10 flip=0"
    assert "% of 40 samples lie nearer" in playground.locator("[role=status]").text_content()
    assert playground.get_by_role("button", name="Train it now").is_disabled()
    assert "open lesson 64 on your machine" in playground.inner_text()
    page.close()
    assert said == []


def test_wrong_links_and_foreign_files_are_found(tmp_path):
    (tmp_path / "a.html").write_text(
        '<link rel="stylesheet" href="https://cdn.example.org/x.css"><script src="//cdn.example.org/y.js"></script>'
        '<p id="here"><a href="#here"></a><a href="#there"></a><a href="b.html"></a><a href="c.html#x"></a>'
        '<a href="https://example.org"></a><img src="none.png"><a href="d%20e.html"></a>'
    )
    (tmp_path / "c.html").write_text(f"<p id=y>default={Path.home()}/runs <p>{ROOT}/dkto")
    (tmp_path / "d e.html").write_text("")
    (tmp_path / "style.css").write_text("@import url(https://fonts.example.org/a.css);")
    assert check_pages(tmp_path) == [
        "a.html fetches https://cdn.example.org/x.css",
        "a.html fetches //cdn.example.org/y.js",
        "a.html links to #there, which has no such place",
        "a.html links to b.html, which does not exist",
        "a.html links to c.html#x, which has no such place",
        "a.html links to none.png, which does not exist",
        f"c.html holds {ROOT}/, a place of this machine",
        f"c.html holds {Path.home()}/, a place of this machine",
        "style.css fetches from another site",
    ]


def test_formulas_become_mathml_and_an_unknown_one_is_named():
    assert mathml(r"\mathcal{L} = \big(1 - U(w\,r)\big)", display=True).count("<mi") >= 4
    with pytest.raises(ValueError, match=r"formula '\\\\nosuch' cannot be shown"):
        mathml(r"\nosuch", display=False)


def test_every_formula_of_the_lessons_can_be_shown():
    count = 0
    for path in sorted((ROOT / "notebooks").rglob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "markdown":
                text = "".join(cell["source"])
                for formula in re.findall(r"\$\$(.+?)\$\$|(?<!\$)\$([^$\n]+?)\$(?!\$)", text, re.S):
                    mathml("".join(formula), display=False)
                    count += 1
    assert count > 20


def test_a_docstring_keeps_its_formulas_and_doctests():
    lines = ["A |g| of x_ and `a*b`:", "", "    r = a * b", "    s = |r|", "", ">>> f(1) * 2", "2"]
    assert literal_formulas(lines) == [
        r"A \|g\| of x\_ and `a*b`:", "", "::", "", "    r = a * b", "    s = |r|", "", ">>> f(1) * 2", "2",
    ]  # fmt: skip
