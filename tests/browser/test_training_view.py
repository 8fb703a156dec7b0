import pytest


@pytest.mark.browser
@pytest.mark.slow
def test_the_page_stays_alive_while_a_training_runs_and_stops_it_at_a_checkpoint(
    lab, until, picture, accessible, tmp_path
):
    settings = {"max_train_steps": 400, "checkpoint_every": 10, "sample_prompts": 3, "output_dir": str(tmp_path)}
    page = lab.open(lab.write("63_watch_training", **settings))
    lab.run_all(page)
    view = page.locator(".dkto-training").first
    view.scroll_into_view_if_needed()
    page.locator(".dkto-training button:text-is('Start training')").click()
    until(page, "() => Number(document.querySelector('.dkto-training').dataset.updates) >= 3", seconds=240)
    until(page, "() => document.querySelectorAll('.dkto-training td img').length >= 3", seconds=240)
    page.locator(".jp-Notebook .jp-CodeCell").nth(0).click()
    picture(view, "training_view")
    accessible(page, ".dkto-training")
    page.locator(".dkto-training button:text-is('Stop at a checkpoint')").click()
    until(page, "() => document.querySelector('.dkto-training').dataset.state === 'stopped'", seconds=180)
    checkpoints = sorted(path.name for path in (tmp_path / "run").glob("checkpoint-*"))
    step = int(view.locator("[role=status]").text_content().split("step ")[1].split(" ")[0])
    assert checkpoints[-1] == f"checkpoint-{step:08d}" and step < 400
    assert page.locator(".dkto-training button:text-is('Start training')").is_enabled()
    page.close()
