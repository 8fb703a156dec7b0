"""dkto: research notebooks and a toy laboratory for Diffusion-KTO.

The names below are loaded when they are first used: importing dkto alone imports neither
diffusers nor transformers.
"""

from importlib import import_module

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
    "generate_images": "generate",
    "noise_generator": "generate",
    "dpo_loss": "losses",
    "implicit_reward": "losses",
    "kto_loss": "losses",
    "reference_point": "losses",
    "sft_loss": "losses",
    "prepare_feedback": "prepare",
    "load_prompts": "prompts",
    "register_scorer": "scorers",
    "score_images": "scoring",
    "StudySession": "study",
    "make_study": "study",
    "study_result": "study_answers",
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


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
