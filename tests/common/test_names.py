import pytest

from dkto.common.names import check_choice, check_name, not_known


def test_an_unknown_name_is_refused_with_the_nearest_and_all_that_are_known():
    assert check_name("user", "red", ["red", "vivid"]) is None and check_choice("ties", "liked", {"liked": 1}) is None
    assert not_known("no stage 'tran'", "tran", ["train"], "earlier") == (
        "no stage 'tran'; did you mean 'train'? earlier: train"
    )
    assert not_known("no stage 'tran'", "tran", [], "earlier") == "no stage 'tran'; earlier: none"
    with pytest.raises(KeyError, match="unknown user 'vivd'; did you mean 'vivid'"):
        check_name("user", "vivd", {"red": 1, "vivid": 2}, KeyError)


@pytest.mark.parametrize("wrong", [3, None, ["red"], {"red": 1}])
def test_what_is_no_name_at_all_is_refused_in_the_same_sentence(wrong):
    with pytest.raises(ValueError, match=r"unknown user .*known: red, vivid"):
        check_name("user", wrong, {"red": 1, "vivid": 2})
