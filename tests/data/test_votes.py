import json

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dkto.data.votes import PARTITIONS, TIE_RULES, Ranking, likes_from_votes, read_rankings, votes_from_rankings


def votes(*rows):
    return pd.DataFrame(
        [(first, second, "x", float(label)) for first, second, label in rows],
        columns=["image_0", "image_1", "prompt", "label_0"],
    )


def labels(likes):
    return dict(zip(likes.images.tolist(), likes.is_desirable.tolist(), strict=True))


def test_the_rules_by_hand():
    """a: 2 wins, 1 loss; b: 1 win, 1 loss; c: 2 losses, 1 win; d: one tie with e, who also lost to a."""
    table = votes(("a", "b", 1), ("b", "c", 1), ("a", "c", 0), ("d", "e", 0.5), ("e", "a", 0), ("c", "a", 0))
    expected = {
        ("at_least_once", "ignore"): {"a": True, "b": True, "c": True, "e": False},
        ("always", "ignore"): {"a": False, "b": False, "c": False, "e": False},
        ("mostly", "ignore"): {"a": True, "b": False, "c": False, "e": False},
        ("at_least_once", "liked"): {"a": True, "b": True, "c": True, "d": True, "e": True},
        ("always", "liked"): {"a": False, "b": False, "c": False, "d": True, "e": False},
        ("mostly", "liked"): {"a": True, "b": False, "c": False, "d": True, "e": False},
        ("at_least_once", "disliked"): {"a": True, "b": True, "c": True, "d": False, "e": False},
    }
    for (partition, ties), likes in expected.items():
        assert labels(likes_from_votes(table, partition, ties)) == likes, (partition, ties)


def test_counts_say_what_came_in_and_what_was_made_of_it():
    likes = likes_from_votes(votes(("a", "b", 1), ("a", "c", 1), ("d", "c", 0.5)))
    assert likes.counts["comparisons"] == 3 and likes.counts["ties"] == 1
    assert likes.counts["images"] == 4 and likes.counts["duplicates_by_name"] == 2
    assert likes.counts["images_left_out"] == 1, "d has nothing but a tie"
    assert (likes.counts["desirable"], likes.counts["undesirable"]) == (1, 2)
    assert likes.counts["desirable/always"] == 1
    assert likes.counts["partition"] == PARTITIONS["at_least_once"] and likes.counts["ties_rule"] == TIE_RULES["ignore"]
    assert likes.pairs.tolist() == [[0, 1], [0, 2]]


def test_an_image_keeps_its_first_prompt_and_others_are_counted():
    table = votes(("a", "b", 1), ("b", "c", 1))
    table["prompt"] = ["first", "second"]
    likes = likes_from_votes(table)
    assert likes.prompts.tolist() == ["first", "first", "second"] and likes.counts["images_with_several_prompts"] == 1


def test_unknown_rules_list_the_known():
    with pytest.raises(ValueError, match="partition must be one of at_least_once, always, mostly, got 'sometimes'"):
        likes_from_votes(votes(("a", "b", 1)), "sometimes")
    with pytest.raises(ValueError, match="ties must be one of ignore, liked, disliked, got 'drop'"):
        likes_from_votes(votes(("a", "b", 1)), ties="drop")


CASES = st.lists(
    st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 0.5, 1])).filter(lambda v: v[0] != v[1]),
    min_size=1,
    max_size=30,
)


@given(CASES, st.sampled_from(sorted(TIE_RULES)))
def test_against_a_plain_count(rows, ties):
    """Every rule recomputed vote by vote; whoever always wins also wins at least once and mostly."""
    table = votes(*((str(a), str(b), label) for a, b, label in rows))
    score = {}
    for a, b, label in rows:
        for name, value in ((str(a), label), (str(b), 1 - label)):
            if value == 0.5:
                value = {"ignore": None, "liked": 1, "disliked": 0}[ties]
            if value is not None:
                score.setdefault(name, []).append(value)
    plain = {
        "at_least_once": lambda values: max(values) == 1,
        "always": lambda values: min(values) == 1,
        "mostly": lambda values: np.mean(values) > 0.5,
    }
    found = {rule: labels(likes_from_votes(table, rule, ties)) for rule in PARTITIONS}
    for rule, likes in found.items():
        assert likes == {name: bool(plain[rule](values)) for name, values in score.items()}
    assert all(found["mostly"][n] and found["at_least_once"][n] for n, liked in found["always"].items() if liked)


def test_a_ranking_makes_every_pair():
    table = votes_from_rankings([Ranking("x", tuple("abcd"), (4, 3, 2, 1))])
    assert len(table) == 6 and (table["label_0"] == 1).all()
    assert labels(likes_from_votes(table, "always")) == {"a": True, "b": False, "c": False, "d": False}


def test_whole_numbers_that_floats_would_round_are_no_tie(tmp_path):
    (tmp_path / "x.json").write_text(
        '[{"prompt": "x", "images": ["a", "b", "c"], "scores": [9007199254740993, 9007199254740992, 1e308]}]'
    )
    assert votes_from_rankings(read_rankings(tmp_path / "x.json"))["label_0"].tolist() == [1.0, 0.0, 0.0]


def test_entries_of_every_kind(tmp_path):
    entries = [
        {"prompt": "x", "file_path": ["a", "b"], "human_preference": [0, 1]},
        {"prompt": "x", "image_path": ["a", "b"], "rank": [2, 1]},
        {"prompt": "x", "images": ["a", "b"], "scores": [0.1, 0.7]},
    ]
    (tmp_path / "r.json").write_text(json.dumps(entries))
    for ranking in read_rankings(tmp_path / "r.json"):
        assert ranking.images == ("a", "b") and ranking.goodness[1] > ranking.goodness[0]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "cannot be read as JSON"),
        ('{"prompt": "x"}', "must hold a list of rankings, got dict"),
        ('[{"prompt": "x", "images": ["a"]}]', "entry 1 needs prompt, one of images, image_path, file_path and one of"),
        ("[3]", "found: nothing"),
        (
            '[{"prompt": "x", "images": ["a", "b"], "rank": [1]}]',
            "rank must be a list of 2 numbers, one per image, got 1",
        ),
        ('[{"prompt": "x", "images": ["a"], "rank": 1}]', "one per image, got int"),
        ('[{"prompt": "x", "images": ["a"], "scores": ["good"]}]', "scores must be finite numbers, got ['good']"),
        ('[{"prompt": "x", "images": ["a"], "scores": [true]}]', "scores must be finite numbers, got [True]"),
        ('[{"prompt": "x", "images": ["a"], "scores": [NaN]}]', "scores must be finite numbers, got [nan]"),
    ],
)
def test_bad_rankings_are_named(tmp_path, text, sentence):
    (tmp_path / "r.json").write_text(text)
    with pytest.raises(ValueError) as caught:
        list(read_rankings(tmp_path / "r.json"))
    assert sentence in str(caught.value)
