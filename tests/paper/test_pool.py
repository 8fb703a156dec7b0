from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dkto.data.images import load_image
from dkto.evaluation.scorers import SCORERS, score
from dkto.models.system import System
from dkto.paper.pool import TASTES, ask, compare_pool, draw_pool, likes_of, make_pool, shares, take_likes, unfaithful
from dkto.paper.train_all import pairs_of
from dkto.world.scenes import caption, parse, prompts_for
from dkto.world.truth import judge

PROMPTS = prompts_for("train", 40, seed=3)


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    return make_pool(PROMPTS, tmp_path_factory.mktemp("pools") / "pool", seed=1)


@pytest.fixture(scope="module")
def utility(pool):
    """What the balanced user likes, by picture."""
    images = [load_image(path) for path in pool["image"]]
    return dict(zip(pool["image"], score("world_utility", images, list(pool["prompt"])), strict=True))


def test_a_pool_holds_k_pictures_of_each_prompt_of_every_kind(pool):
    assert len(pool) == 160 and (pool.groupby("prompt").size() == 4).all()
    assert set(pool["finish"]) == {"plain", "middling", "bad"}
    assert 0.55 < pool["faithful"].mean() < 0.85
    folder = Path(pool["image"][0]).parents[1]
    pd.testing.assert_frame_equal(make_pool(PROMPTS, folder, seed=1), pool)
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "pool.parquet"), pool)
    with pytest.raises(ValueError, match="holds a pool of another run"):
        make_pool(PROMPTS[:5], folder, seed=1)


def test_a_pool_of_other_finishes_is_another_pool(tmp_path, monkeypatch):
    """As version 0.1 painted them: the finest finish was another one."""
    with monkeypatch.context() as former:
        former.setattr("dkto.paper.pool.FINISH_SHARES", {"brilliant": 0.2, "middling": 0.4, "bad": 0.4})
        make_pool(PROMPTS[:1], tmp_path, seed=1)
    with pytest.raises(ValueError, match="holds a pool of another run"):
        make_pool(PROMPTS[:1], tmp_path, seed=1)


def test_kinds_differ_where_they_should(pool):
    values = {name: score(name, [load_image(p) for p in pool["image"]], list(pool["prompt"]))
              for name in ("world_aesthetics", "world_fidelity")}  # fmt: skip
    frame = pool.assign(**values)
    finish = frame.groupby("finish")["world_aesthetics"].mean()
    assert finish["plain"] > finish["middling"] > finish["bad"]
    plain = frame[frame["finish"] == "plain"].groupby("faithful")["world_fidelity"].mean()
    assert plain[True] > 0.95 > 0.85 > plain[False]


def test_one_thing_is_wrong_in_an_unfaithful_scene():
    rng = np.random.default_rng(0)
    for prompt in PROMPTS[:20]:
        scene = parse(prompt)
        other = unfaithful(scene, rng)
        changed = [other.background != scene.background, other.things[0] != scene.things[0]]
        assert sum(changed) == 1 and other.things[1:] == scene.things[1:] and caption(other) != prompt


def test_the_user_answers_by_bradley_terry(pool, utility):
    def agreement(temperature):
        votes = compare_pool(pool, "world_utility", temperature=temperature, seed=0)
        gap = votes["image_0"].map(utility) - votes["image_1"].map(utility)
        return float((np.sign(gap) == np.where(votes["label_0"] == 1, 1, -1))[gap != 0].mean())

    assert agreement(1e-6) == 1.0
    assert 0.75 < agreement(0.1) < 1.0
    assert agreement(1e6) == pytest.approx(0.5, abs=0.15)


def test_votes_become_likes_and_pairs_of_the_same_pictures(pool):
    votes = compare_pool(pool, TASTES["balanced"], seed=0)
    likes = likes_of(votes)
    assert len(likes.pairs) == len(votes) == 3 * len(PROMPTS)
    pairs = pairs_of(likes)
    assert len(pairs) == 2 * len(votes) and set(pairs.images) == set(likes.images)
    assert pairs.is_desirable.tolist() == [True, False] * len(votes)
    chosen = votes["image_0"].where(votes["label_0"] == 1, votes["image_1"])
    assert [str(path) for path in pairs.images[::2]] == chosen.tolist()
    found = shares(pool, likes)
    assert found["finish/plain"] > found["finish/bad"] and found["faithful"] > found["unfaithful"]
    assert sum(likes_of(votes, "always").is_desirable) < sum(likes.is_desirable)


def test_the_preferred_picture_stays_and_the_next_one_is_held_against_it(pool, utility):
    votes = compare_pool(pool, "world_utility", temperature=1e-6, seed=2)
    votes["won"] = votes["image_0"].where(votes["label_0"] == 1, votes["image_1"])
    for prompt, shown in votes.groupby("prompt"):
        pictures = pool.loc[pool["prompt"] == prompt, "image"]
        assert {*shown["image_0"], *shown["image_1"]} == {*pictures}
        for before, after in zip(shown["won"], shown[["image_0", "image_1"]].to_numpy()[1:], strict=False):
            assert before in after
        assert utility[shown["won"].iloc[-1]] == max(map(utility.get, pictures))


def test_specific_users_and_their_contradictions(pool):
    likes = ask(pool, "prompt_faithful")
    right = [
        judge(np.asarray(load_image(p)), t)["fidelity"] == 1 for p, t in zip(likes.images, likes.prompts, strict=True)
    ]
    assert likes.is_desirable.tolist() == right
    flipped = ask(pool, "prompt_faithful", flip_rate=0.3, seed=5)
    assert (likes.is_desirable != flipped.is_desirable).mean() == pytest.approx(0.3, abs=0.1)
    assert len(likes.pairs) > 0
    some = take_likes(likes, 20)
    assert len(some) == 20 and set(take_likes(likes, 10).images) < set(some.images)


def test_the_red_user_likes_the_tinted_one_of_two(tmp_path, tiny_pipeline):
    pool = draw_pool(PROMPTS[:3], tmp_path / "red", base=System(model=str(tiny_pipeline), steps=2), tint=0.4)
    likes = ask(pool, "likes_red")
    assert likes.is_desirable.tolist() == [False, True] * 3 and len(likes.pairs) == 3
    red = SCORERS["world_redness"]([load_image(p) for p in likes.images], likes.prompts)
    assert (red[1::2] > red[0::2]).all()
    flipped = ask(pool, "likes_red", flip_rate=0.5, seed=1)
    assert (flipped.is_desirable != likes.is_desirable).any() and len(flipped.pairs) == 3


def test_a_pool_with_pictures_of_the_base(tmp_path, tiny_pipeline):
    pool = make_pool(PROMPTS[:2], tmp_path, base=System(model=str(tiny_pipeline), steps=2))
    assert (pool["finish"] == "base").sum() == 2 and len(pool) == 8


def test_wrong_inputs_are_refused(pool, tmp_path):
    with pytest.raises(ValueError, match="pictures_per_prompt must be 2 or above, got 1"):
        make_pool(PROMPTS, tmp_path, pictures_per_prompt=1)
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        compare_pool(pool, "world_utility", temperature=0)
    with pytest.raises(ValueError, match=r"user must be one of likes_red, .*got 'nobody'"):
        ask(pool, "nobody")
    with pytest.raises(ValueError, match=r"rate must be in \[0, 0.5\], got 0.7"):
        ask(pool, "likes_vivid", flip_rate=0.7)
    with pytest.raises(ValueError, match="the pool holds none: call draw_pool with a tint"):
        ask(pool, "likes_red")
    with pytest.raises(ValueError, match=r"count must be in \[1, 160\], got 500"):
        take_likes(ask(pool, "likes_vivid"), 500)
