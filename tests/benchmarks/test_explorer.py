"""How soon the explorer's slider moves its curves in a browser, beside Python drawing the same figure. No bound."""

import io
import statistics
import timeit

import matplotlib.pyplot as plt
import numpy as np
import pytest
from browser.conftest import lab, until  # noqa: F401

from dkto.widgets import Explorer

from .measures import interval

KEYS = ["ArrowRight"] * 40 + ["ArrowLeft"] * 40


def drawn_by_python(reference_point):
    figure = Explorer(reference_point=reference_point).figure()
    figure.savefig(io.BytesIO(), format="png")
    plt.close(figure)


@pytest.mark.chromium
def test_slider_over_python(lab, record_ratio, tmp_path):  # noqa: F811
    page = lab.open(lab.write("60_explore_utilities", output_dir=str(tmp_path)))
    lab.run_all(page)
    page.wait_for_selector(".dkto-explorer canvas")
    slider = page.locator(".dkto-explorer input[data-setting='reference_point']").first
    slider.scroll_into_view_if_needed()
    slider.focus()
    page.evaluate("performance.clearMeasures('dkto-explorer')")
    for key in KEYS:
        page.keyboard.press(key)
        page.wait_for_timeout(25)  # as fast as a held key repeats
    until(page, f"performance.getEntriesByName('dkto-explorer').length >= {len(KEYS)}")
    times = page.evaluate("performance.getEntriesByName('dkto-explorer').map(entry => entry.duration)")
    value = float(slider.input_value())
    in_python = statistics.median(timeit.repeat(lambda: drawn_by_python(value), number=1, repeat=5)) * 1000
    late = {"browser_ms": statistics.median(times), "browser_late_ms": float(np.quantile(times, 0.95))}
    record_ratio("slider_over_python", **interval(np.array(times) / in_python), python_ms=in_python, **late)
    page.close()
