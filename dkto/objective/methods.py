"""The methods that tune from feedback, one entry each: what a method draws, what it minimises, which settings it has.

    METHODS["kto"].draws          "biased": liked samples with probability gamma (paper 4.3)
    method_loss("kto", errors, is_desirable, beta=5000.0)

The trainer and the 2-D laboratory call the same `method_loss`. To add a method, write its function of the errors and
give it an entry in `METHODS`: trainer, batches, model card and command line read the table.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dkto.common.names import check_name
from dkto.objective.losses import dpo_loss, effective_weight, implicit_reward, kto_loss, reference_point, sft_loss
from dkto.objective.utilities import Utility

Draws = Literal["biased", "liked", "all", "pairs", "own"]

# what CSFT writes before the prompt of a liked and of a disliked image: the paper's 5.1.2; HPS v1's released code
CSFT_PREFIXES = {"prefix": ("good image, ", "bad image, "), "negative": ("", "Weird image. ")}


class Errors(NamedTuple):
    """Denoising errors of one batch on the same noise and timesteps, each (..., B).

    `unrelated` holds those under another sample's prompt, or of independent samples, for the reference points of that
    name; it carries no gradient.
    """

    policy: Tensor
    reference: Tensor
    unrelated: "Errors | None" = None


class Felt(NamedTuple):
    """A batch as a method feels it.

    `loss` (...); `reward` (..., B), the implicit reward; `point` (...), the reference point; `slope` (..., B), how
    strongly each sample is felt. None where a method has no such thing. All but the loss are without gradient.
    """

    loss: Tensor
    reward: Tensor | None = None
    point: Tensor | None = None
    slope: Tensor | None = None


def kto(
    errors: Errors,
    is_desirable: Tensor,
    *,
    beta: float | Tensor,
    utility: str | Utility = "kahneman_tversky",
    estimator: str = "batch",
    clamp: bool = True,
    desirable_weight: float | Tensor = 1.0,
    undesirable_weight: float | Tensor = 1.0,
    reduce: Callable[[Tensor], Tensor] | None = None,
) -> Felt:
    """Diffusion-KTO (paper eq. 14-15): rewards, their reference point, and the utility of the gap."""
    reward = implicit_reward(errors.policy, errors.reference, beta)
    unrelated = errors.unrelated and implicit_reward(errors.unrelated.policy, errors.unrelated.reference, beta)
    point = reference_point(
        reward, estimator, is_desirable=is_desirable, unrelated_reward=unrelated, clamp=clamp, reduce=reduce
    )
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    loss = kto_loss(reward, is_desirable, point, utility, **weights)
    slope = effective_weight(reward, is_desirable, point, utility, **weights).abs()
    return Felt(loss, reward.detach(), point, slope)


def dpo(errors: Errors, is_desirable: Tensor, *, beta: float | Tensor) -> Felt:
    """Diffusion-DPO (paper eq. 8); the batch alternates chosen and rejected sides of pairs, whatever their labels."""
    reward = implicit_reward(errors.policy, errors.reference, beta)
    chosen, rejected = reward[..., 0::2], reward[..., 1::2]
    slope = torch.sigmoid(rejected - chosen).detach().repeat_interleave(2, dim=-1)
    return Felt(dpo_loss(chosen, rejected), reward.detach(), slope=slope)


def sft(errors: Errors, is_desirable: Tensor) -> Felt:
    """Supervised fine-tuning on the liked samples (paper eq. 3)."""
    return Felt(sft_loss(errors.policy, is_desirable))


def sft_all(errors: Errors, is_desirable: Tensor) -> Felt:
    """The same on every sample: without the preference, or, for CSFT, with the like in the prompt (paper 5.1.2)."""
    return Felt(sft_loss(errors.policy))


@dataclass(frozen=True)
class Method:
    """One way to tune.

    Attributes:
        title: its name in text and figures.
        trained_on: what it learns from, with its paper; continues "trained ...".
        draws: rows of a step: "biased" by gamma, "liked" ones, "all" alike, "pairs" (chosen, rejected in turn), or
            its "own" images, drawn while it trains (`dkto.training.online`).
        loss: function of `Errors` and likes; its keywords are the settings. None for those that draw their own images.
        more_settings: settings outside the loss.
    """

    title: str
    trained_on: str
    draws: Draws
    loss: Callable[..., Felt] | None = None
    more_settings: tuple[str, ...] = ()

    @property
    def settings(self) -> tuple[str, ...]:
        """Names of the settings that this method has, and others may lack."""
        return (*self._of_loss(), *self.more_settings)

    def loss_settings(self, config: object) -> dict[str, object]:
        """The loss's settings, read from a configuration's attributes of the same names."""
        return {name: getattr(config, name) for name in self._of_loss()}

    def _of_loss(self) -> list[str]:
        return [name for name in _keywords(self.loss) if name != "reduce"] if self.loss else []


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
    reduce: Callable[[Tensor], Tensor] | None = None,
    **settings: object,
) -> Felt:
    """The loss of a method, and what it felt on the way.

    Args:
        name: one of `OFFLINE`.
        errors: policy's and reference's denoising errors, (..., B).
        is_desirable: (..., B) bool.
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
    loss = METHODS[name].loss
    if "reduce" in _keywords(loss):
        settings["reduce"] = reduce
    return loss(errors, is_desirable, **settings)
