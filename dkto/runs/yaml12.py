"""YAML as its version 1.2 has it: 1e-7 is a number, `no` is text, 1:30 is no minute, and a key stands once.

What a sweep does not need is refused with its line: anchors and aliases, of which a few lines can be gigabytes, tags,
which name a type, lists in lists more than `DEEPEST` deep, and keys that are no text.
"""

import re

import yaml

from dkto.common.names import printable, shown

DEEPEST = 20  # levels of lists and mappings in each other


class _Loader(yaml.SafeLoader):
    """YAML whose plain values are what they look like: 1e-7 is a number, `no` is text, a key stands once."""

    yaml_implicit_resolvers = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: object) -> yaml.Node:
        event = self.peek_event()
        where = f"line {event.start_mark.line + 1}"
        if getattr(event, "anchor", None) is not None:
            raise ValueError(f"{where}: {shown(event.anchor)} is an anchor or an alias: write the value out")
        if getattr(event, "tag", None) is not None:
            raise ValueError(f"{where}: {shown(event.tag)} is a tag: values are what they look like, leave it out")
        if self.depth == DEEPEST:
            raise ValueError(f"{where}: lists and mappings must be at most {DEEPEST} deep in each other")
        if isinstance(event, yaml.ScalarEvent):
            event.value = _whole(event.value, where)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            where = f"line {key.start_mark.line + 1}"
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError(f"{where}: a key must be a name, got a list or a mapping")
            if key.value in seen:
                raise ValueError(f"{where}: {shown(key.value)} stands twice")
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def _whole(text: str, where: str) -> str:
    """A text whose escapes may spell one sign in two halves, as JSON does."""
    try:
        return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: {shown(text)} holds half a sign") from error


_INTEGER = r"[-+]?(0|[1-9][0-9_]{0,400})"
_NUMBER = r"[-+]?(0|[1-9][0-9_]*)(\.[0-9]*)?([eE][-+]?[0-9]+)?|[-+]?\.[0-9]+([eE][-+]?[0-9]+)?"
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(~|null|)$"), ["~", "n", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(f"^{_INTEGER}$"), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(f"^({_NUMBER})$"), list("-+.0123456789"))


def read_yaml(text: str) -> object:
    """YAML read by the looks of each value, as its version 1.2 has it, and by nothing else.

    Raises:
        ValueError: if it is not YAML, a key stands twice, or it holds what is refused here; the sentence names the
            line.

    >>> read_yaml("{learning_rate: 1e-7, steps: 12, name: no, at: 1:30}")
    {'learning_rate': 1e-07, 'steps': 12, 'name': 'no', 'at': '1:30'}
    >>> read_yaml("a: &x [1]\\nb: *x")
    Traceback (most recent call last):
    ValueError: line 1: 'x' is an anchor or an alias: write the value out
    """
    try:
        return yaml.load(text, _Loader)  # a SafeLoader
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ValueError(f"line {line}: {printable(error.problem, 200)}") from error
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ValueError(f"line {line}: {error.reason}") from error
    except yaml.YAMLError as error:
        raise ValueError(f"it cannot be read as YAML: {printable(error, 200)}") from error
