"""Instruments to touch, for JupyterLab: explore utilities, teach by likes, judge blind, watch a training, play.

Each is an anywidget: its front end is plain JavaScript beside its Python file, nothing is fetched, and
what comes from people (prompts, captions, formulas) reaches the page as text, never as HTML. The names
below are loaded when they are first used.
"""

from importlib import import_module

_HOME = {
    "Explorer": "explorer",
    "Judge": "judge",
    "Likes": "likes",
    "TrainingView": "training_view",
    "Tuner": "tuner",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module 'dkto.widgets' has no attribute {name!r}")
    return getattr(import_module(f"dkto.widgets.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
