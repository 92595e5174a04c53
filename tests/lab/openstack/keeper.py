"""
Holds one service: `keeper.py FD PROGRAM ARGUMENT...` is the leader of a process group.

The end of its standard input, which also a kill -9 of the tests brings about, and the end
of the program are the end of the whole group: whatever has been forked there, at once and
by SIGKILL. Nothing in it is worth a farewell; its databases go with their folder.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> None:
    if os.getpgrp() != os.getpid():
        sys.exit("keeper: not the leader of a process group")  # the SIGKILL would meet the tests
    listener = int(sys.argv[1])
    try:
        child = subprocess.Popen(sys.argv[2:], stdin=subprocess.DEVNULL, pass_fds=[listener])
        os.close(listener)  # else connections would hang, not fail, once the program has ended
        threading.Thread(target=_end_with, args=[child], daemon=True).start()
        while os.read(0, 4096):
            pass
    finally:
        os.killpg(0, signal.SIGKILL)


def _end_with(child: subprocess.Popen[bytes]) -> None:
    child.wait()
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
