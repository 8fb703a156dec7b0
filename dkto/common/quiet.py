"""Import this before diffusers: its notices and loading bars stay out of notebooks and logs, as those of transformers.

Whoever wants them sets DIFFUSERS_VERBOSITY or TRANSFORMERS_VERBOSITY.
"""

import os

from dkto.common import quiet_transformers  # noqa: F401

os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")

from diffusers.utils import logging

if os.environ["DIFFUSERS_VERBOSITY"] == "error":
    logging.disable_progress_bar()
