import krippendorff
import numpy as np
import pandas as pd
import pytest
from tiny_study import PROMPT_STYLES, draw_folders, finish, is_ours

from dkto.evaluation.metrics import win_rate
from dkto.evaluation.study import StudySession, make_study
from dkto.evaluation.study_answers import judge_agreement, read_answers, study_result, votes_interval


@pytest.fixture
def study(tmp_path):
    """Five prompts of each style for three judges."""
    return make_study(draw_folders(tmp_path), tmp_path / "study", ["ann", "bob", "cid"], PROMPT_STYLES, per_style=5)


def test_the_result_counts_prompts_by_majority_with_its_interval(study):
    for judge, prefers in (("ann", lambda pair: True), ("bob", lambda pair: True), ("cid", lambda pair: False)):
        finish(StudySession(study, judge), prefers)
    result = study_result(study)
    assert result.by_prompt == win_rate(np.ones(20), np.zeros(20)) and result.methods == ("kto", "base")
    assert result.votes.mean == pytest.approx(2 / 3) and (result.answered, result.asked) == (60, 60)
    assert result.judges["cid"].rate == 0.0 and result.styles["photo"].n == 5
    assert result.left.low < 0.5 < result.left.high
    assert str(result).startswith(
        "kto is preferred to base on 100 % [84, 100] n=20 by these judges; 60 of 60 answers by 3 judges"
    )
    metrics = result.to_metrics()
    assert metrics["study/kto_vs_base"] == 1.0 and metrics["study/kto_vs_base/n"] == 20
    votes = (metrics[f"study/kto_vs_base/votes{end}"] for end in ("/low", "", "/high"))
    assert [round(value, 2) for value in votes] == [0.0, 0.67, 1.0], "three judges, one of whom disagrees always"
    assert metrics["study/kto_vs_base/anime/n"] == 5 and metrics["study/kto_vs_base/alpha"] == result.alpha
    answers = read_answers(study)
    assert set(answers["chosen"]) == {"kto", "base"} and len(answers) == 60


def test_prompts_without_styles_have_no_row_of_a_style(tmp_path):
    study = make_study(draw_folders(tmp_path), tmp_path / "study", ["ann"], [""] * 24, per_style=5)
    finish(StudySession(study, "ann"), lambda pair: True)
    found = study_result(study)
    assert found.styles == {} and found.by_prompt.n == 5
    assert not [key for key in found.to_metrics() if "//" in key or key.endswith("/")]


def test_split_judges_tie_and_unfinished_ones_count_with_what_they_said(study):
    finish(StudySession(study, "ann"), lambda pair: True)
    session = StudySession(study, "bob")
    for _ in range(6):
        pair = session.next()
        session.answer(pair.number, "right" if is_ours(pair.left) else "left")
    result = study_result(study)
    assert (result.by_prompt.ties, result.by_prompt.wins, result.answered, result.asked) == (6, 14, 26, 60)


def test_judges_are_drawn_again_as_well_as_prompts():
    """Two judges of opposite taste: over prompts alone the interval would have no width."""
    rows = [{"judge": judge, "question": q, "ours": judge == "ann"} for judge in ("ann", "bob") for q in range(30)]
    assert votes_interval(pd.DataFrame(rows)) == (0.5, 0.0, 1.0)
    alone = votes_interval(pd.DataFrame([row | {"ours": row["question"] < 15} for row in rows[:30]]))
    half = 1.96 * 0.5 / 30**0.5  # one judge: prompts alone
    assert alone == pytest.approx((0.5, 0.5 - half, 0.5 + half), abs=0.025)
    few = pd.DataFrame([row for row in rows if row["judge"] == "ann" or row["question"] == 0])
    assert votes_interval(few).mean == pytest.approx((29 + 0.5) / 30), "a prompt counts once, however many judged it"
    assert votes_interval(few.head(1)) == (1.0, 0.0, 1.0)


def test_agreement_is_krippendorffs_alpha_over_shared_prompts():
    ours = {"ann": [1, 0, 1, 1], "bob": [1, 0, 0, None], "cid": [1, 0, 1, None]}
    rows = [
        {"judge": judge, "question": q, "ours": bool(v)}
        for judge, values in ours.items()
        for q, v in enumerate(values)
        if v is not None
    ]
    expected = krippendorff.alpha([[1, 0, 1], [1, 0, 0], [1, 0, 1]], level_of_measurement="nominal")
    assert judge_agreement(pd.DataFrame(rows)) == pytest.approx(expected)
    assert judge_agreement(pd.DataFrame(rows[:4])) is None
    assert judge_agreement(pd.DataFrame([{**row, "ours": True} for row in rows])) is None


def test_judges_who_look_at_sides_only_are_seen(study):
    for judge in ("ann", "bob"):
        session = StudySession(study, judge)
        while (pair := session.next()) is not None:
            session.answer(pair.number, "left")
    result = study_result(study)
    assert result.left.mean == 1.0 and result.by_prompt.rate == 0.5 and result.alpha < 0


def test_what_cannot_be_counted_raises_its_sentence(study):
    with pytest.raises(ValueError, match="has no answer yet"):
        study_result(study)
    (study / "key.json").write_text((study / "key.json").read_text()[:40])
    with pytest.raises(
        ValueError, match=r"key\.json is no part of a study: .*; put back the file that make_study wrote"
    ):
        read_answers(study)
    (study / "key.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds a study whose key\.json is missing: put it back"):
        read_answers(study)
