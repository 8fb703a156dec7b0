"""Ten likes and dislikes, one undone, the page reloaded, and a real training at the press of a button."""

import json

import pytest
from safetensors.torch import load_file

ATTACK = "<img src=x onerror=alert(1)>"

ROWS = """() => {
  const data = (image) => {
    const canvas = document.createElement("canvas");
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext("2d").drawImage(image, 0, 0);
    return canvas.toDataURL();
  };
  const rows = [...document.querySelectorAll(".dkto-training tr")];
  return ["before", "after"].map((name) => {
    const row = rows.find((one) => one.querySelector("th")?.textContent === name);
    return [...row.querySelectorAll("img")].map(data).join();
  });
}"""
AFTER_IS_SHOWN = """() => [...document.querySelectorAll(".dkto-training th[scope=row]")]
  .some((cell) => cell.textContent === "after")"""
BOTH_ARE_SHOWN = """() => document.querySelectorAll(".dkto-likes").length === 2
  && !!document.querySelector(".dkto-training table")"""


def status(page):
    return page.locator(".dkto-likes [role=status]").first.text_content()


def press(page, until, key, expected):
    page.keyboard.press(key)
    until(page, "t => document.querySelector('.dkto-likes [role=status]').textContent.startsWith(t)", expected)


@pytest.mark.browser
@pytest.mark.slow
def test_like_by_keyboard_reload_go_on_and_tune(lab, until, picture, accessible, tmp_path):
    settings = {
        "pictures": 14,
        "held_out_prompts": 8,
        "sample_steps": 6,
        "least_of_each": 4,
        "output_dir": str(tmp_path),
    }
    name = lab.write("61_teach_by_likes", **settings)
    page = lab.open(name)
    lab.run_all(page)
    stage = page.locator(".dkto-likes .dkto-stage").first
    stage.scroll_into_view_if_needed()
    stage.focus()
    for number in range(1, 11):
        press(page, until, "ArrowRight" if number % 2 else "ArrowLeft", f"seen {number} of 14")
    assert "liked 5, disliked 5" in status(page)
    assert page.locator(".dkto-likes").first.locator(".dkto-strip img").count() == 10
    press(page, until, "z", "seen 9 of 14, liked 5, disliked 4")
    picture(page.locator(".dkto-likes").first, "likes")
    accessible(page, ".dkto-likes")
    page.reload()
    lab.wait_for_kernel(page)
    lab.run_all(page)
    until(page, "() => !!document.querySelector('.dkto-likes [role=status]')")
    assert status(page).startswith("seen 9 of 14, liked 5, disliked 4")
    page.locator(".dkto-likes .dkto-stage").first.focus()
    press(page, until, " ", "seen 10 of 14, liked 5, disliked 4, skipped 1")
    press(page, until, "ArrowLeft", "seen 11 of 14")
    lines = [json.loads(line) for line in (tmp_path / "likes.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines].count("undo") == 1 and len(lines) == 13

    training = page.locator(".dkto-training").first
    training.scroll_into_view_if_needed()
    page.locator(".dkto-training button:text-is('Tune on these likes')").first.click()
    seen = set()

    def finished():
        state = training.evaluate("node => [node.dataset.state, node.dataset.updates, node.textContent]")
        seen.add(state[1])
        assert state[0] != "failed", state[2]
        return state[0] == "finished"

    for _ in range(6000):
        if finished():
            break
        page.wait_for_timeout(100)
    assert finished() and len(seen - {"0"}) >= 3, "at least three updates of the plots"
    until(page, AFTER_IS_SHOWN)
    weights = load_file(tmp_path / "run-01" / "lora" / "pytorch_lora_weights.safetensors")
    assert any(value.abs().sum() > 0 for key, value in weights.items() if "lora_B" in key)
    before, after = page.evaluate(ROWS)
    assert before != after and len(before) > 1000
    tile = page.locator(".dkto-swap").first
    assert tile.locator("b").text_content() == "after "
    tile.hover()
    until(page, "() => document.querySelector('.dkto-swap b').textContent === 'before '")
    until(page, "() => document.querySelector('.dkto-swap b').textContent === 'after '")
    page.mouse.move(0, 0)
    judge = page.locator(".dkto-judge").first
    judge.scroll_into_view_if_needed()
    for number in range(1, 11):
        judge.locator("[role=group]").focus()
        page.keyboard.press("ArrowLeft")
        until(
            page, f"() => document.querySelector('.dkto-judge [role=status]').textContent === '{number} of 10 answered'"
        )
    until(page, "() => !!document.querySelector('.dkto-judge .dkto-result table')")
    assert "after is preferred to before on" in judge.text_content() and "n=10 by this judge" in judge.text_content()
    picture(training, "tuning")
    accessible(page, ".dkto-training")
    assert page.alerts == []
    page.close()


MARKUP = """
from pathlib import Path
import numpy as np
from PIL import Image
from dkto.training.config import TrainConfig
from dkto.widgets import Likes, TrainingView
from dkto.widgets.base import png_bytes
from dkto.widgets.likelog import Picture
folder = Path(output_dir)
folder.mkdir(parents=True, exist_ok=True)
attack = "<img src=x onerror=alert(1)>"
for number in range(3):
    Image.fromarray(np.full((32, 32, 3), 60 * number, np.uint8)).save(folder / f"{number}.png")
pool = [Picture(folder / f"{number}.png", attack) for number in range(3)]
single, grid = (Likes(pool, folder / f"{view}.jsonl", view=view) for view in ("single", "grid"))
view = TrainingView(TrainConfig(folder, folder / "run"), [attack])
view.samples = [{"label": attack, "images": [png_bytes(Image.new("RGB", (8, 8)))]}]
view.message = view.result = attack
"""


@pytest.mark.browser
def test_a_prompt_with_markup_is_text_in_single_view_grid_and_table(lab, until, tmp_path):
    import nbformat

    cells = [MARKUP.replace("output_dir", repr(str(tmp_path))), "single", "grid", "view"]
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}},
        cells=[nbformat.v4.new_code_cell(source) for source in cells],
    )
    page = lab.open(lab.write("markup", notebook))
    lab.run_all(page)
    until(page, BOTH_ARE_SHOWN)
    texts = page.locator(".dkto-prompt").all_text_contents()
    assert len(texts) == 5 and set(texts) == {ATTACK}
    assert page.locator(".dkto-training .dkto-alert").text_content() == ATTACK
    assert page.locator("img[src='x']").count() == 0 and page.alerts == []
    tile = page.locator(".dkto-tile").first
    tile.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowRight")
    until(page, "() => document.querySelectorAll('.dkto-tile')[1].dataset.judgement === 'like'")
    page.close()
