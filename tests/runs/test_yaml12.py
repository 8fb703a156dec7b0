import pytest
from hypothesis import given
from hypothesis import strategies as st

from dkto.runs.yaml12 import read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-7", 1e-7),
        ("1E5", 1e5),
        ("-.5", -0.5),
        ("1.", 1.0),
        ("2000", 2000),
        ("-3", -3),
        ("0", 0),
        ("1_000", 1000),
        ("true", True),
        ("null", None),
        ("no", "no"),
        ("on", "on"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("2026-11-24", "2026-11-24"),
        ("'12'", "12"),
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ],
)
def test_a_value_is_what_it_looks_like(text, value):
    read = read_yaml(f"a: {text}")["a"]
    assert read == value
    assert type(read) is type(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_every_float_that_python_writes_is_read_back(number):
    assert read_yaml(f"a: {number!r}")["a"] == number


def test_what_is_no_yaml_names_its_line():
    with pytest.raises(ValueError, match="line 3: expected"):
        read_yaml("a: 1\nb: [1, 2\n")


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(ValueError, match="line 3: 'beta' stands twice"):
        read_yaml("grid:\n  beta: [1]\n  beta: [2]\n")


def test_no_python_object_is_made():
    with pytest.raises(ValueError, match="could not determine a constructor"):
        read_yaml("a: !!python/object/apply:os.system ['true']")


def test_a_control_character_names_its_line():
    with pytest.raises(ValueError, match="line 2: special characters are not allowed"):
        read_yaml("a: 1\nb: \x01\n")
