"""Command lines made of functions: options are parameters, with the types, defaults and help that these have anyway.

A command has options of its own, `held_out: Annotated[float, "share to set apart"] = 0.0`, and those of the functions
that it calls, `read: Calls("dkto.data.feedback:read_feedback")`, whose help is in their docstrings. Only the command
that is asked for imports what it calls.
"""

import inspect
import pkgutil
import sys
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, get_origin, get_type_hints

from dkto.common.ends import guarded
from dkto.common.names import not_known

SIMPLER = {str | Path: str, str | Path | None: str | None}  # to a command line both are text


@dataclass(frozen=True)
class Calls:
    """Annotates a parameter of a command: it gets this function or class, bound to what the command line says."""

    target: str  # "module:function", or "module:Class"
    without: str = ""  # names of parameters, blank-separated, that are no options: the command gives them itself


def run_commands(functions: Iterable[Callable[..., None]], arguments: list[str] | None, prog: str) -> int:
    """Run the command that the arguments name; it ends as `dkto.common.ends.guarded` says.

    The list of all commands shows the first line of each function's docstring. Without `arguments`, it takes those of
    this process.
    """
    own_process, arguments = arguments is None, sys.argv[1:] if arguments is None else arguments
    commands = {function.__name__.replace("_", "-"): function for function in functions}
    return guarded(lambda: _call(commands, arguments, prog), prog.split()[-1], own_process=own_process)


def _call(commands: dict[str, Callable[..., None]], arguments: list[str], prog: str) -> None:
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(f"usage: {prog} COMMAND [OPTIONS]; {prog} COMMAND --help says more\n")
        print("\n".join(f"  {name:<14}{command.__doc__.splitlines()[0]}" for name, command in commands.items()))
        return
    import tyro

    if name.startswith("--tyro-"):  # completion of a shell
        tyro.extras.subcommand_cli_from_dict({n: command_line(c) for n, c in commands.items()}, args=[name, *rest])
    if name not in commands:
        raise ValueError(not_known(f"there is no command {name!r}", name, commands))
    words = {word.partition("=")[0].replace("_", "-").replace("--no-", "--") for word in rest}
    given = {word.removeprefix("--").replace("-", "_") for word in words if word.startswith("--")}
    tyro.cli(command_line(commands[name], given), args=rest, prog=f"{prog} {name}")()


def command_line(command: Callable[..., None], given: Container[str] = ()) -> Callable[..., Callable[[], None]]:
    """A function of all options of a command, for `tyro.cli`; it returns the command with its options filled in.

    A required parameter is positional, unless it is keyword-only, of a class, or an `output_dir`. What a command calls
    is bound to those that are `given` or are not the default: the command may choose the rest itself.

    >>> def greet(name: str, times: Annotated[int, "how often"] = 1) -> None:
    ...     "Say hello."
    ...     print("hello", *[name] * times)
    >>> import tyro
    >>> tyro.cli(command_line(greet), args=["Ada", "--times", "2"])()
    hello Ada Ada
    """
    options, called = {}, {}
    for name, option in _options(command).items():
        if isinstance(calls := option.annotation, Calls):
            function = pkgutil.resolve_name(calls.target)
            own = {key: each for key, each in _options(function).items() if key not in calls.without.split()}
            called[name] = function, list(own)
            options |= own
        else:
            options[name] = option

    def filled_in(**values: object) -> Callable[[], None]:
        chosen = {key for key, option in options.items() if key in given or values[key] != option.default}
        bound = {
            n: partial(each, **{key: values[key] for key in names if key in chosen})
            for n, (each, names) in called.items()
        }
        taken = {key for _, names in called.values() for key in names}  # two functions may share an option
        return partial(command, **{key: value for key, value in values.items() if key not in taken}, **bound)

    filled_in.__doc__ = command.__doc__
    filled_in.__signature__ = inspect.Signature(list(options.values()))
    filled_in.__annotations__ = {name: option.annotation for name, option in options.items()}
    return filled_in


def _options(function: Callable) -> dict[str, inspect.Parameter]:
    """Parameters by name, annotated for tyro: with their help, and whether they are positional."""
    import tyro  # an interruption while it is imported ends in a sentence too
    from docstring_parser import parse_from_object

    hints, help_of = get_type_hints(function, include_extras=True), {}
    for described in (function,) if not inspect.isclass(function) else function.__mro__[-2::-1]:  # fields are inherited
        for entry in parse_from_object(described).params:
            text = " ".join((entry.description or "").split()).rstrip(".")
            help_of |= dict.fromkeys(entry.arg_name.split(", "), text)
    found = {}
    for name, parameter in inspect.signature(function).parameters.items():
        hint = SIMPLER.get(hints[name], hints[name])
        if not isinstance(hint, Calls):
            text = hint.__metadata__[0] if get_origin(hint) is Annotated else help_of.get(name)
            required = parameter.default is parameter.empty and parameter.kind is not parameter.KEYWORD_ONLY
            if required and name != "output_dir" and not inspect.isclass(function):
                hint = tyro.conf.Positional[Annotated[hint, tyro.conf.arg(help=text, metavar=name.upper())]]
            else:
                hint = Annotated[hint, tyro.conf.arg(help=text)]
        found[name] = parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY)
    return found
