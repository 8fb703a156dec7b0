import numpy as np
import pandas as pd
import pytest

from dkto.widgets import Explorer

ATTACK = "<img src=x onerror=alert(1)>"


@pytest.fixture(scope="module")
def page(lab, tmp_path_factory):
    name = lab.write("60_explore_utilities", output_dir=str(tmp_path_factory.mktemp("explore")))
    page = lab.open(name)
    lab.run_all(page)
    page.wait_for_selector(".dkto-explorer canvas")
    yield page
    page.close()


def pixels(page, label):
    return page.locator(f".dkto-explorer canvas[aria-label*='{label}']").first.evaluate("canvas => canvas.toDataURL()")


MOVED = """slider => {
  const shown = () => document.querySelector(".dkto-explorer canvas[aria-label*='Weight of a liked']").toDataURL();
  const before = shown();
  slider.stepUp(5);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
  return shown() !== before;
}"""


@pytest.mark.chromium
def test_a_slider_moves_the_curve_without_waiting_for_python(page, picture, until):
    """The canvas has changed before the event is over: no answer of a kernel can have come in between."""
    slider = page.locator(".dkto-explorer input[data-setting='reference_point']").first
    slider.scroll_into_view_if_needed()
    assert slider.evaluate(MOVED)
    before, value = pixels(page, "Weight of a liked"), float(slider.input_value())
    slider.focus()
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    assert float(slider.input_value()) == pytest.approx(value + 0.5)
    assert pixels(page, "Weight of a liked") != before
    page.evaluate("performance.clearMeasures('dkto-explorer')")
    for key in ["ArrowRight"] * 40 + ["ArrowLeft"] * 40:
        page.keyboard.press(key)
    until(page, "performance.getEntriesByName('dkto-explorer').length >= 80")  # every key draws
    picture(page.locator(".dkto-explorer").first, "explorer")


@pytest.mark.chromium
def test_the_browser_draws_the_curves_that_python_computes(page):
    select = page.locator(".dkto-explorer select").first
    for utility in ("risk_seeking", "mine", "loss_averse"):
        select.select_option(utility)
        with page.expect_download() as download:
            page.locator(".dkto-explorer button:text-is('Save curves (CSV)')").first.click()
        drawn = pd.read_csv(download.value.path())
        settings = {
            name: float(
                page.locator(f".dkto-explorer input[data-setting='{name}']").first.evaluate(
                    "i => i.parentElement.querySelector('output').textContent"
                )
            )
            for name in ("reference_point", "desirable_weight", "undesirable_weight", "desirable_fraction")
        }
        explorer = Explorer(**settings)
        explorer.define("mine", "tanh(x/2)")
        explorer.utility = utility
        computed = explorer.curves_table()
        assert list(drawn.columns) == list(computed.columns)
        np.testing.assert_allclose(drawn.to_numpy(), computed.to_numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.chromium
def test_a_formula_is_drawn_at_once_and_a_refusal_is_a_sentence(page, until):
    name, formula = page.locator(".dkto-own input").all()[:2]
    formula.fill("2*tanh(x/3)")
    name.fill("gentle")
    formula.press("Enter")
    page.wait_for_selector(".dkto-explorer option[value='gentle']", state="attached")
    assert page.locator(".dkto-explorer select").first.input_value() == "gentle"
    for bad, sentence in (
        ("9**9**9*x", "exponent of a power"),
        ("__import__('os')", "unknown name '__import__'"),
        (ATTACK, ATTACK),
    ):
        formula.fill(bad)
        formula.press("Enter")
        until(page, "s => document.querySelector('.dkto-explorer .dkto-alert').textContent.includes(s)", sentence)
    assert page.locator(".dkto-explorer img").count() == 0 and page.alerts == []


@pytest.mark.chromium
def test_uploaded_rewards_are_shown_and_bad_ones_refused(page, until, tmp_path):
    path = tmp_path / f"{ATTACK.replace('/', '')}.csv"
    path.write_text("reward,liked\n" + "2.5,like\n-2.5,dislike\n" * 30)
    chooser = page.locator(".dkto-explorer input[type='file']").first
    chooser.set_input_files(path)
    until(page, "() => document.querySelector('.dkto-explorer [role=status]').textContent.includes('of 30')")
    bad = tmp_path / "bad.csv"
    bad.write_text("reward,liked\nmuch,like\n")
    chooser.set_input_files(bad)
    page.wait_for_selector(".dkto-explorer .dkto-alert:has-text('bad.csv, row 1: reward must be a number')")
    assert page.alerts == []


@pytest.mark.chromium
def test_every_control_has_a_name_and_nothing_runs_out_of_the_window_at_200_percent(page, accessible):
    accessible(page, ".dkto-explorer")
