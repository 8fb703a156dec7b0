import shutil
from pathlib import Path

import nbformat
import pandas as pd
import pytest

from dkto.common.files import write_json
from dkto.evaluation.study import make_study
from dkto.evaluation.study_answers import study_result

NOTEBOOKS = Path(__file__).parent.parent.parent / "notebooks"
ATTACK = "<img src=x onerror=alert(1)>"

BRIGHTER = """() => {
  const level = (image) => {
    const canvas = document.createElement("canvas");
    canvas.width = canvas.height = 1;
    const context = canvas.getContext("2d");
    context.drawImage(image, 0, 0, 1, 1);
    return context.getImageData(0, 0, 1, 1).data[0];
  };
  const [left, right] = [...document.querySelectorAll(".dkto-judge .dkto-pair img")].map(level);
  return left > right ? "ArrowLeft" : "ArrowRight";
}"""


@pytest.fixture
def study(tmp_path):
    """The example likes: seen through a red filter they are ours, as drawn they are theirs; one prompt is markup."""
    table = pd.read_csv(NOTEBOOKS / "likes" / "likes.csv")
    prompts = [*table["prompt"].drop_duplicates()[:4], ATTACK]
    folders = {}
    for name, suffix in (("tuned_on_red", "-red"), ("as_drawn", "")):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        about = {"system": {}, "prompts": prompts, "images_per_prompt": 1, "seed": 0}
        write_json(folders[name] / "manifest.json", about)
        for number in range(5):
            shutil.copy(NOTEBOOKS / "likes" / f"{number:02d}{suffix}.png", folders[name] / f"p{number:05d}-s0.png")
    return make_study(folders, tmp_path / "study", ["ann"], ["plain"] * 5, per_style=5)


@pytest.mark.browser
def test_five_pairs_are_judged_blind_by_keyboard_and_the_result_appears(lab, until, picture, accessible, study):
    source = f"from dkto.widgets import Judge\nJudge({str(study)!r}, 'ann')"
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3 (ipykernel)"}},
        cells=[nbformat.v4.new_code_cell(source)],
    )
    page = lab.open(lab.write("judging", notebook))
    lab.run_all(page)
    page.wait_for_selector(".dkto-judge img")
    page.locator(".dkto-judge [tabindex='0']").focus()
    assert "tuned_on_red" not in page.content()
    prompts = set()
    counted = "n => document.querySelector('.dkto-judge [role=status]').textContent === `${n} of 5 answered`"
    for number in range(1, 6):
        prompts.add(page.locator(".dkto-judge .dkto-prompt").text_content())
        brighter = page.evaluate(BRIGHTER)
        page.keyboard.press(brighter)
        until(page, counted, number)
        if number < 5:
            until(page, "() => [...document.querySelectorAll('.dkto-judge .dkto-pair img')].every(i => i.complete)")
        if number == 3:
            picture(page.locator(".dkto-judge"), "judge")
            accessible(page, ".dkto-judge")
            page.locator(".dkto-judge [tabindex='0']").focus()
            page.keyboard.press("z")
            until(page, counted, 2)
            page.keyboard.press(brighter)
            until(page, counted, 3)
        if number < 5:
            assert "tuned_on_red" not in page.content()
    assert ATTACK in prompts and len(prompts) == 5
    page.wait_for_selector(".dkto-judge table")
    assert "tuned_on_red is preferred to as_drawn" in page.locator(".dkto-judge .dkto-result").text_content()
    picture(page.locator(".dkto-judge"), "judge_result")
    accessible(page, ".dkto-judge")
    assert study_result(study).answered == 5 and page.alerts == []
    page.close()
