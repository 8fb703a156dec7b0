"""How a notebook's kernel is started, listened to and ended."""

import asyncio
import os
import time
from queue import Empty

from ipykernel.kernelspec import get_kernel_dict
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpec
from jupyter_client.manager import AsyncKernelManager

from dkto.common.ends import take_signals_back
from dkto.common.progress import QUIET_VARIABLE

ENVIRONMENT = {
    QUIET_VARIABLE: "1",  # no bars
    "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    "MPLBACKEND": "module://matplotlib_inline.backend_inline",  # figures stay in the notebook, whatever the shell says
}
PATIENCE = 1.0  # seconds that a kernel has to end when asked, before it is interrupted
LOOK_EVERY = 1.0  # seconds after which a channel that waits looks for itself whether something came


class LookingChannel(AsyncZMQSocketChannel):
    """A channel that does not miss an answer which came while something was sent.

    A socket announces what came once. Whoever sends on it meanwhile takes that announcement, and Jupyter's own channel
    then waits indefinitely for an answer that is there: a cell with sliders, whose state the runner sends back to the
    kernel while it waits for the cell's end, can stop a notebook so (nbclient's issue 312).
    """

    async def get_msg(self, timeout: float | None = None) -> dict[str, object]:
        """The next message; queue.Empty if none came in `timeout` seconds, None waits indefinitely."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            left = LOOK_EVERY if deadline is None else min(LOOK_EVERY, max(0.0, deadline - time.monotonic()))
            try:
                return await super().get_msg(left)
            except Empty:
                if deadline is not None and time.monotonic() >= deadline:
                    raise


class LookingClient(AsyncKernelClient):
    """A kernel client that misses no answer, see `LookingChannel`."""

    shell_channel_class = LookingChannel


class AskingKernelManager(AsyncKernelManager):
    """A kernel manager for `papermill.execute_notebook(kernel_manager_class=...)` that asks before it interrupts.

    Jupyter's own interrupts a kernel first. The runner ends it on the answer to its last request, which
    the kernel may still be leaving: on a busy machine it then reports an error of a run in which nothing failed.
    """

    client_factory = LookingClient

    @property
    def kernel_spec(self) -> KernelSpec:
        """This interpreter, whatever kernels are installed on the machine: a run and its record are of one Python."""
        return KernelSpec(**get_kernel_dict())

    async def start_kernel(self, **options: object) -> None:
        """Start the kernel with `ENVIRONMENT` over this process's own; nbclient keeps no signal from the command."""
        take_signals_back(asyncio.get_running_loop())
        await super().start_kernel(env=os.environ | ENVIRONMENT, **options)

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        """End the kernel; one still there after `PATIENCE`, with a cell running, is interrupted, then killed."""
        if self.has_kernel and not now:
            await self.request_shutdown(restart)
            deadline = time.monotonic() + PATIENCE
            while await self.is_alive() and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        await super().shutdown_kernel(now, restart)
