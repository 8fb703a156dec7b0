"""The paper, in torch alone: utilities, losses, the table of methods, implicit accuracy.

A reader of the paper begins with `losses.py`; a new method is a function and an entry in `methods.py`.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submod_attrs={
        "accuracy": ["implicit_accuracy"],
        "losses": [
            "denoising_error",
            "dpo_loss",
            "effective_weight",
            "implicit_reward",
            "kto_loss",
            "reference_point",
            "sft_loss",
        ],
        "felt": ["Errors", "Felt"],
        "methods": ["METHODS", "method_loss"],
        "utilities": ["UTILITIES", "Utility", "get_utility", "register_utility"],
    },
)
