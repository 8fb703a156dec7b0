"""A process that ends with the one that started it (Linux); run by path, one that becomes a command then.

    python -I -S follow.py PARENT SIGNAL COMMAND ...

The kernel keeps the request through the exec. It is made here, not between fork and exec, where Python may hang in
a program with threads, as every notebook kernel is one.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def die_with_parent(number: int = signal.SIGTERM) -> None:
    """Linux: ask the kernel for a signal to this process when the thread that made it ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


def main(parent: str, number: str, *command: str) -> None:
    die_with_parent(int(number))
    if os.getppid() != int(parent):  # gone before the request
        sys.exit(f"process {parent}, which started this, has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
