import io

import numpy as np
import pytest
from PIL import Image

from dkto.data.feedback import read_feedback
from dkto.data.pairs import convert_pairs
from dkto.world.scenes import prompts_for
from dkto.world.sessions import session_pairs
from dkto.world.truth import aesthetics


@pytest.fixture(scope="module")
def prompts():
    return prompts_for("train", 40)


def quality(data):
    return aesthetics(np.asarray(Image.open(io.BytesIO(data))))


def test_the_preferred_picture_is_better_and_stays(prompts):
    pairs = session_pairs(prompts[:6], rounds=4)
    assert len(pairs) == 24
    for _, session in pairs.groupby("caption", sort=False):
        before = None
        for row in session.itertuples():
            better = quality(row.jpg_0) > quality(row.jpg_1)
            assert (row.label_0, row.label_1) == (float(better), float(not better))
            assert before is None or before in (row.image_0_uid, row.image_1_uid)
            before = row.image_0_uid if better else row.image_1_uid


def test_distinct_winners_are_as_many_as_records(prompts, tmp_path):
    """Without mistakes the winners are the record-holders: 1 + 1/3 + 1/4 + ... of n exchangeable pictures."""
    pairs = session_pairs(prompts, rounds=7)
    pairs.to_parquet(tmp_path / "s.parquet")
    table = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out"))
    assert len(table) == 40 * 8
    expected = 1 + sum(1 / k for k in range(3, 9))
    assert abs(table.is_desirable.sum() / 40 - expected) < 4 * (0.8 / 40) ** 0.5  # variance of the count below 0.8
    always = read_feedback(convert_pairs(tmp_path / "s.parquet", tmp_path / "out", partition="always"))
    assert always.is_desirable.sum() == 40, "only the last on the screen never lost"


def test_mistakes_and_ties_come_as_often_as_asked(prompts):
    pairs = session_pairs(prompts, rounds=6, mistakes=0.3, tie_width=0.02, seed=1)
    gaps = np.array([quality(row.jpg_0) - quality(row.jpg_1) for row in pairs.itertuples()])
    ties = pairs["label_0"].to_numpy() == 0.5
    assert (ties == (abs(gaps) < 0.02)).all() and ties.any()
    wrong = (pairs["label_0"].to_numpy() > 0.5) != (gaps > 0)
    assert abs(wrong[~ties].mean() - 0.3) < 4 * (0.21 / (~ties).sum()) ** 0.5
    assert session_pairs(prompts[:2], 2, seed=5).equals(session_pairs(prompts[:2], 2, seed=5))


def test_numbers_out_of_range(prompts):
    with pytest.raises(ValueError, match="rounds must be 1 or above, got 0"):
        session_pairs(prompts, 0)
    with pytest.raises(ValueError, match=r"mistakes must be in \[0, 0.5\], got 0.6"):
        session_pairs(prompts, 1, mistakes=0.6)
