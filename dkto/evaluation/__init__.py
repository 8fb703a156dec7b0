"""From tuned weights to a verdict: draw the same prompts and noise with every method, score, count wins."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "generate": ["generate_all", "generate_images"],
        "manifest": ["check_comparable", "image_path", "read_manifest"],
        "metrics": [
            "gaps",
            "median_of_images",
            "paired_bootstrap",
            "tango_interval",
            "wilson_interval",
            "win_rate",
        ],
        "monitors": ["monitor_table"],
        "published": ["both_versions"],
        "scorers": ["check_scorers", "register_scorer", "score"],
        "scoring": ["score_all", "score_images"],
        "study": ["StudySession", "make_study"],
        "study_answers": ["study_result"],
        "win_rates": [
            "compare",
            "flat_metrics",
            "mean_scores",
            "medians",
            "outcomes",
            "scorer_agreement",
            "win_rate_table",
        ],
    },
)
