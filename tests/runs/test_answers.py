"""What a lesson says back to a typed answer."""

import numpy as np
import pytest
import torch

from dkto.runs import check, findings


@pytest.mark.parametrize(
    ("answer", "right", "sentence"),
    [
        (..., 1.0, "Not answered yet: put your answer in the place of the three dots."),
        (None, 1.0, "Not answered yet: put your answer in the place of the three dots."),
        (0.995, 1.0, "Right."),
        (True, 1, "Right."),
        (2, 1.0, "Not yet: 2 is too large."),
        (float("nan"), 1.0, "Not yet: nan is no number."),
        ("two", 2.0, "Not yet: a number was expected, got 'two'."),
        ([1, 2], 2.0, "Not yet: one number expected, got an array of shape (2,)."),
        ([1, 2, 5], [1, 2, 3], "Not yet, at place 2: 5 is too large."),
        (torch.tensor([1.0, 2.0]), np.array([1, 2]), "Right."),
        (" Yes", "yes", "Right."),
        (3, "yes", "Not yet: 3 is not it."),
        (7, lambda x: x, "Not yet: a function was expected, got 7."),
        (lambda x: ..., lambda x: x, "Not yet"),
    ],
)
def test_an_answer_gets_a_sentence(answer, right, sentence):
    found = check(answer, right, on=[(1.0,)])
    assert bool(found) == (sentence == "Right.")
    assert repr(found) == sentence or (callable(answer) and repr(found).startswith("Not answered yet"))


def test_a_function_is_tried_on_every_call_and_its_error_is_a_sentence():
    assert check(lambda a, b: a + b, lambda a, b: b + a, on=[(1, 2), (3, 4)])
    assert repr(check(lambda a: a, abs, on=[(1,), (-2,)])) == "Not yet, for (-2,): -2 is too small."
    assert "it raises ZeroDivisionError" in repr(check(lambda a: 1 / a, abs, on=[(0,)]))


def test_findings_are_numbered_and_keep_their_numbers():
    assert findings("a 0.1", "b").data == "1. a 0.1\n2. b"
