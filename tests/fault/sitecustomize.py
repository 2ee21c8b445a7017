"""Put on PYTHONPATH, kills a process at an exact point of its work with file operations, once for each point.

FAULTS names a folder. A file in it holds a part of a path: the process that next renames a file to a path with that part
in it removes the file and dies by SIGKILL before the rename happens.
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
                wanted = file.read().strip()
        except FileNotFoundError:
            continue
        if wanted and all(part in str(target) for part in wanted.split()):
            os.unlink(path)
            os.kill(os.getpid(), signal.SIGKILL)


if os.environ.get("FAULTS"):
    sys.addaudithook(_watch)
