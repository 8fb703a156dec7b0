"""Progress bars that are quiet where nobody watches."""

import os

from tqdm.auto import tqdm

QUIET_VARIABLE = "DKTO_QUIET"  # set by the notebook runner: bars would flood the executed notebook


def progress(iterable=None, **options) -> tqdm:
    """`tqdm.auto` refreshed once a second at most, switched off under papermill."""
    return tqdm(iterable, mininterval=1.0, disable=bool(os.environ.get(QUIET_VARIABLE)), **options)
