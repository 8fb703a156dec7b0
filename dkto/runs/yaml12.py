"""YAML as its version 1.2 has it: 1e-7 is a number, `no` is text, 1:30 is no minute, and a key stands once."""

import re

import yaml


class _Loader(yaml.SafeLoader):
    """YAML whose plain values are what they look like: 1e-7 is a number, `no` is text, a key stands once."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if key.value in seen:
                raise ValueError(f"line {key.start_mark.line + 1}: {key.value!r} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_NUMBER = r"[-+]?(0|[1-9][\d_]*)(\.\d*)?([eE][-+]?\d+)?|[-+]?\.\d+([eE][-+]?\d+)?"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(0|[1-9][\d_]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({_NUMBER})$"), list("-+.0123456789"))


def read_yaml(text: str) -> object:
    """YAML read by the looks of each value, as its version 1.2 has it, and by nothing else.

    Raises:
        ValueError: if it is not YAML, or a key stands twice; the sentence names the line.

    >>> read_yaml("{learning_rate: 1e-7, steps: 12, name: no, at: 1:30}")
    {'learning_rate': 1e-07, 'steps': 12, 'name': 'no', 'at': '1:30'}
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {error.problem}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: {error.reason}") from error
