"""From prepared likes to tuned weights: `train` is a generator of step records over accelerate.

Read `loop.py`, `step.py` and `dkto.objective.methods`, in this order: that is the whole training.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "batches": ["GlobalBatches"],
        "calibration": ["CONVENTIONS", "calibrate", "convert_beta"],
        "config": ["OnlineConfig", "RunConfig", "TrainConfig"],
        "engine": ["Engine"],
        "health": ["training_health"],
        "launch": ["run_trainings", "training_command"],
        "loop": ["run_training", "train"],
        "rewards": ["error_gaps", "load_run", "margin_interval"],
        "run_folder": ["RunFolder"],
        "step": ["Run", "denoising_errors", "train_step"],
    },
)
