"""`transformers` with its notices and loading bars kept out of notebooks and logs: import it from here.

Whoever wants them sets TRANSFORMERS_VERBOSITY.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import transformers
from transformers.utils import logging

if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
    logging.disable_progress_bar()

__all__ = ["transformers"]
