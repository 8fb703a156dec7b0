"""Blind judging of two systems, the paper's user study in a notebook (paper 5.1.2, A.2, Fig. 3)."""

from pathlib import Path

import traitlets
from matplotlib.figure import Figure

from dkto.data.images import load_image
from dkto.evaluation.study import StudySession
from dkto.evaluation.study_answers import StudyResult, study_result
from dkto.plotting import plot_preferences
from dkto.widgets.base import Instrument, figure_bytes, png_bytes, script, style


class Judge(Instrument):
    """Two images of a prompt, left and right as the study drew them; the page never learns which is whose.

    Keys, while the widget has the focus: the arrows choose, z takes the last answer back. The result, with
    the names of the methods, is sent to the page only when every question is answered.

    Arguments and errors are those of `dkto.evaluation.study.StudySession`; a judge goes on where they stopped.
    """

    _esm = script("judge")
    _css = style("judge")
    _refused = "not kept: "

    question = traitlets.Unicode().tag(sync=True)
    number = traitlets.Int(-1).tag(sync=True)
    answered = traitlets.Int(0).tag(sync=True)
    total = traitlets.Int(0).tag(sync=True)
    prompt = traitlets.Unicode().tag(sync=True)
    left = traitlets.Bytes().tag(sync=True)
    right = traitlets.Bytes().tag(sync=True)
    result = traitlets.Dict().tag(sync=True)  # text, rows, chart (bytes); empty until the end

    def __init__(self, study_dir: str | Path, judge: str) -> None:
        self.session = StudySession(study_dir, judge)
        self._study_dir = Path(study_dir)
        super().__init__(question=self.session.question, total=len(self.session.plan["order"]))
        self._show()

    def answer(self, side: str) -> None:
        """Prefer the left or the right image of the pair that is shown."""
        self.session.answer(self.number, side)
        self._show()

    def undo(self) -> None:
        """Take the last answer back; a ValueError after the last question, when the names are shown."""
        self.session.undo()
        self._show()

    def study_result(self) -> StudyResult:
        """The answers of all judges of this study so far; raises a ValueError if there is none."""
        return study_result(self._study_dir)

    def figure(self) -> Figure:
        """The bar chart of Figure 3 with intervals."""
        result = self.study_result()
        return plot_preferences([(*result.methods, result.by_prompt)]).figure

    def _show(self) -> None:
        """The next pair, or the result; where it cannot be shown an empty page and a sentence, never another pair."""
        pair, result, pictures, self.message = self.session.next(), {}, (b"", b""), ""
        try:
            if pair is None:
                result = self._result()
            else:
                pictures = tuple(png_bytes(load_image(path)) for path in (pair.left, pair.right))
        except (ValueError, OSError) as trouble:
            what = "the result" if pair is None else "the next pair"
            pair, self.message = None, f"all answers are kept, but {what} cannot be shown: {trouble}"
        with self.hold_sync():
            self.answered, self.result = len(self.session.answers), result
            self.number, self.prompt = (-1, "") if pair is None else (int(pair.number), pair.prompt)
            self.left, self.right = pictures

    def _result(self) -> dict:
        found = self.study_result()
        rows = [("all prompts", found.by_prompt), *found.styles.items()]
        cells = [[name, f"{rate.rate:.0%}", f"{rate.low:.0%} to {rate.high:.0%}", str(rate.n)] for name, rate in rows]
        head = ["", f"{found.methods[0]} preferred", "95 % interval", "prompts"]
        text = f"{found}; left was chosen in {found.left.mean:.0%} of the answers"
        return {"text": text, "head": head, "rows": cells, "chart": figure_bytes(self.figure())}

    def _obey(self, message: dict) -> None:
        if message.get("type") == "undo":
            self.undo()
        elif message.get("type") == "answer" and message.get("number") == self.number:
            self.answer(str(message.get("side")))  # a key that was pressed twice answers once
