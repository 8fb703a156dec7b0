"""dkto: research notebooks and a toy laboratory for Diffusion-KTO.

The names below are loaded when they are first used: importing dkto alone imports neither
diffusers nor transformers.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dkto.config import TrainConfig
    from dkto.evaluate import compare, win_rate_table
    from dkto.feedback import FeedbackTable, make_feedback, read_feedback, write_feedback
    from dkto.generate import System, draw, generate, noise_generator
    from dkto.losses import dpo_loss, implicit_reward, kto_loss, reference_point, sft_loss
    from dkto.prepare import prepare
    from dkto.trainer import run_training, train
    from dkto.utilities import UTILITIES, get_utility, register_utility

__version__ = "0.1.0"

_HOME = {
    "TrainConfig": "config",
    "compare": "evaluate",
    "win_rate_table": "evaluate",
    "FeedbackTable": "feedback",
    "make_feedback": "feedback",
    "read_feedback": "feedback",
    "write_feedback": "feedback",
    "System": "generate",
    "draw": "generate",
    "generate": "generate",
    "noise_generator": "generate",
    "dpo_loss": "losses",
    "implicit_reward": "losses",
    "kto_loss": "losses",
    "reference_point": "losses",
    "sft_loss": "losses",
    "prepare": "prepare",
    "run_training": "trainer",
    "train": "trainer",
    "UTILITIES": "utilities",
    "get_utility": "utilities",
    "register_utility": "utilities",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'dkto' has no attribute {name!r}")
    return getattr(import_module(f"dkto.{_HOME[name]}"), name)
