"""What the benchmarks make of their repetitions."""

import numpy as np


def interval(values):
    """Median with the 95 % interval of a bootstrap over the repetitions."""
    values = np.asarray(values)
    drawn = np.random.default_rng(0).choice(values, (2000, len(values)))
    low, high = np.quantile(np.median(drawn, 1), [0.025, 0.975])
    return {"value": float(np.median(values)), "low": float(low), "high": float(high), "n": len(values)}
