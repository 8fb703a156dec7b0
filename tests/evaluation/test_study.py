import json
import multiprocessing
import os
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image
from tiny_study import PROMPT_STYLES, STYLES, draw_folders, finish, is_ours

from dkto.evaluation.manifest import image_path
from dkto.evaluation.study import QUESTION, StudySession, make_study, read_key
from dkto.evaluation.study_answers import study_result


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


@pytest.fixture
def styles():
    return PROMPT_STYLES


@pytest.fixture
def study(folders, styles, tmp_path):
    return make_study(folders, tmp_path / "study", ["ann", "bob", "cid"], styles, per_style=5)


def test_every_style_has_its_share_and_each_pair_shows_both_methods(study):
    session = StudySession(study, "ann")
    assert session.question == QUESTION == "Which image do you prefer given the prompt?"
    about = json.loads((study / "questions.json").read_text())
    assert {style: about["styles"].count(style) for style in STYLES} == dict.fromkeys(STYLES, 5)
    seen = []
    while (pair := session.next()) is not None:
        assert (pair.position, pair.total) == (len(seen) + 1, 20)
        assert is_ours(pair.left) != is_ours(pair.right)
        assert pair.prompt == about["prompts"][pair.number]
        seen.append(pair.number)
        session.answer(pair.number, "left")
    assert sorted(seen) == list(range(20)) and seen != sorted(seen)


def test_nothing_that_a_judge_reads_names_a_method(study):
    read = [path for path in study.rglob("*") if path.is_file() and path.name != "key.json"]
    assert len(read) >= 1 + 2 * 20, "the questions and two images of each pair"
    for path in read:
        assert b"kto" not in path.read_bytes() and b"base" not in path.read_bytes()
        assert "kto" not in path.name and "base" not in path.name


def test_neither_the_seed_nor_the_age_of_a_file_tells_which_is_which(folders, styles, tmp_path):
    """Two studies with one seed ask the same prompts, and deal letters, sides and order out anew."""
    first, second = (make_study(folders, tmp_path / name, ["ann"], styles, per_style=5, seed=7) for name in "xy")
    keys, asked = ([json.loads((s / f"{n}.json").read_text()) for s in (first, second)] for n in ("key", "questions"))
    assert keys[0]["prompts"] == keys[1]["prompts"] and keys[0]["a_is_ours"] != keys[1]["a_is_ours"]
    assert asked[0]["judges"]["ann"]["left"] != asked[1]["judges"]["ann"]["left"] and "seed" not in asked[0]
    ages = [[(first / "images" / f"q{n:03d}-{letter}.png").stat().st_mtime_ns for letter in "ab"] for n in range(20)]
    assert all(a <= b for a, b in ages) and 0 < sum(keys[0]["a_is_ours"]) < 20


def lefts(study, judge):
    """By question, whether ours stands left for that judge."""
    about, key = (json.loads((study / f"{name}.json").read_text()) for name in ("questions", "key"))
    left = np.array(about["judges"][judge]["left"]) == "a"
    return left == np.array(key["a_is_ours"]), np.array(about["styles"])


def test_sides_are_balanced_within_a_judge_and_across_judges(folders, styles, tmp_path):
    study = make_study(folders, tmp_path / "s", ["ann", "bob", "cid", "dan"], styles, per_style=6)
    for first, second in (("ann", "bob"), ("cid", "dan")):
        ours, of_style = lefts(study, first)
        for style in STYLES:
            assert ours[of_style == style].sum() == 3
        assert (ours != lefts(study, second)[0]).all()
    assert (lefts(study, "ann")[0] != lefts(study, "cid")[0]).any()
    letters = np.array(json.loads((study / "key.json").read_text())["a_is_ours"])
    assert 0 < letters.sum() < 24


def test_an_odd_number_of_questions_is_balanced_up_to_one(study):
    ours, of_style = lefts(study, "ann")
    assert all(ours[of_style == style].sum() in (2, 3) for style in STYLES)


def test_answers_are_appended_and_a_new_session_goes_on(study):
    session = StudySession(study, "ann")
    first = session.next()
    session.answer(first.number, "left")
    again = StudySession(study, "ann")
    assert again.next().number != first.number and again.answers == {first.number: "left"}
    again.answer(first.number, "right")
    assert StudySession(study, "ann").answers == {first.number: "right"}
    lines = [json.loads(line) for line in (study / "answers" / "ann.jsonl").read_text().splitlines()]
    assert [line["choice"] for line in lines] == ["left", "right"] and {"question", "choice", "time"} == set(lines[0])
    assert StudySession(study, "bob").answers == {}


def test_a_study_drawn_up_again_keeps_its_pictures_and_lets_judges_join(folders, styles, study):
    session = StudySession(study, "bob")
    session.answer(session.next().number, "left")
    before = {path: path.read_bytes() for path in study.rglob("*") if path.is_file()}
    for path in [*folders["kto"].glob("*.png")]:
        Image.new("RGB", (2, 2), (0, 255, 0)).save(path)
    assert make_study(folders, study, ["ann", "bob", "cid"], styles, per_style=5) == study
    assert {path: path.read_bytes() for path in study.rglob("*") if path.is_file()} == before
    make_study(folders, study, ["dan"], styles, per_style=5)
    assert (lefts(study, "cid")[0] != lefts(study, "dan")[0]).all(), "the fourth mirrors the third"
    assert (
        json.loads(before[study / "questions.json"])["judges"].items()
        <= json.loads((study / "questions.json").read_text())["judges"].items()
    )
    assert len(StudySession(study, "bob").answers) == 1 and StudySession(study, "dan").next().total == 20


def test_a_study_that_could_not_be_drawn_up_leaves_no_claim_and_a_lost_key_is_named(folders, styles, tmp_path):
    for path in folders["base"].glob("p0002*"):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=r"p0002\d-s0\.png does not exist"):
        make_study(folders, tmp_path / "s", ["ann"], styles, per_style=6)
    study = make_study(folders, tmp_path / "s", ["ann"], styles[:], per_style=1, seed=1)
    (study / "key.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds a study whose key\.json is missing"):
        make_study(folders, study, ["ann"], styles, per_style=1, seed=1)


def test_undo_takes_back_one_answer_after_the_other(study):
    session = StudySession(study, "ann")
    assert session.undo() is None
    numbers = []
    for _ in range(3):
        numbers.append(session.next().number)
        session.answer(numbers[-1], "right")
    assert [session.undo(), session.undo()] == [numbers[2], numbers[1]]
    assert StudySession(study, "ann").answers == {numbers[0]: "right"} and session.next().number == numbers[1]


def test_once_all_is_answered_no_answer_changes(study):
    session = StudySession(study, "ann")
    while (pair := session.next()) is not None:
        session.answer(pair.number, "left")
    for change in (session.undo, lambda: session.answer(0, "right")):
        with pytest.raises(ValueError, match="questions are answered and the names may be known"):
            change()
    assert set(StudySession(study, "ann").answers.values()) == {"left"}


def _answer_until_killed(study):
    session = StudySession(study, "ann")
    while (pair := session.next()) is not None:
        session.answer(pair.number, "left")
        time.sleep(0.05)


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_a_killed_judge_loses_no_answer(study):
    process = multiprocessing.get_context("spawn").Process(target=_answer_until_killed, args=(study,))
    process.start()
    path = study / "answers" / "ann.jsonl"
    while not path.exists() or path.read_text().count("\n") < 3:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole = path.read_text().count("\n")
    with path.open("a") as stream:
        stream.write('{"question": 1, "cho')
    with pytest.warns(UserWarning, match=rf"ann\.jsonl, line {whole + 1} was cut short and is left out"):
        session = StudySession(study, "ann")
    assert len(session.answers) == whole >= 3
    finish(session, lambda pair: True)
    with pytest.warns(UserWarning, match=rf"ann\.jsonl, line {whole + 1} was cut short"):
        assert len(StudySession(study, "ann").answers) == 20


def test_the_median_image_can_be_shown(folders, styles, tmp_path):
    chosen = {"kto": [1] * 24, "base": [0] * 24}
    study = make_study(folders, tmp_path / "s", ["ann"], styles, per_style=2, chosen=chosen)
    colours = {Image.open(path).getpixel((0, 0)) for path in (study / "images").iterdir()}
    assert colours == {(255, 5, 0), (0, 0, 255)}


def test_the_same_study_is_left_as_it_is_and_another_refused(study, folders, styles, tmp_path):
    StudySession(study, "ann").answer(0, "left")
    stamp = (study / "questions.json").stat().st_mtime_ns
    make_study(folders, study, ["ann", "bob", "cid"], styles, per_style=5)
    assert (study / "questions.json").stat().st_mtime_ns == stamp and len(StudySession(study, "ann").answers) == 1
    with pytest.raises(ValueError, match=r"holds a study of another run \(.*differ\): choose another folder"):
        make_study(folders, study, ["ann", "bob", "cid"], styles, per_style=4)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"judges": []}, "a study needs at least 1 judge, got none"),
        ({"judges": ["ann", "../x"]}, r"a judge's name must be letters, digits, '_' and '-', got '\.\./x'"),
        ({"judges": ["ann", "ann"]}, "every judge is named once, got ann more often"),
        ({"styles": ["photo"]}, "styles must name one style for each of 24 prompts, got 1"),
        ({"per_style": 0}, "per_style must be 1 or above, got 0"),
        ({"per_style": 1.5}, "per_style must be a whole number, got 1.5"),
        ({"per_style": 7}, r"there are 6 prompts of style 'anime', but 7 are asked for \(per_style\)"),
        ({"chosen": {"kto": [0] * 24}}, r"chosen\['base'\] must name an image in \[0, 1\] for each of 24 prompts"),
        ({"chosen": {"kto": [0] * 24, "base": [2] * 24}}, r"chosen\['base'\] must name an image in \[0, 1\]"),
    ],
)
def test_wrong_arguments_raise_their_sentence(folders, styles, tmp_path, change, sentence):
    arguments = {"judges": ["ann"], "styles": styles, "per_style": 2, **change}
    with pytest.raises(ValueError, match=sentence):
        make_study(folders, tmp_path / "s", **arguments)


def test_a_third_method_and_a_missing_image_are_refused(folders, styles, tmp_path):
    with pytest.raises(ValueError, match="a study compares 2 methods, got 3: kto, base, sft"):
        make_study({**folders, "sft": folders["kto"]}, tmp_path / "s", ["ann"], styles)
    image_path(folders["kto"], 0, 0).unlink()
    with pytest.raises(FileNotFoundError, match=r"p00000-s0\.png does not exist"):
        make_study(folders, tmp_path / "s", ["ann"], styles, per_style=6)


def changed(path, change):
    """A part of a study with one value replaced, deleted, or added: `change` is a way into it and the value."""
    *way, last, value = change
    found = json.loads(path.read_text())
    place = found
    for key in way:
        place = place[key]
    if value is GONE:
        del place[last]
    else:
        place[last] = value
    path.write_text(json.dumps(found))


GONE = object()
CHANGED = r"a value in it or in questions\.json was changed"
PUT_BACK = "; put back the file that make_study wrote"


@pytest.mark.parametrize(
    ("name", "change", "sentence"),
    [
        ("key", ("a_is_ours", 3, "x"), r"a_is_ours must be a list of bool, got \["),
        ("key", ("a_is_ours", 3, 1), r"a_is_ours must be a list of bool"),
        ("key", ("a_is_ours", 3, GONE), r"a_is_ours must be one for each of 20 prompts, got 19"),
        ("key", ("a_is_ours", None), r"a_is_ours must be a list of bool, got None"),
        ("key", ("methods", ["kto", "kto"]), r"methods must be the names of two methods"),
        ("key", ("methods", 1, GONE), r"methods must be the names of two methods, got \['kto'\]"),
        ("key", ("salt", -1), r"salt must be a whole number, got -1"),
        ("key", ("prompts", 0, "another"), r"its prompts are not those of questions.json"),
        ("key", ("methods", ["base", "kto"]), CHANGED),
        ("key", ("shown", "kto", 0, 7), CHANGED),
        ("questions", ("judges", "ann", "left", ["a"] * 20), CHANGED),
        ("questions", ("judges", "ann", "left", None), r"judge ann: left must be 20 of a and b, got None"),
        ("questions", ("judges", "ann", "left", 2, "c"), r"judge ann: left must be 20 of a and b"),
        ("questions", ("judges", "ann", "left", 2, ["a"]), r"judge ann: left must be 20 of a and b"),
        ("questions", ("judges", "ann", "order", 0, 99), r"judge ann: order must be all of 0 to 19 once"),
        ("questions", ("judges", "ann", "order", 0, False), r"judge ann: order must be all of 0 to 19 once"),
        ("questions", ("judges", "ann", []), r"judge ann must have an order and sides, got \[\]"),
        ("questions", ("judges", "../../leak", {}), r"a judge's name must be letters, .*, got '../../leak'"),
        ("questions", ("judges", None), r"judges must be an object of judges, got None"),
        ("questions", ("styles", 0, GONE), r"styles must be one for each of 20 prompts, got 19"),
        ("questions", ("prompts", 0, 7), r"prompts must be a list of texts"),
        ("questions", ("question", GONE), r"question must be text, got nothing"),
    ],
)
def test_a_damaged_part_credits_no_answer_to_the_other_method(study, name, change, sentence):
    StudySession(study, "ann").answer(0, "left")
    changed(study / f"{name}.json", change)
    name = "key" if sentence == CHANGED else name
    with pytest.raises(ValueError, match=rf"{name}\.json is no part of a study: {sentence}.*{PUT_BACK}") as caught:
        study_result(study)
    assert len(str(caught.value).replace(str(study), "")) < 300


@pytest.mark.parametrize("name", ["questions.json", "key.json", "answers", "answers/ann.jsonl", "images/q000-a.png"])
def test_no_link_leads_out_of_a_study(study, tmp_path, name):
    path, elsewhere = study / name, tmp_path / "elsewhere"
    (path.rename if path.exists() else lambda place: place.write_text(""))(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(ValueError, match=r"is a link that leaves the study .*: put the file itself there"):
        for session in [StudySession(study, "ann")] * 20:
            session.answer(session.next().number, "left")
        study_result(study)
    assert elsewhere.is_dir() or "choice" not in elsewhere.read_bytes().decode(errors="replace")


def test_wrong_answers_and_folders_raise_their_sentence(study, tmp_path):
    with pytest.raises(KeyError, match="the study has no judge 'eve'; its judges: ann, bob, cid"):
        StudySession(study, "eve")
    session = StudySession(study, "ann")
    with pytest.raises(ValueError, match=r"question must be in \[0, 19\], got 20"):
        session.answer(20, "left")
    with pytest.raises(ValueError, match="side must be left or right, got 'up'"):
        session.answer(0, "up")
    with pytest.raises(FileNotFoundError, match=r"holds no study \(questions\.json is missing\)"):
        StudySession(tmp_path / "nothing", "ann")
    whole = '{"question": 0, "choice": "left"}\n'
    wrong = ["-1", "20", '"3"', "1.0", "true", "[1]"]
    for line in (
        '{"vote": 3}',
        "left",
        "[0]",
        "[" * 3000,
        '{"question" 0}',
        "\x1b\udcff",
        *(f'{{"question": {value}, "choice": "left"}}' for value in wrong),
    ):
        (study / "answers" / "ann.jsonl").write_text(f"{whole}{line}\n", errors="surrogateescape")
        with pytest.raises(
            ValueError, match=r"ann\.jsonl, line 2: expected a question in \[0, 19\] and a choice of left"
        ):
            StudySession(study, "ann")
    (study / "answers" / "ann.jsonl").write_text(whole)
    for name, reader in (("key.json", read_key), ("questions.json", lambda folder: StudySession(folder, "ann"))):
        text = (study / name).read_text()
        (study / name).write_text(text[:40])
        with pytest.raises(
            ValueError, match=rf"{name} is no part of a study: .*; put back the file that make_study wrote"
        ):
            reader(study)
        (study / name).write_text(text)
    (study / "key.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds a study whose key\.json is missing: put it back"):
        read_key(study)
