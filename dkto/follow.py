"""Run by path, never imported: become a command that ends when the process that started it ends (Linux).

    python -I -S follow.py PARENT SIGNAL COMMAND ...

The kernel keeps the request through the exec. It is made here, not between fork and exec, where Python may hang in
a program with threads, as every notebook kernel is one.
"""

import ctypes
import os
import sys

PR_SET_PDEATHSIG = 1


def main(parent: str, number: str, *command: str) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))
    if os.getppid() != int(parent):  # gone before the request
        sys.exit(f"process {parent}, which started this, has ended")
    os.execv(command[0], command)


if __name__ == "__main__":
    main(*sys.argv[1:])
