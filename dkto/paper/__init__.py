"""The paper's experiments on the small world: a pool of judged images, every method trained alike, tables.

`check_run` judges any finished run.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "check": ["check_run"],
        "dislikes": ["CONTRASTS", "NEED_DISLIKES", "ask_for_dislikes", "costs", "pool_users"],
        "experiment": [
            "flip_costs",
            "held_out_prompts",
            "judge_all",
            "measures_of",
            "own_rewards",
            "side_by_side",
            "simulated_feedback",
            "with_interval",
        ],
        "page": ["aims", "extremes", "fidelity_sentences", "figures", "lead", "rates", "read_table", "show", "under"],
        "pool": ["TASTES", "take_likes"],
        "search": ["online_settings"],
        "seeds": ["pool_replay", "seeds_of"],
        "tables": ["USER_STUDY", "ordering_cards", "orderings", "published_table"],
        "train_all": [
            "COMPARED",
            "at_best_guidance",
            "check_methods",
            "controls_first",
            "method_configs",
            "read_settings",
            "run_configs",
            "settings_origin",
            "sweep_guidance",
            "systems_of",
        ],
    },
)
