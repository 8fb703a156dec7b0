"""The 2-D laboratory: the objectives of `dkto.objective` where the truth is known in closed form (paper 7)."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "exact": ["dpo_optimum", "exact_denoiser", "output_law", "policy_optimum"],
        "judgements": ["Judged", "World", "as_pairs"],
        "measures": ["NONE", "held_out_rewards", "over_seeds"],
        "network": ["Architecture", "Ensemble", "stream"],
        "objectives": ["METHODS", "NEWER", "Method", "get_method"],
        "playground": ["Playground", "RECIPE", "key_of"],
        "plotting": [
            "LIMITS",
            "animation",
            "denoised_shift",
            "method_label",
            "plot_cloud",
            "plot_clouds",
            "plot_estimates",
            "plot_field",
            "plot_reward_map",
            "plot_sweep",
            "plot_tradeoff",
            "plot_world",
        ],
        "sampling": ["sample_ensemble"],
        "schedule": ["Schedule", "linear_schedule"],
        "experiment": ["run_experiment", "seconds_one_by_one"],
        "training": ["RECIPES", "SMALL", "draw_steps", "pretrain", "run", "tune"],
        "verdicts": ["CLAIMS", "Setting", "headline_settings", "verdict_card"],
        "world": [
            "BASE_KL",
            "DESIRABLE",
            "Gaussian",
            "PRETRAINING",
            "UNDESIRABLE",
            "bayes_accuracy",
            "exact_noise_pred",
            "gaussian_kl",
            "preference_reward",
            "to_model_units",
            "to_paper_units",
            "undesirable_share",
        ],
    },
)
