"""dkto: research notebooks and a toy laboratory for Diffusion-KTO.

The names below are loaded when they are first used: importing dkto alone imports neither torch nor diffusers.
Each room (`dkto.objective`, `dkto.training`, ...) offers more.
"""

import lazy_loader

__version__ = "0.2.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "data": ["FeedbackTable", "load_prompts", "make_feedback", "prepare_feedback", "read_feedback"],
        "evaluation": ["compare", "generate_images", "register_scorer", "score_images", "win_rate_table"],
        "evaluation.study": ["StudySession", "make_study"],
        "models": ["System", "draw", "noise_generator"],
        "objective": ["UTILITIES", "dpo_loss", "get_utility", "implicit_reward", "kto_loss", "reference_point"],
        "training": ["TrainConfig", "run_training", "train"],
    },
)
