"""Instruments for JupyterLab: utility explorer, teaching by likes, blind judge, training view."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "explorer": ["Explorer"],
        "judge": ["Judge"],
        "likelog": ["LikeLog", "Picture", "merge_likes", "pictures_in"],
        "likes": ["Likes"],
        "training_view": ["TrainingView"],
        "tuner": ["Tuner"],
    },
)
