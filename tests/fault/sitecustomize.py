"""Put on PYTHONPATH, disturbs processes: FAULTS kills them at exact points of their work with files, PACE_S slows training.

FAULTS names a folder. A file in it holds a number n and parts of a path: the process that is the n-th from now on to rename a
file to a path with these parts in it removes the file and dies by SIGKILL before the rename happens, once for each file.

PACE_S is how many seconds to rest after each step of an optimizer: a run that is only to go on meanwhile takes no CPU.
"""

import os
import signal
import sys
import time


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


def _slow_down(event: str, arguments: tuple) -> None:
    """Once torch is imported, which is not done for this, has its optimizers rest."""
    register = getattr(sys.modules.get("torch.optim.optimizer"), "register_optimizer_step_post_hook", None)
    if register is not None and pace:
        seconds = pace.pop()
        register(lambda *_: time.sleep(seconds))


if os.environ.get("FAULTS"):
    sys.addaudithook(_watch)
if os.environ.get("PACE_S"):
    pace = [float(os.environ["PACE_S"])]
    sys.addaudithook(_slow_down)
