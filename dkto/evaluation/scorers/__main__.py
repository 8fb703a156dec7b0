"""Weights of the published scorers: python -m dkto.evaluation.scorers convert NAME FILE --sha256 HASH"""

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from dkto.evaluation.scorers.weights import convert


@dataclass(frozen=True)
class Convert:
    """Turn a published pickle into safetensors, after comparing its hash."""

    name: tyro.conf.Positional[str]
    """hps_v2, hps_v2_1, image_reward or laion_aesthetics."""
    source: tyro.conf.Positional[Path]
    """The downloaded file."""
    sha256: str = ""
    """Its hash as its page shows; needed where the project does not know it."""

    def run(self) -> None:
        print(f"converted to {convert(self.name, self.source, self.sha256)}")


def main(arguments: list[str] | None = None) -> int:
    """Command-line entry; a mistake of the user ends in one sentence and exit code 2."""
    command = tyro.extras.subcommand_cli_from_dict(
        {"convert": Convert}, args=arguments, prog="python -m dkto.evaluation.scorers"
    )
    try:
        command.run()
    except (ValueError, KeyError, FileNotFoundError) as error:
        print(f"dkto.evaluation.scorers: {error.args[0] if isinstance(error, KeyError) else error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
