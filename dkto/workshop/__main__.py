"""The stages that make the small Stable Diffusion:

python -m dkto.workshop vae --folder runs/world --minutes 30
torchrun --nproc-per-node 2 -m dkto.workshop unet --folder runs/world --samples 1500000
python -m dkto.workshop export --folder runs/world --output dkto/world/weights

and its learned scorers:

python -m dkto.workshop preference --folder runs/scorers --output dkto/world/scorers
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from diffusers import AutoencoderKL

from dkto.workshop.export import assemble, card_figures, write_card
from dkto.workshop.pretrain import (
    SCHEDULE,
    Denoiser,
    new_text_encoder,
    new_unet,
    paint_scenes,
    psnr,
    to_pixel_values,
    train_unet,
    train_vae,
)
from dkto.workshop.scorers_card import train_scorers
from dkto.workshop.tokenizer import build_tokenizer


@dataclass(frozen=True)
class Vae:
    """Train the autoencoder."""

    folder: Path
    minutes: float = 30.0
    scenes: int = 48_000
    seed: int = 0

    def run(self) -> None:
        train_vae(self.folder, self.minutes, scenes=self.scenes, seed=self.seed, batch=10)


@dataclass(frozen=True)
class Unet:
    """Train UNet and text encoder."""

    folder: Path
    samples: int = 1_500_000
    cooldown: float = 0.25
    """Share of `samples` over which the rate falls to 1 %."""
    two_things: float = 0.5
    """Share of samples with two things; raise it once lone things are right, for the sake of relations."""
    emphasis: float = 1.0
    """Up to how much more a high-noise step counts; 12 teaches relations."""
    start_from: Path | None = None
    """Pipeline folder, such as the shipped one, to start from where `folder` holds no state yet."""
    scenes: int = 48_000
    batch: int = 24
    lr: float = 1e-3
    seed: int = 0

    def run(self) -> None:
        train_unet(
            self.folder,
            samples=self.samples,
            cooldown=self.cooldown,
            two_things=self.two_things,
            emphasis=self.emphasis,
            start_from=self.start_from,
            scenes=self.scenes,
            seed=self.seed,
            batch=self.batch,
            lr=self.lr,
        )


@dataclass(frozen=True)
class Export:
    """Put the averaged weights together as a pipeline, measure it and write its card."""

    folder: Path
    output: Path
    state: str = "unet-cooling.pt"
    """Which training state: unet.pt before the rate decays, unet-cooling.pt after."""

    def run(self) -> None:
        state = torch.load(self.folder / self.state, weights_only=True)
        tokenizer = build_tokenizer(self.folder / "tokenizer")
        model = Denoiser(new_unet(), new_text_encoder(len(tokenizer), tokenizer.eos_token_id, tokenizer.bos_token_id))
        model.load_state_dict(state["ema"])
        assemble(model.unet, model.text_encoder, self.folder / "tokenizer", self.folder / "vae", self.output, SCHEDULE)
        vae = AutoencoderKL.from_pretrained(self.output, subfolder="vae")
        images, captions = paint_scenes(self.folder, 0, 0)
        held_out = to_pixel_values(images[-128:])
        with torch.no_grad():
            quality = psnr(vae.decode(vae.encode(held_out).latent_dist.mean).sample, held_out)
        count = sum(p.numel() for part in (model, vae) for p in part.parameters())
        about = {"samples": state["seen"], "scenes": len(captions), "vae_psnr": quality, "parameters": count / 1e6}
        figures = card_figures(self.output)
        write_card(self.output, figures, about)
        print(figures)


@dataclass(frozen=True)
class Preference:
    """Train the learned scorers: a small CLIP and a preference model, in minutes on one core."""

    folder: Path
    output: Path
    pairs: int = 4_000
    """Painted pairs of training prompts."""
    test_pairs: int = 1_000
    """Painted pairs of test prompts, for the card."""
    clip_steps: int = 900
    preference_steps: int = 600
    seed: int = 0

    def run(self) -> None:
        train_scorers(
            self.folder,
            self.output,
            pairs=self.pairs,
            test_pairs=self.test_pairs,
            clip_steps=self.clip_steps,
            preference_steps=self.preference_steps,
            seed=self.seed,
        )


def main() -> None:
    """Command-line entry."""
    torch.set_num_threads(1)
    tyro.extras.subcommand_cli_from_dict({"vae": Vae, "unet": Unet, "export": Export, "preference": Preference}).run()


if __name__ == "__main__":
    main()
