"""The judges' answers of a user study: unblinded, win-rate with interval, agreement (paper 5.1.2, Fig. 3).

Win-rates have an interval over prompts: these judges, other prompts. That of `votes` is over prompts
and judges both, so it is the one to quote for people who were not asked.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from dkto.evaluation.metrics import MeanDifference, WinRate, wilson_interval, win_rate
from dkto.evaluation.study import StudySession, read_key, read_questions


def read_answers(study_dir: str | Path) -> pd.DataFrame:
    """Answers that count, unblinded: judge, question, prompt, style, side, chosen, ours (whether ours was chosen)."""
    folder = Path(study_dir)
    about, key = read_questions(folder), read_key(folder)
    rows = []
    for judge, plan in about["judges"].items():
        for number, side in sorted(StudySession(folder, judge).answers.items()):
            left_is_ours = (plan["left"][number] == "a") == key["a_is_ours"][number]
            ours = (side == "left") == left_is_ours
            asked = {"prompt": about["prompts"][number], "style": about["styles"][number]}
            chosen = key["methods"][0 if ours else 1]
            rows.append({"judge": judge, "question": number, **asked, "side": side, "chosen": chosen, "ours": ours})
    return pd.DataFrame(rows, columns=["judge", "question", "prompt", "style", "side", "chosen", "ours"])


@dataclass(frozen=True)
class StudyResult:
    """What the judges said.

    Attributes:
        methods: ours and theirs.
        by_prompt: share of prompts whose majority of judges prefers ours, ties half.
        votes: share of a prompt's answers that are for ours, mean over prompts, see `votes_interval`.
        styles, judges: win-rate by style (majority) and by judge (answers).
        left: share of answers that were "left", with its interval: far from one half, judges looked at sides.
        alpha: Krippendorff's alpha between judges (1 agreement, 0 chance); None if fewer than two judged one
            prompt, or all answers are for one method.
        answered, asked: answers given and planned.
    """

    methods: tuple[str, str]
    by_prompt: WinRate
    votes: MeanDifference
    styles: dict[str, WinRate]
    judges: dict[str, WinRate]
    left: MeanDifference
    alpha: float | None
    answered: int
    asked: int

    def __str__(self) -> str:
        agreement = "not defined" if self.alpha is None else f"{self.alpha:.2f}"
        alone = len(self.judges) == 1
        return (
            f"{self.methods[0]} is preferred to {self.methods[1]} on {self.by_prompt} by "
            f"{'this judge' if alone else 'these judges'}; {self.answered} of {self.asked} answers"
            + ("" if alone else f" by {len(self.judges)} judges, Krippendorff's alpha {agreement}")
        )

    def to_metrics(self) -> dict[str, float]:
        """Flat keys `study/<ours>_vs_<theirs>` with /low, /high, /n, /votes and its ends, /alpha and by style."""
        key = f"study/{self.methods[0]}_vs_{self.methods[1]}"
        found = {
            f"{key}/votes": self.votes.mean,
            f"{key}/votes/low": self.votes.low,
            f"{key}/votes/high": self.votes.high,
        }
        found |= {f"{key}/left": self.left.mean, f"{key}/answers": self.answered}
        for name, result in {key: self.by_prompt, **{f"{key}/{s}": r for s, r in self.styles.items()}}.items():
            found |= {name: result.rate, f"{name}/low": result.low, f"{name}/high": result.high, f"{name}/n": result.n}
        return found if self.alpha is None else {**found, f"{key}/alpha": self.alpha}


def study_result(study_dir: str | Path) -> StudyResult:
    """Count a study's answers, of which there must be one; unfinished judges count with what they have answered."""
    folder = Path(study_dir)
    about, key = read_questions(folder), read_key(folder)
    answers = read_answers(folder)
    if answers.empty:
        raise ValueError(f"{folder} has no answer yet")
    for_ours = answers.groupby("question")["ours"].sum()
    for_theirs = answers.groupby("question")["ours"].count() - for_ours
    style = answers.groupby("question")["style"].first()
    lefts, n = int((answers["side"] == "left").sum()), len(answers)
    return StudyResult(
        methods=tuple(key["methods"]),
        by_prompt=win_rate(for_ours, for_theirs),
        votes=votes_interval(answers),
        styles={s: win_rate(for_ours[style == s], for_theirs[style == s]) for s in dict.fromkeys(style) if s},
        judges={j: win_rate(group, ~group) for j, group in answers.groupby("judge")["ours"]},
        left=MeanDifference(lefts / n, *wilson_interval(lefts, n)),
        alpha=judge_agreement(answers),
        answered=n,
        asked=sum(len(plan["order"]) for plan in about["judges"].values()),
    )


def votes_interval(answers: pd.DataFrame, *, resamples: int = 2000, seed: int = 0) -> MeanDifference:
    """Share of a prompt's answers that are for ours, mean over prompts, with a 95 % bootstrap interval.

    Prompts and judges are both drawn again, each independently of the other. A single judge is drawn every time: then
    the interval holds for that judge alone. With a single prompt the interval is everything.

    Args:
        answers: those of `read_answers`.
        resamples, seed: of the bootstrap.

    >>> votes_interval(pd.DataFrame({"judge": list("abab"), "question": [0, 0, 1, 1], "ours": [True, False] * 2}))
    MeanDifference(mean=0.5, low=0.0, high=1.0)
    """
    table = answers.pivot(index="judge", columns="question", values="ours").to_numpy(dtype=np.float64)
    given = ~np.isnan(table)  # (judges, prompts)
    rng = np.random.default_rng(seed)
    judges, prompts = (rng.multinomial(size, np.full(size, 1 / size), resamples) for size in table.shape)
    judges, prompts = (np.vstack([np.ones(len(drawn[0]), int), drawn]) for drawn in (judges, prompts))  # first as it is
    count = judges @ given  # (1 + resamples, prompts) answers
    share = judges @ np.where(given, table, 0.0) / np.maximum(count, 1)
    weight = prompts * (count > 0)  # a prompt whose judges were not drawn has no share
    found = (weight * share).sum(1)[weight.any(1)] / weight.sum(1)[weight.any(1)]
    ends = np.quantile(found[1:], [0.025, 0.975]) if table.shape[1] > 1 else (0.0, 1.0)
    return MeanDifference(float(found[0]), float(ends[0]), float(ends[1]))


def judge_agreement(answers: pd.DataFrame) -> float | None:
    """Krippendorff's alpha of who was chosen (nominal), over the prompts that at least two judges answered.

    It is 1 for full agreement and 0 for chance; None where it is not defined. `answers` are those of `read_answers`.
    """
    try:
        import krippendorff
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("agreement between judges needs the package krippendorff: pip install it") from error
    table = answers.pivot(index="judge", columns="question", values="ours").astype(float)
    shared = table.loc[:, table.notna().sum() >= 2]
    if shared.empty or np.nanmin(shared.to_numpy()) == np.nanmax(shared.to_numpy()):
        return None
    return float(krippendorff.alpha(reliability_data=shared.to_numpy(), level_of_measurement="nominal"))
