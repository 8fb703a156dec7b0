"""`dkto.runs.kernels`: no answer is missed; a done kernel ends in silence, a working one is interrupted."""

import asyncio
import time
from queue import Empty

import nbformat
import pytest
import zmq
import zmq.asyncio
from jupyter_client.session import Session
from jupyter_core.utils import run_sync
from nbformat.v4 import new_code_cell, new_notebook

from dkto.runs.kernels import PATIENCE, AskingKernelManager, LookingChannel, LookingClient
from dkto.runs.notebooks import run_notebook

BUSY = 0.1  # seconds that the kernel stays with a request after it answered it
LINGER = f"""\
import time
from dkto.runs.notebooks import write_metrics
handlers = get_ipython().kernel.shell_handlers
answer = handlers["kernel_info_request"]

async def linger(*message):
    await answer(*message)
    time.sleep({BUSY})

handlers["kernel_info_request"] = linger
write_metrics(output_dir, {{"busy": {BUSY}}}, {{}}, 0)
"""


def test_a_kernel_still_busy_with_its_last_answer_ends_without_a_word(tmp_path, capfd):
    """The runner ends it on the answer to a request for its language; an interrupt then would be reported."""
    parameters = new_code_cell('output_dir: str = "out"', metadata={"tags": ["parameters"]})
    notebook = new_notebook(cells=[parameters, new_code_cell(LINGER)])
    nbformat.write(notebook, tmp_path / "busy.ipynb")
    run_notebook(tmp_path / "busy.ipynb", tmp_path / "done.ipynb", {"output_dir": str(tmp_path)}, progress=False)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("now", [False, True])
def test_a_cell_that_runs_is_interrupted_and_may_clean_up(tmp_path, now):
    """Unless the kernel is killed at once: then it is gone."""
    begun, cleaned = tmp_path / "begun", tmp_path / "cleaned"
    cell = f"""\
import pathlib, time
try:
    pathlib.Path({str(begun)!r}).touch()
    time.sleep(600)
finally:
    pathlib.Path({str(cleaned)!r}).touch()
"""

    async def run():
        manager = AskingKernelManager()
        await manager.start_kernel()
        client = manager.client()
        client.start_channels()
        await client.wait_for_ready(timeout=60)
        client.execute(cell)
        while not begun.exists():
            await asyncio.sleep(0.05)
        started = time.monotonic()
        await manager.shutdown_kernel(now=now)
        client.stop_channels()
        assert not await manager.is_alive()
        return time.monotonic() - started

    waited = run_sync(run)()  # beside a loop that another test left running
    if not now:
        assert cleaned.exists()
        assert waited >= PATIENCE


def test_an_answer_that_came_while_something_was_sent_is_not_missed():
    """Sending takes the socket's only announcement of the answer before the one who waits for it sees it."""

    async def run():
        session, peer = Session(key=b"k"), zmq.Context.instance().socket(zmq.ROUTER)
        port, own = peer.bind_to_random_port("tcp://127.0.0.1"), zmq.asyncio.Context.instance().socket(zmq.DEALER)
        own.setsockopt(zmq.IDENTITY, b"runner")
        own.connect(f"tcp://127.0.0.1:{port}")
        channel = LookingChannel(own, session)
        try:
            channel.send(session.msg("comm_open"))
            peer.recv_multipart()
            waiting = asyncio.create_task(channel.get_msg())
            await asyncio.sleep(0.1)
            session.send(peer, "execute_reply", ident=b"runner")
            time.sleep(0.3)  # it arrives, and nobody looks: the loop stands still
            channel.send(session.msg("comm_msg"))
            found = await asyncio.wait_for(waiting, 30)
            with pytest.raises(Empty):
                await channel.get_msg(timeout=0.1)
        finally:
            channel.close()
            peer.close(0)
        return found["msg_type"]

    assert run_sync(run)() == "execute_reply"


def test_the_clients_of_a_kernel_look_for_themselves():
    client = AskingKernelManager().client()
    assert isinstance(client, LookingClient) and client.shell_channel_class is LookingChannel
