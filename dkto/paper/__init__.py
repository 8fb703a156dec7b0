"""The paper's experiments on the small world: a pool of judged images, every method trained alike, tables."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "page": ["aims", "extremes", "fidelity_sentences", "figures", "lead", "rates", "read_table", "show"],
        "pool": [
            "TASTES",
            "ask",
            "check_user",
            "compare_pool",
            "likes_of",
            "make_pool",
            "shares",
            "take_likes",
            "tint_pool",
        ],
        "seeds": ["pool_replay"],
        "search": ["online_settings"],
        "tables": ["USER_STUDY", "ordering_cards", "orderings", "published_table"],
        "train_all": [
            "ONLINE",
            "SYSTEMS",
            "check_systems",
            "controls_first",
            "make_config",
            "read_settings",
            "run_configs",
            "sampled_as",
            "settings_of",
            "settings_origin",
            "share_data",
            "sweep_guidance",
            "system_configs",
            "train_systems",
        ],
    },
)
