"""The small world: scenes with captions, their painter, the exact judge, and simulated users. Weights lie beside it."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "craft": ["read_craft"],
        "mirror": ["mirror_sentences", "taste_mirror", "traits"],
        "stranger": ["CARDS", "guess_taste", "likes_by_card"],
        "scenes": ["open_prompts", "parse", "prompts_for"],
        "sessions": ["session_pairs"],
        "truth": ["aesthetics", "judge"],
        "users": ["USERS", "tint_red"],
    },
)
