"""Papermill without a kernel: a notebook's cells run in the process of the tests, which has imported everything.

A kernel of its own costs ten seconds of imports. What papermill promises (parameters, the executed copy, the sentence
of a failure) is the same here. What a kernel promises is tested by the notebooks of
`test_notebooks_run.IN_A_KERNEL`.
"""

import atexit
import io
import types
import warnings
from base64 import b64encode
from contextlib import contextmanager

import matplotlib.pyplot as plt
from IPython.core.displayhook import CapturingDisplayHook
from IPython.core.interactiveshell import InteractiveShell
from IPython.utils.capture import capture_output
from nbformat.v4 import new_output
from papermill.engines import Engine, NBClientEngine, papermill_engines

from dkto.objective.utilities import UTILITIES


class InProcess(Engine):
    """Runs cells in an IPython shell of this process; figures go into the outputs as a kernel would put them."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, **options):
        with _shell() as shell:
            for index, cell in enumerate(nb_man.nb.cells):
                if cell.cell_type != "code":
                    continue
                nb_man.cell_start(cell, index)
                last: list[dict] = []  # the value of the last expression
                shell.display_trap.hook = CapturingDisplayHook(shell, last)
                with capture_output() as shown:
                    result = shell.run_cell(cell.source, store_history=True)
                cell.outputs = [new_output("stream", text=text) for text in (shown.stdout, shown.stderr) if text]
                values = [(one.data, one.metadata) for one in shown.outputs] + [
                    (o["data"], o["metadata"]) for o in last
                ]
                cell.outputs += [new_output("display_data", data, metadata=about or {}) for data, about in values]
                cell.outputs += _figures()
                cell.execution_count = result.execution_count
                if not result.success:
                    error = result.error_before_exec or result.error_in_exec
                    about = {"ename": type(error).__name__, "evalue": str(error), "traceback": [repr(error)]}
                    cell.outputs.append(new_output("error", **about))
                    nb_man.cell_exception(cell, index)
                    return
                nb_man.cell_complete(cell, index)


def _figures():
    """The open figures as outputs, closed, as the inline backend does at the end of a cell."""
    found = []
    for number in plt.get_fignums():
        image = io.BytesIO()
        plt.figure(number).savefig(image, format="png")
        found.append(new_output("display_data", {"image/png": b64encode(image.getvalue()).decode()}))
    plt.close("all")
    return found


@contextmanager
def _shell():
    """An IPython shell that leaves no trace: no history, no utility that a notebook registered, no figure."""
    utilities = dict(UTILITIES)
    InteractiveShell.clear_instance()
    shell = InteractiveShell.instance(user_module=types.ModuleType("notebook_in_process"))
    shell.history_manager.enabled = False
    try:
        with plt.rc_context(), warnings.catch_warnings():
            warnings.simplefilter("default")
            yield shell
    finally:
        plt.close("all")
        shell.atexit_operations()
        atexit.unregister(shell.atexit_operations)
        InteractiveShell.clear_instance()
        UTILITIES.clear()
        UTILITIES.update(utilities)


@contextmanager
def in_this_process():
    """While this lasts `dkto.runs.notebooks.run_notebook` starts no kernel."""
    papermill_engines.register(None, InProcess)
    try:
        yield
    finally:
        papermill_engines.register(None, NBClientEngine)
