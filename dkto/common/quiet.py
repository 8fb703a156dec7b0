"""Import this before diffusers or transformers: their notices and loading bars stay out of notebooks and logs.

Whoever wants them sets TRANSFORMERS_VERBOSITY or DIFFUSERS_VERBOSITY.
"""

import os

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

if os.environ["TRANSFORMERS_VERBOSITY"] == "error":
    transformers_logging.disable_progress_bar()
if os.environ["DIFFUSERS_VERBOSITY"] == "error":
    diffusers_logging.disable_progress_bar()
