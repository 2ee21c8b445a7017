"""Put on PYTHONPATH, kills a process at an exact point of its work with file operations, once for each point.

FAULTS names a folder. A file in it holds a number n and parts of a path: the process that is the n-th from now on to rename a
file to a path with these parts in it removes the file and dies by SIGKILL before the rename happens.
"""

import os
import signal
import sys


def _watch(event: str, arguments: tuple) -> None:
    if event != "os.rename":
        return
    target = os.fspath(arguments[1])
    folder = os.environ["FAULTS"]
    for name in os.listdir(folder):
        path = os.path.join(folder, name)
        try:
            with open(path) as file:
                count, *parts = file.read().split() or ["0"]
        except FileNotFoundError:
            continue
        if not parts or not all(part in str(target) for part in parts):
            continue
        if int(count) > 1:
            with open(path, "w") as file:
                file.write(" ".join([str(int(count) - 1), *parts]))
        else:
            os.unlink(path)
            os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("FAULTS"):
    sys.addaudithook(_watch)
