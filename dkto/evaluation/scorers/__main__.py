"""Weights of the published scorers: python -m dkto.evaluation.scorers convert NAME FILE --sha256 HASH"""

import sys

from dkto.common.commands import Calls, run_commands


def convert(write: Calls("dkto.evaluation.scorers.weights:convert")) -> None:
    """Turn a published pickle into safetensors, after comparing its hash."""
    print(f"converted to {write()}")


def take_question(keep: Calls("dkto.evaluation.scorers.hps_v3:take_question")) -> None:
    """Keep the question of hps_v3 from a copy of its authors' file, which is read and not run."""
    print(f"the question is in {keep()}")


def main(arguments: list[str] | None = None) -> int:
    """Command-line entry; a mistake of the user ends in one sentence and exit code 2."""
    return run_commands((convert, take_question), arguments, "python -m dkto.evaluation.scorers")


if __name__ == "__main__":
    sys.exit(main())
