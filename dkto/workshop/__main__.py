"""For maintainers: makes the weights that ship with the package. A stage that was stopped goes on where it was.

The small Stable Diffusion:

    python -m dkto.workshop vae --folder runs/world --minutes 30
    torchrun --nproc-per-node 2 -m dkto.workshop unet --folder runs/world --samples 1500000
    python -m dkto.workshop export --folder runs/world --output dkto/world/weights

Its learned scorers:

    python -m dkto.workshop preference --folder runs/scorers --output dkto/world/scorers

Three commands of their own keep the rest: `python -m dkto.workshop.keep_lessons` (executed lessons),
`python -m dkto.workshop.results` (tables of results) and `python -m dkto.workshop.site` (web pages).
"""

import sys

import torch
import tyro

from dkto.common.ends import guarded
from dkto.workshop.export import export
from dkto.workshop.pretrain import train_unet, train_vae
from dkto.workshop.scorers_card import train_scorers

STAGES = {"vae": train_vae, "unet": train_unet, "export": export, "preference": train_scorers}


def main() -> None:
    """Command-line entry; the functions say what their options mean."""
    torch.set_num_threads(1)
    tyro.extras.subcommand_cli_from_dict(STAGES, prog="python -m dkto.workshop", description=__doc__)


if __name__ == "__main__":
    sys.exit(guarded(main, "dkto.workshop"))
