"""Guidance by dislikes: what was learned of liked and of disliked images steers the drawing, and no loss compares them.

    contrast   eps = eps_cfg + strength (eps_liked - eps_disliked), of the prompt     cPGD, arXiv 2602.18799
    negative   eps = eps_not + guidance (eps_liked - eps_not)
               eps_not = (1 - strength) eps_base + strength eps_disliked, of no prompt  Diffusion-NPO, ICLR 2025

`eps_cfg` is the base's under classifier-free guidance. Either adapter may come from plain fine-tuning (SFT) on one side
of the likes; without a liked one, the base takes its place. CHATS also mixes its prompts: not done.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

FORMS = ("contrast", "negative")


class DislikeGuided(nn.Module):
    """Takes the place of a pipeline's denoiser while it draws.

    Args:
        base: the denoiser as it is, as the pipeline would call it.
        liked, disliked: the same with an adapter of liked and of disliked images; `liked` may be `base` itself.
        form: one of `FORMS`.

    `strength` and `guided` (whether the pipeline joins the batch without prompts and the one with prompts, as it does
    above a guidance scale of 1) are set before each drawing.
    """

    def __init__(self, base: nn.Module, liked: nn.Module, disliked: nn.Module, form: str) -> None:
        super().__init__()
        self.base, self.liked, self.disliked, self.form = base, liked, disliked, form
        self.config, self.strength, self.guided = base.config, 0.0, True

    @property
    def dtype(self) -> torch.dtype:
        """Of the base."""
        return self.base.dtype

    @property
    def device(self) -> torch.device:
        """Of the base."""
        return self.base.device

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor]:
        """What the pipeline takes for the denoiser's prediction, shape of the noisy latents."""
        without, prompted = self._halves(args, kwargs)
        if self.form == "negative":
            base, disliked = self._ask(self.base, without), self._ask(self.disliked, without)
            return (torch.cat([torch.lerp(base, disliked, self.strength), self._ask(self.liked, prompted)]),)
        step = self.strength * (self._ask(self.liked, prompted) - self._ask(self.disliked, prompted))
        plain = self._ask(self.base, (args, kwargs))
        # added to both halves: the pipeline's own guidance then leaves it as it is
        return (plain + (torch.cat([step, step]) if self.guided else step),)

    def _ask(self, network: nn.Module, given: tuple[tuple, dict]) -> Tensor:
        args, kwargs = given
        return network(*args, **kwargs | {"return_dict": False})[0]

    def _halves(self, args: tuple, kwargs: dict) -> tuple[tuple[tuple, dict], tuple[tuple, dict]]:
        """The call for the rows without a prompt, and for those with one; both are all rows where none is guided."""
        if not self.guided:
            return (args, kwargs), (args, kwargs)
        rows = len(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states")))
        cuts = (lambda value: value[: rows // 2], lambda value: value[rows // 2 :])
        without, prompted = ((_cut(args, rows, cut), _cut(kwargs, rows, cut)) for cut in cuts)
        return without, prompted


def _cut(value: Any, rows: int, cut: Callable[[Tensor], Tensor]) -> Any:
    """Every tensor of `rows` rows in nested arguments, cut."""
    if isinstance(value, Tensor) and value.ndim and len(value) == rows:
        return cut(value)
    if isinstance(value, dict):
        return {key: _cut(each, rows, cut) for key, each in value.items()}
    return tuple(_cut(each, rows, cut) for each in value) if isinstance(value, tuple) else value
