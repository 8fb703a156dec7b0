import pytest

SAMPLES = "() => document.querySelector('.dkto-playground canvas').toDataURL()"


@pytest.mark.browser
def test_settings_and_dragged_gaussians_move_the_cloud(lab, until, picture, accessible, tmp_path):
    page = lab.open(lab.write("64_toy_playground", output_dir=str(tmp_path)))
    lab.run_all(page)
    page.wait_for_selector(".dkto-playground canvas")
    root = page.locator(".dkto-playground").first
    root.scroll_into_view_if_needed()
    page.locator(".dkto-playground button:text-is('Put the Gaussians back')").click()
    until(page, "() => document.querySelector('.dkto-playground [role=status]').textContent.includes('samples lie')")
    before = page.evaluate(SAMPLES)
    page.locator(".dkto-playground select[data-setting='method']").select_option("dpo")
    until(page, "() => document.querySelector('.dkto-playground').dataset.key.startsWith('dpo beta=10')")
    until(page, f"before => ({SAMPLES})() !== before", before)
    page.locator(".dkto-playground select[data-setting='method']").select_option("kahneman_tversky")
    handle = page.locator(".dkto-playground [data-role='desirable']")
    box = handle.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.down()
    page.mouse.move(box["x"] + 110, box["y"] - 60, steps=5)
    page.mouse.up()
    assert "Gaussians were moved" in root.locator("[role=status]").text_content()
    label = handle.get_attribute("aria-label")
    handle.focus()
    page.keyboard.press("ArrowUp")
    assert handle.get_attribute("aria-label") != label
    frames = int(root.get_attribute("data-frames") or 0)
    page.locator(".dkto-playground button:text-is('Train it now')").click()
    until(page, "n => Number(document.querySelector('.dkto-playground').dataset.frames) >= n", frames + 6)
    assert root.get_attribute("data-step") == "600" and "trained now" in root.locator("[role=status]").text_content()
    page.wait_for_timeout(600)
    picture(root, "playground")
    accessible(page, ".dkto-playground")
    page.close()
