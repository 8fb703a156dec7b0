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


NINE = "\n".join(["a0: &a0 [x, x]", *(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 10))])


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "a: !!python/object/apply:os.system ['true']",
            r"line 1: 'tag:yaml.org,2002:python/object/apply:os.system' is a",
        ),
        ("a: 1\nb: !!bool x", r"line 2: 'tag:yaml.org,2002:bool' is a tag"),
        ("a: !mine [1]", r"line 1: '!mine' is a tag"),
        ("a: !!set {b}", r"line 1: .* is a tag"),
        (NINE, r"line 1: 'a0' is an anchor or an alias: write the value out"),
        ("a: 1\nb: *a", r"line 2: 'a' is an anchor or an alias"),
        ("a: &b 1", r"line 1: 'b' is an anchor or an alias"),
        ("[" * 3000, r"line 1: lists and mappings must be at most 20 deep in each other"),
        ("\n".join(f"{' ' * n}- a:" for n in range(0, 200, 2)), r"line 10: lists and mappings must be at most 20 deep"),
        ("{[1]: 2}", r"line 1: a key must be a name, got a list or a mapping"),
        ("? {a: 1}\n: 2", r"line 1: a key must be a name, got a list or a mapping"),
        ("a: 1\n---\nb: 2", r"line 2: but found another document"),
        ('a: "\\ud800"', r"line 1: '\\ud800' holds half a sign"),
        ("%YAML 3.0\n---\na: 1", r"line 1: found incompatible YAML document"),
        (f"{'k' * 500}: 1\n{'k' * 500}: 2", r"line 2: 'kkkk"),
    ],
)
def test_what_a_sweep_does_not_need_is_refused_with_its_line(text, sentence):
    with pytest.raises(ValueError, match=f"^{sentence}") as caught:
        read_yaml(text)
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_numbers_are_those_of_ascii_and_of_any_length():
    assert read_yaml("[1٣, 1e999]") == ["1٣", float("inf")] and read_yaml("9" * 5000) == float("inf")
    assert read_yaml('"\\ud83d\\ude00"') == "\U0001f600"


def test_a_control_character_names_its_line():
    with pytest.raises(ValueError, match="line 2: special characters are not allowed"):
        read_yaml("a: 1\nb: \x01\n")
