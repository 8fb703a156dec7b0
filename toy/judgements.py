"""Prompts, images and a user who judges them, one at a time or two: what likes and pairs each say about a taste.

A prompt has a few images, each a point of features phi. The user's reward is a direction of taste and the luck of the
prompt, which no policy can change:

    reward = taste . phi + luck of the prompt
    policy: p(image | prompt) proportional to exp(theta . phi); the reference draws them all alike

Minus log p takes the place of the denoising error, so e_ref - e is the exact log-ratio and `dkto.objective.method_loss`
trains theta. Leading dimensions (S) are seeds: worlds, judgements and trainings of their own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dkto.common.settings import checked_number
from dkto.objective.felt import Errors
from dkto.objective.methods import METHODS, method_loss

BATCH, STEPS, RATE = 64, 200, 0.05  # of every training: rows, Adam's steps, their rate
KL = 0.5  # nats from the reference, at which policies are compared
FARTHEST = 64.0  # length of theta at which the search for that KL ends


@dataclass(frozen=True)
class Judged:
    """Judgements of S seeds, padded to equal length: B single ones, or B sides of pairs, chosen and rejected in turn.

    Attributes:
        prompt, image: (S, B) numbers of each.
        liked: (S, B) bool; in pairs the chosen side.
        real: (S, B) bool, False where a seed has fewer judgements.
    """

    prompt: Tensor
    image: Tensor
    liked: Tensor
    real: Tensor


@dataclass(frozen=True)
class World:
    """Worlds of S seeds.

    Attributes:
        features: (S, P, N, D) of N images of P prompts; a normal draw.
        taste: (S, D) of length 2, so that the rewards of one prompt's images have a standard deviation of 2.
        luck: (S, P) of each prompt.
        seed: of all draws.
    """

    features: Tensor
    taste: Tensor
    luck: Tensor
    seed: int

    @classmethod
    def make(
        cls, seeds: int, *, prompts: int, images: int = 16, dimensions: int = 8, spread: float = 1.0, seed: int = 0
    ) -> "World":
        """Draw worlds; `spread` is the standard deviation of the prompts' luck, in rewards."""
        make = torch.Generator().manual_seed(seed)
        taste = torch.randn(seeds, dimensions, generator=make)
        features = torch.randn(seeds, prompts, images, dimensions, generator=make)
        luck = spread * torch.randn(seeds, prompts, generator=make)
        return cls(features, 2 * taste / taste.norm(dim=-1, keepdim=True), luck, seed)

    def others(self, prompts: int, part: int = 0) -> "World":
        """Other prompts of the same users, to choose settings on (`part` 0) or to judge a policy on (1)."""
        dice = self._dice(6 + part)
        shape = (len(self.taste), prompts, *self.features.shape[2:])
        features = torch.randn(shape, generator=dice)
        return World(features, self.taste, torch.zeros(shape[:2]), self.seed + 1)

    @property
    def rewards(self) -> Tensor:
        """(S, P, N) of every image."""
        return (self.features @ self.taste[:, None, :, None])[..., 0] + self.luck[..., None]

    def likes(self, *, per_prompt: int = 2, share: float = 0.5, noise: float = 1.0, flips: float = 0.0) -> Judged:
        """The first images of every prompt, each liked where its noisy reward is above one threshold for all.

        Args:
            per_prompt: images of each prompt that the user sees.
            share: of images that would be liked; sets the threshold.
            noise: scale of logistic noise on each reward.
            flips: chance of a wrong answer.
        """
        rewards = self._seen(per_prompt)
        noisy = rewards + noise * torch.rand(rewards.shape, generator=self._dice(1)).logit(1e-6)
        threshold = torch.quantile(noisy.flatten(1), 1 - share, dim=1)
        liked = (noisy > threshold[:, None, None]) ^ (torch.rand(rewards.shape, generator=self._dice(2)) < flips)
        prompt, image = _numbers(rewards.shape)
        return Judged(prompt, image, liked.flatten(1), torch.ones_like(prompt, dtype=torch.bool))

    def pairs(self, *, per_prompt: int = 2, noise: float = 1.0, flips: float = 0.0) -> Judged:
        """The same images, each compared with the next of its prompt (Bradley-Terry, paper eq. 4).

        Raises:
            ValueError: if a prompt has one image only.
        """
        checked_number("per_prompt", per_prompt, least=2)
        rewards = self._seen(per_prompt)
        gap = (rewards[..., :-1] - rewards[..., 1:]) / max(noise, 1e-9)
        first = torch.rand(gap.shape, generator=self._dice(3)) < torch.sigmoid(gap)
        first ^= torch.rand(gap.shape, generator=self._dice(4)) < flips
        prompt, image = (numbers.unflatten(1, gap.shape[1:]) for numbers in _numbers(gap.shape))
        sides = torch.stack([torch.where(first, image, image + 1), torch.where(first, image + 1, image)], -1)
        sides = sides.flatten(1)
        liked = torch.tensor([True, False]).expand(len(sides), -1).repeat(1, sides.shape[1] // 2)
        return Judged(prompt[..., None].expand(*prompt.shape, 2).flatten(1), sides, liked, torch.ones_like(liked))

    def train(self, method: str, judged: Judged, beta: Tensor | float = 1.0, gamma: float = 0.8, **settings) -> Tensor:
        """Tune theta from 0 on judgements; (S, D), or (K, S, D) for K values of beta.

        Args:
            method: a name in `dkto.objective.METHODS` whose errors need no image.
            judged: single judgements, or pairs for a method on pairs.
            beta: () or (K,) reward scale, per nat; a method without one ignores it.
            gamma: chance that a single judgement is drawn from the liked ones, where there are both.
            settings: of the method.
        """
        beta = torch.as_tensor(beta, dtype=torch.float32)
        theta = torch.zeros(*beta.shape, *self.taste.shape, requires_grad=True)
        optimizer, dice = torch.optim.Adam([theta], lr=RATE), self._dice(5)
        weights = _chances(method, judged, gamma)
        scale = {"beta": beta[..., None].expand(theta.shape[:-1])} if "beta" in METHODS[method].settings else {}
        seeds = torch.arange(len(self.taste))[:, None]
        for _ in range(STEPS):
            rows = torch.multinomial(weights, BATCH // (1 + _paired(method)), replacement=True, generator=dice)
            rows = torch.stack([2 * rows, 2 * rows + 1], -1).flatten(1) if _paired(method) else rows
            of, shown = self.features[seeds, judged.prompt[seeds, rows]], judged.image[seeds, rows]
            logits = torch.einsum("sbnd,...sd->...sbn", of, theta)
            chosen = logits.gather(-1, shown.expand(logits.shape[:-1])[..., None])[..., 0]
            errors = Errors(logits.logsumexp(-1) - chosen, torch.full_like(chosen, math.log(of.shape[2])))
            liked = judged.liked[seeds, rows].expand(chosen.shape)
            loss = method_loss(method, errors, liked, **scale, **settings).loss.sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        return theta.detach()

    def gain(self, theta: Tensor) -> Tensor:
        """Reward won over the reference at a KL of 0.5 nats, as a share of what the taste itself wins there; (..., S).

        Theta is lengthened or shortened to that KL first, so that only what was learned counts and not how far a
        training went. 1 is the best possible, 0 a direction that says nothing.
        """
        ours = self._reward_at(_to_kl(self.features, theta))
        return ours / self._reward_at(_to_kl(self.features, self.taste))

    def _reward_at(self, theta: Tensor) -> Tensor:
        tasted = (self.features @ self.taste[:, None, :, None])[..., 0]
        return ((_policy(self.features, theta) - 1 / tasted.shape[-1]) * tasted).sum(-1).mean(-1)

    def _seen(self, per_prompt: int) -> Tensor:
        checked_number("per_prompt", per_prompt, least=1, most=self.features.shape[2])
        return self.rewards[..., :per_prompt]

    def _dice(self, part: int) -> torch.Generator:
        return torch.Generator().manual_seed(1_000_003 * (self.seed + 1) + part)


def _numbers(shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Numbers of prompt and image, (S, B) each, of all images (S, P, K)."""
    seeds, prompts, images = shape
    prompt = torch.arange(prompts).repeat_interleave(images).expand(seeds, -1)
    return prompt, torch.arange(images).repeat(prompts).expand(seeds, -1)


def _paired(method: str) -> bool:
    return METHODS[method].draws == "pairs"


def _chances(method: str, judged: Judged, gamma: float) -> Tensor:
    """Chance of each judgement, or of each pair, to be drawn; a class that a seed does not have is never drawn."""
    real = judged.real.float()
    if _paired(method):
        return real[:, ::2]
    sides = torch.stack([judged.liked * real, ~judged.liked * real])
    shares = sides / sides.sum(-1, keepdim=True).clamp(min=1)
    draws = {"liked": (1.0, 0.0), "biased": (gamma, 1 - gamma)}
    if METHODS[method].draws == "all":
        return real
    weights = torch.einsum("c,csb->sb", torch.tensor(draws[METHODS[method].draws]), shares)
    return torch.where(weights.sum(-1, keepdim=True) > 0, weights, real)


def _policy(features: Tensor, theta: Tensor) -> Tensor:
    return torch.einsum("spnd,...sd->...spn", features, theta).softmax(-1)


def _to_kl(features: Tensor, theta: Tensor) -> Tensor:
    """Theta at the length where the mean KL to the reference is `KL`, by bisection; a zero one stays."""
    unit = theta / theta.norm(dim=-1, keepdim=True).clamp(min=1e-12)
    low, high = torch.zeros_like(unit[..., :1]), torch.full_like(unit[..., :1], FARTHEST)
    for _ in range(40):
        middle = (low + high) / 2
        policy = _policy(features, middle * unit)
        kl = torch.xlogy(policy, policy * policy.shape[-1]).sum(-1).mean(-1)[..., None]
        low, high = torch.where(kl < KL, middle, low), torch.where(kl < KL, high, middle)
    return middle * unit


def as_pairs(judged: Judged) -> Judged:
    """Pairs of a liked and a disliked image of one prompt, an image in one at most; their number differs by seed."""
    found = []
    for prompt, image, liked in zip(judged.prompt, judged.image, judged.liked, strict=True):
        rows: list[tuple[int, int]] = []
        for number in prompt.unique().tolist():
            here = (prompt == number).nonzero()[:, 0]
            rows += zip(here[liked[here]].tolist(), here[~liked[here]].tolist(), strict=False)
        order = torch.tensor(rows, dtype=torch.long).reshape(-1)
        found.append((prompt[order], image[order]))
    width = max(2, *(len(prompt) for prompt, _ in found))
    padded = [torch.stack([torch.nn.functional.pad(part, (0, width - len(part))) for part in each]) for each in found]
    prompts, images = torch.stack(padded, 1)
    real = torch.arange(width) < torch.tensor([len(prompt) for prompt, _ in found])[:, None]
    liked = torch.tensor([True, False]).repeat(width // 2).expand(len(found), -1)
    return Judged(prompts, images, liked, real)
