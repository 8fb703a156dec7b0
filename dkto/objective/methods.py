"""The methods that tune from feedback, one entry each: what a method draws, what it minimises, which settings it has.

    METHODS["kto"].draws          "biased": liked samples with probability gamma (paper 4.3)
    method_loss("kto", errors, is_desirable, beta=5000.0)

The trainer and the 2-D laboratory call the same `method_loss`. To add a method, write its function of the errors (the
paper's are in `paper_methods`, later ones in `newer_methods`) and give it an entry in `METHODS`: trainer, batches,
model card and command line read the table.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

from dkto.common.names import check_name
from dkto.objective.felt import Errors, Felt
from dkto.objective.newer_methods import awm, bco, dgpo, dmpo, nft, sdpo, tgo
from dkto.objective.paper_methods import dpo, kto, sft, sft_all

Draws = Literal["biased", "liked", "all", "pairs", "groups", "own"]

# what CSFT writes before the prompt of a liked and of a disliked image: the paper's 5.1.2; HPS v1's released code
CSFT_PREFIXES = {"prefix": ("good image, ", "bad image, "), "negative": ("", "Weird image. ")}

GIVEN = ("sample_weight", "past", "reduce")  # what a step gives to a loss that takes it; no settings
BRAKES = ("anchor", "sft_weight")  # settings of every loss, beside its own


@dataclass(frozen=True)
class Method:
    """One way to tune.

    Attributes:
        title: its name in text and figures.
        trained_on: what it learns from, with its paper; continues "trained ...".
        draws: rows of a step: "biased" by gamma, "liked" ones, "all" alike, "pairs" (chosen, rejected in turn),
            "groups" (of one prompt; liked, disliked in turn), or its "own" images, drawn while it trains
            (`dkto.training.online`).
        loss: function of `Errors` and likes; its keywords are the settings. None for those that draw their own images.
        more_settings: settings outside the loss.
        reads: what the loss needs beside both errors and the likes: "shift", "overlap", "sample_weight". Whoever
            computes these gives them to no other method.
    """

    title: str
    trained_on: str
    draws: Draws
    loss: Callable[..., Felt] | None = None
    more_settings: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that this method has, and others may lack."""
        return (*self._of_loss(), *self.more_settings)

    def loss_settings(self, config: object) -> dict[str, object]:
        """The loss's settings, read from a configuration's attributes of the same names."""
        return {name: getattr(config, name) for name in self._of_loss()}

    def _of_loss(self) -> list[str]:
        return [name for name in _keywords(self.loss) if name not in GIVEN] if self.loss else []

    def rows_at_once(self, config: object) -> int:
        """How many rows of a batch belong together: two sides of a pair, a group, the noises of one image."""
        if self.draws == "pairs":
            return 2
        name = "group_size" if self.draws == "groups" else "noise_draws"
        return getattr(config, name) if name in self.settings else 1


@cache
def _keywords(loss: Callable[..., Felt]) -> tuple[str, ...]:
    """Names of the arguments behind errors and likes; asked in every step, and the same in each."""
    return tuple(inspect.signature(loss).parameters)[2:]


METHODS: dict[str, Method] = {
    "kto": Method(
        "Diffusion-KTO",
        "on single likes and dislikes (Li et al.,\n"
        "*Aligning Diffusion Models by Optimizing Human Utility*, arXiv 2404.04465)",
        "biased",
        kto,
        ("desirable_fraction",),
    ),
    "dpo": Method(
        "Diffusion-DPO",
        "on pairs of a preferred image and another\n"
        "(Wallace et al., *Diffusion Model Alignment Using Direct Preference Optimization*, arXiv 2311.12908)",
        "pairs",
        dpo,
    ),
    "sft": Method("SFT", "by supervised fine-tuning on liked images alone", "liked", sft),
    "sft_all": Method(
        "SFT on all images",
        "by supervised fine-tuning on liked and disliked images alike, without the preference",
        "all",
        sft_all,
    ),
    "csft": Method(
        "CSFT",
        "by conditional supervised fine-tuning on all images, the like written into the prompt",
        "all",
        sft_all,
        ("csft_style",),
    ),
    "bco": Method(
        "BCO",
        "on single likes and dislikes as a classifier of them\n"
        "(Jung et al., *Binary Classifier Optimization for Large Language Model Alignment*, arXiv 2404.04656)",
        "biased",
        bco,
        ("desirable_fraction",),
    ),
    "tgo": Method(
        "TGO",
        "on likes weighted by their distance from the threshold\n(threshold-guided optimisation, arXiv 2605.04653)",
        "biased",
        tgo,
        ("desirable_fraction",),
        reads=("sample_weight",),
    ),
    "nft": Method(
        "DiffusionNFT, offline",
        "on single likes and dislikes\n"
        "(Zheng et al., *DiffusionNFT: Online Diffusion Reinforcement with Forward Process*, arXiv 2509.16117)",
        "biased",
        nft,
        ("desirable_fraction",),
        reads=("shift",),
    ),
    "awm": Method(
        "AWM on likes",
        "on single likes and dislikes as advantages of 1 and -1\n"
        "(Xue et al., *Advantage Weighted Matching*, arXiv 2509.25050)",
        "biased",
        awm,
        ("desirable_fraction",),
    ),
    "dgpo": Method(
        "DGPO",
        "on groups of liked and disliked images of one prompt\n(Luo et al., *Direct Group Preference Optimization*)",
        "groups",
        dgpo,
    ),
    "dmpo": Method(
        "DMPO",
        "on pairs by the reverse KL (*Divergence Minimization Preference Optimization*, arXiv 2507.07510)",
        "pairs",
        dmpo,
    ),
    "sdpo": Method(
        "Diffusion-SDPO",
        "on pairs, the rejected side slowed where it would harm the chosen one (arXiv 2511.03317)",
        "pairs",
        sdpo,
        reads=("overlap",),
    ),
    "alignprop": Method(
        "AlignProp",
        "on the gradient of a scorer's judgement of its own images\n"
        "(Prabhudesai et al., *Aligning Text-to-Image Diffusion Models with Reward Backpropagation*, arXiv 2310.03739)",
        "own",
        more_settings=("reward", "sampling_steps", "backprop_steps", "guidance"),
    ),
    "d3po": Method(
        "D3PO",
        "on which of two of its own images a scorer prefers (Yang et al.,\n"
        "*Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model*, arXiv 2311.13231)",
        "own",
        more_settings=("reward", "sampling_steps", "guidance", "beta"),
    ),
}
OFFLINE = tuple(name for name, method in METHODS.items() if method.loss is not None)
ONLINE = tuple(name for name, method in METHODS.items() if method.draws == "own")


def method_loss(
    name: str,
    errors: Errors,
    is_desirable: Tensor,
    *,
    anchor: float | Tensor = 0.0,
    sft_weight: float | Tensor = 0.0,
    sample_weight: Tensor | None = None,
    past: Tensor | None = None,
    reduce: Callable[[Tensor], Tensor] | None = None,
    **settings: object,
) -> Felt:
    """The loss of a method with its brakes, and what it felt on the way.

        loss = method's + anchor * mean(d) + sft_weight * mean(e of the liked samples, else 0)

    Args:
        name: one of `OFFLINE`.
        errors: policy's and reference's denoising errors, (..., B).
        is_desirable: (..., B) bool.
        anchor: >= 0, holds the policy's predictions near the reference's; per unit of mean squared error.
        sft_weight: >= 0, holds the policy to what was liked (of pairs, to the chosen side); in the same unit.
        sample_weight: (..., B), see `dkto.objective.losses.kto_loss`; for methods that take it.
        past: see `dkto.objective.losses.running_sums`; for methods that take it.
        reduce: sums a tensor over all processes, see `dkto.objective.losses.reference_point`.
        settings: the method's own, such as `beta` and `utility`.

    Raises:
        ValueError: for an unknown name, or as the functions of `dkto.objective.losses`.
        TypeError: for a setting that the method does not have.

    >>> felt = method_loss("kto", Errors(torch.tensor([0.2]), torch.tensor([0.3])), torch.tensor([True]), beta=10.0)
    >>> felt.reward, felt.point  # with one sample the reference point is its own reward
    (tensor([1.0000]), tensor(1.0000))
    """
    check_name("method", name, OFFLINE)
    method, given = METHODS[name], {"sample_weight": sample_weight, "past": past, "reduce": reduce}
    given = {key: value for key, value in given.items() if key in _keywords(method.loss)}
    felt = method.loss(errors, is_desirable, **given, **settings)
    loss = felt.loss
    if _is_on(anchor):
        if errors.shift is None:
            raise ValueError("anchor needs errors.shift, the squared distance between the predictions")
        loss = loss + anchor * errors.shift.mean(-1)
    if _is_on(sft_weight):
        liked = is_desirable
        if method.draws == "pairs":
            liked = (torch.arange(is_desirable.shape[-1], device=is_desirable.device) % 2 == 0).expand_as(is_desirable)
        loss = loss + sft_weight * torch.where(liked, errors.policy, 0).mean(-1)
    return felt._replace(loss=loss)


def _is_on(brake: float | Tensor) -> bool:
    return isinstance(brake, Tensor) or brake > 0
