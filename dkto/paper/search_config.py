"""The sizes of a search of settings; read by the command line without loading any model."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class SearchConfig:
    """How settings are searched on the small world."""

    output_dir: Path = Path("papermill_runs/outputs/search")
    """Pool, tries and images land here; called again, it goes on."""
    user: str = "balanced"
    """Simulated user, a name in dkto.paper.pool.TASTES."""
    pool_prompts: int = 200
    """Training prompts whose images the user compares."""
    pictures_per_prompt: int = 8
    """Images of each that the user sees."""
    tries: int = 6
    """Settings tried of each method, from the start of its grid; the same number for all."""
    train_steps: int = 120
    """Optimiser steps of every offline try."""
    online_steps: int = 35
    """Optimiser steps of AlignProp and D3PO, which also draw."""
    batch_size: int = 32
    """Samples per step."""
    validation_prompts: int = 40
    """Prompts on which tries are judged."""
    images_per_prompt: int = 1
    """Images of each."""
    sampling_steps: int = 15
    """DPM-Solver++ steps of judged images."""
    processes: int = 2
    """Processes that train and draw."""
    seed: int = 100
    """Of everything; not a seed of the paper's notebooks."""
