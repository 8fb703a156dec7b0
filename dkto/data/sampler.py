"""The biased sampler: which rows a step sees (paper 4.3)."""

import numpy as np

from dkto.common.settings import checked_number

ROWS_STREAM = 0  # of the random numbers of a step; the trainer's own streams start at 1


class BiasedSampler:
    """Draw rows so that a row is desirable with probability `desirable_fraction` (paper 4.3).

    Within a class every row is equally likely:

        P(row) = gamma / n_desirable   or   (1 - gamma) / n_undesirable

    The draw depends only on (seed, step, index in the global batch), so any rank can compute its
    share and a resumed run sees what it would have seen. A draw costs the same whatever the number of
    rows; starting is one pass over N booleans.

    Args:
        is_desirable: (N,) bool.
        desirable_fraction: gamma, in [0, 1]; the paper's best is 0.8.
        seed: non-negative integer.

    Raises:
        ValueError: if gamma is outside [0, 1], or asks for a class that has no row.

    >>> sampler = BiasedSampler(np.array([True, False, False]), desirable_fraction=1.0, seed=0)
    >>> sampler.rows(step=3, batch_size=4).tolist()
    [0, 0, 0, 0]
    """

    def __init__(self, is_desirable: np.ndarray, desirable_fraction: float, seed: int) -> None:
        desirable_fraction = checked_number("desirable_fraction", desirable_fraction, float, least=0, most=1)
        is_desirable = np.asarray(is_desirable)
        self.desirable = np.flatnonzero(is_desirable)
        self.undesirable = np.flatnonzero(~is_desirable)
        for name, rows, wanted in (
            ("liked", self.desirable, desirable_fraction > 0),
            ("disliked", self.undesirable, desirable_fraction < 1),
        ):
            if wanted and len(rows) == 0:
                raise ValueError(
                    f"feedback of one class only: no {name} image among {len(is_desirable)}, "
                    f"but desirable_fraction={desirable_fraction} draws {name} ones"
                )
        self.desirable_fraction, self.seed = desirable_fraction, seed

    def rows(self, step: int, batch_size: int) -> np.ndarray:
        """Row numbers of the whole global batch of one step, (batch_size,) int64."""
        rng = np.random.Generator(np.random.Philox(key=self.seed, counter=[0, 0, ROWS_STREAM, step]))
        which_class, position = rng.random((batch_size, 2)).T  # the i-th sample reads the i-th two numbers
        from_desirable = which_class < self.desirable_fraction
        rows = np.empty(batch_size, np.int64)
        for chosen, members in ((from_desirable, self.desirable), (~from_desirable, self.undesirable)):
            rows[chosen] = members[(position[chosen] * len(members)).astype(np.int64)]
        return rows
