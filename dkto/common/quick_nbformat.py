"""`nbformat` without the grammar of web addresses: import it from here, before papermill or nbconvert.

nbformat imports jsonschema, which builds 38 parsers of internationalised addresses if `rfc3987_syntax` is installed, as
it is with JupyterLab. They take 2 s of every process that runs a notebook, and no notebook holds such an address.
"""

import sys

GRAMMAR = "rfc3987_syntax"

absent = sys.modules.setdefault(GRAMMAR, None) is None  # so marked, its import fails and jsonschema goes on without it
try:
    import nbformat
finally:
    if absent:
        del sys.modules[GRAMMAR]

__all__ = ["nbformat"]
