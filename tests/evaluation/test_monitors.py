import numpy as np
import pytest
from PIL import Image

from dkto.common.files import write_json
from dkto.evaluation.manifest import image_path
from dkto.evaluation.monitors import folder_diversity, folder_drift, monitor_table
from dkto.evaluation.scoring import Scores, score_all


def red(images, prompts):
    return [np.asarray(image)[..., 0].mean() for image in images]


def green(images, prompts):
    return [np.asarray(image)[..., 1].mean() for image in images]


def write(folder, colours, seed=0):
    """A folder of flat pictures, `colours[prompt][image]`."""
    folder.mkdir()
    about = {"system": {}, "prompts": [f"p{p}" for p in range(len(colours))], "images_per_prompt": len(colours[0])}
    write_json(folder / "manifest.json", {**about, "seed": seed})
    for p, row in enumerate(colours):
        for i, colour in enumerate(row):
            Image.new("RGB", (2, 2), colour).save(image_path(folder, p, i))
    return folder


@pytest.fixture
def folders(tmp_path):
    base = [[(0, 51, 0), (51, 51, 0)]] * 4
    return {
        "base": write(tmp_path / "base", base),
        "hacked": write(tmp_path / "hacked", [[(255, 0, 0), (255, 0, 0)]] * 4),
        "honest": write(tmp_path / "honest", [[(51, 51, 0), (102, 51, 0)]] * 4),
    }


def test_drift_and_diversity_of_folders_by_hand(folders):
    assert folder_drift(folders["base"], folders["base"]) == 0.0
    assert folder_drift(folders["honest"], folders["base"]) == pytest.approx(0.2 / 3)
    assert folder_diversity(folders["base"]) == pytest.approx(0.2 / 3)
    assert folder_diversity(folders["hacked"]) == 0.0


def test_one_picture_each_has_no_diversity(tmp_path):
    assert np.isnan(folder_diversity(write(tmp_path / "one", [[(0, 0, 0)]])))


def test_the_hacked_scorer_is_found_and_the_honest_one_is_not_accused(folders):
    table = monitor_table(
        folders, score_all(folders, [red, green]), "base", optimised={"hacked": "red", "honest": "red"}
    )
    assert table.loc["base", "drift"] == 0 and table.loc["hacked", "drift"] > table.loc["honest", "drift"]
    assert table.loc["base", "mean/green"] == 51 and table.loc["hacked", "mean/red"] == 255
    assert table.loc["hacked", ["rose", "fell", "reward_hacking"]].tolist() == [True, "green", True]
    assert table.loc["honest", ["rose", "fell", "reward_hacking"]].tolist() == [True, "", False]
    assert table.loc["base", ["rose", "fell"]].isna().all()


def test_many_watched_scorers_share_one_false_alarm(folders):
    """A fall at 2.4 standard errors is one of a single watched scorer, and chance among ten."""
    change = np.random.default_rng(0).normal(size=(200, 1))
    change = (change - change.mean()) / change.std() * 200**0.5 - 2.4
    watched = {f"w{i}": change if i == 0 else np.zeros((200, 1)) for i in range(10)}
    found = {}
    for count in (1, 10):
        scores = Scores({("base", "red"): np.zeros((200, 1)), ("hacked", "red"): np.ones((200, 1))})
        for name in list(watched)[:count]:
            scores |= {("base", name): np.zeros((200, 1)), ("hacked", name): watched[name]}
        two = {name: folders[name] for name in ("base", "hacked")}
        table = monitor_table(two, Scores(scores), "base", optimised={"hacked": "red"})
        found[count] = table.loc["hacked", ["fell", "reward_hacking"]].tolist()
    assert found == {1: ["w0", True], 10: ["", False]}


def test_neutral_prompts_have_a_column_of_their_own(folders, tmp_path):
    plain = [[(9, 9, 9)]] * 2
    neutral = {name: write(tmp_path / f"neutral-{name}", plain) for name in ("base", "honest")}
    neutral["hacked"] = write(tmp_path / "neutral-hacked", [[(60, 9, 9)]] * 2)
    table = monitor_table(folders, score_all(folders, [red]), "base", neutral=neutral)
    assert table["neutral_drift"].tolist() == pytest.approx([0, 51 / 255 / 3, 0])
    assert "reward_hacking" not in table.columns


SCORES = Scores({("base", "red"): np.zeros((4, 2))})


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda f: monitor_table(f, SCORES, "bas"), "base 'bas' is not among the methods: base, hacked, honest"),
        (
            lambda f: monitor_table(f, SCORES, "base", optimised={"hacked": "blue"}),
            r"optimised\['hacked'\] is 'blue', which is not among the scorers: red",
        ),
        (
            lambda f: monitor_table(f, SCORES, "base", neutral={"base": f["base"]}),
            "neutral has no folder for hacked, honest",
        ),
    ],
)
def test_wrong_arguments_raise_their_sentence(folders, call, sentence):
    with pytest.raises(KeyError, match=sentence):
        call(folders)


def test_other_seeds_are_not_compared(folders, tmp_path):
    other = write(tmp_path / "other", [[(0, 0, 0), (0, 0, 0)]] * 4, seed=1)
    with pytest.raises(ValueError, match="cannot be compared: seed differ"):
        folder_drift(other, folders["base"])
