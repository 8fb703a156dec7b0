"""Import this before transformers: its notices and loading bars stay out of notebooks and logs.

Whoever wants them sets TRANSFORMERS_VERBOSITY.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

from transformers.utils import logging

if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
    logging.disable_progress_bar()
