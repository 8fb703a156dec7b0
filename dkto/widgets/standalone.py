"""An instrument as a piece of a web page that runs without a kernel: its state is in the page, training is greyed."""

import base64
import json

from matplotlib.figure import Figure

from dkto.widgets.base import FOLDER, Instrument, figure_bytes

SCRIPTS = ("formula", "standalone")  # beside the instrument's own
OF_IPYWIDGETS = ("layout", "tabbable", "tooltip")


def standalone_html(instrument: Instrument, reason: str, figure: Figure) -> str:
    """HTML that draws an instrument as it is now and lets a reader move it; nothing is fetched.

    Args:
        instrument: one whose page draws by itself, an `Explorer` or a `Playground`.
        reason: a sentence that says why what needs Python is greyed.
        figure: shown where scripts do not run.
    """
    names = [name for name in instrument.keys if not name.startswith("_") and name not in OF_IPYWIDGETS]
    state = {name: getattr(instrument, name) for name in names} | {"alone": reason}
    text = json.dumps(state, default=_packed).replace("</", "<\\/")
    parts = [str(instrument._esm), *((FOLDER / f"{name}.js").read_text(encoding="utf-8") for name in SCRIPTS)]
    still = f"data:image/png;base64,{base64.b64encode(figure_bytes(figure)).decode()}"
    script = "\n".join([*parts, f"standalone({text});"])
    return (
        f'<div class="dkto-alone"><noscript><img alt="the instrument as a figure" src="{still}"></noscript>'
        f'<style>{instrument._css}</style><script type="module">{script}</script></div>'
    )


def _packed(data: bytes | memoryview) -> dict[str, str]:
    return {"base64": base64.b64encode(data).decode()}
