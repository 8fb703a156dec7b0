"""How a notebook's kernel is ended."""

import asyncio
import time

from jupyter_client.manager import AsyncKernelManager

PATIENCE = 1.0  # seconds that a kernel has to end when asked, before it is interrupted


class AskingKernelManager(AsyncKernelManager):
    """A kernel manager for `papermill.execute_notebook(kernel_manager_class=...)` that asks before it interrupts.

    Jupyter's own interrupts a kernel first. The runner ends it on the answer to its last request, which
    the kernel may still be leaving: on a busy machine it then reports an error of a run in which nothing failed.
    """

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:
        """End the kernel; one that is still there after `PATIENCE`, with a cell that runs, is interrupted, then killed.

        Args:
            now: kill it unasked.
            restart: its connection is kept for the next one.
        """
        if self.has_kernel and not now:
            await self.request_shutdown(restart)
            deadline = time.monotonic() + PATIENCE
            while await self.is_alive() and time.monotonic() < deadline:
                await asyncio.sleep(0.05)
        await super().shutdown_kernel(now, restart)
