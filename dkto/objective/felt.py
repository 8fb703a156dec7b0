"""What goes into the loss of a method and what comes out of it: `Errors` and `Felt`."""

from typing import NamedTuple

from torch import Tensor


class Errors(NamedTuple):
    """Denoising errors of one batch on the same noise and timesteps, each (..., B), in mean squared error.

    Attributes:
        policy: of the policy, carries gradient.
        reference: of the frozen reference, without.
        unrelated: those under another sample's prompt, or of independent samples, for the reference points of that
            name; without gradient.
        shift: d, the mean squared distance between the predictions of policy and reference, carries gradient. Brakes
            and some methods read it; it costs no pass.
        overlap: (..., B / 2), mean product of the residuals of the two sides of each pair, without gradient; only
            Diffusion-SDPO reads it.
    """

    policy: Tensor
    reference: Tensor
    unrelated: "Errors | None" = None
    shift: Tensor | None = None
    overlap: Tensor | None = None


class Felt(NamedTuple):
    """A batch as a method feels it; None where a method has no such thing. All but the loss are without gradient.

    Attributes:
        loss: (...).
        reward: (..., B) the implicit reward.
        point: (...) the reference point.
        slope: (..., B) how strongly each sample is felt.
        past: (2, ...) sum and count of all rewards so far, for the "running" point of the next batch.
    """

    loss: Tensor
    reward: Tensor | None = None
    point: Tensor | None = None
    slope: Tensor | None = None
    past: Tensor | None = None
