"""No hang: a thread that sees how long its worker is at one part of a step, and says which worker the others wait for.

Each worker tells the others through the key-value store of their process group, but only once it has been at a part for long:
while steps are taken nothing is sent. It knows neither Ray nor the loop.
"""

import contextlib
import threading
import time
from collections.abc import Callable

import torch.distributed as dist

from ssl_ray.deadline import within

TELL_AFTER = 0.1
"""Of the time that counts as a stall: a worker that is at one part for so long tells the others where it is."""
ANSWER_S = 5.0
"""The store may be that of a worker that is stopped: it is waited for so long."""
ALONE = ("start", "pause", "wait", "transfer", "optimizer", "checkpoint", "end")
"""Parts in which a worker waits for no other."""
_WORDS = {
    "start": "starting at step {step}",
    "pause": "waiting for a read-out before step {step}",
    "wait": "waiting for data of step {step}",
    "agree": "in the all-reduce that begins step {step}",
    "transfer": "moving the views of step {step} to its device",
    "forward": "in the forward pass of step {step}, with its all-reduces",
    "loss": "in the all-reduces of the loss of step {step}",
    "backward": "in the backward pass of step {step}, with its all-reduces",
    "optimizer": "in the optimiser at step {step}",
    "look": "in the all-reduces of the embeddings' spread at step {step}",
    "checkpoint": "handing over the checkpoint of step {step}",
    "end": "writing its last files after step {step}",
}


class Watchdog:
    """Calls `stalled` with what to tell the user, once, when this worker has been at one part of a step for `stall_s`.

    It begins with the part `start`. `stalled` runs in a thread of its own.
    """

    def __init__(self, stall_s: float, *, step: int, group: dist.ProcessGroup | None, stalled: Callable[[str], None]):
        self.stall_s, self.stalled = stall_s, stalled
        self.rank, self.workers = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        # torch shows the store of the default group to nobody else.
        self._store = None if group is None else dist.distributed_c10d._get_default_store()
        self._now = ("start", step, time.monotonic())
        self._told = ""
        self._ended = threading.Event()
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    def at(self, part: str, step: int) -> None:
        """Notes where the worker is from now on."""
        self._now = (part, step, time.monotonic())

    @property
    def step(self) -> int:
        """That at which the worker is."""
        return self._now[1]

    def close(self) -> None:
        self._ended.set()

    def _run(self) -> None:
        while not self._ended.wait(min(1.0, self.stall_s * TELL_AFTER)):
            part, step, since = self._now
            lasted = time.monotonic() - since
            place = f"{part} {step}" if lasted > TELL_AFTER * self.stall_s else ""
            if place != self._told:
                self._told = place
                self._tell(place)
            if lasted > self.stall_s:
                self.stalled(describe_stall(self.stall_s, self._places() | {self.rank: place}))
                return

    def _tell(self, place: str) -> None:
        if self._store is not None:
            store = self._store
            with contextlib.suppress(Exception):  # of a store that is stopped, or gone
                within(ANSWER_S, lambda: store.set(f"place/{self.rank}", place))

    def _places(self) -> dict[int, str | None]:
        """Where each worker said it is; None: it said nothing; empty: it goes on."""
        places: dict[int, str | None] = dict.fromkeys(range(self.workers))

        def ask() -> None:
            for rank in places:
                if self._store is not None and self._store.check([f"place/{rank}"]):
                    places[rank] = self._store.get(f"place/{rank}").decode()

        with contextlib.suppress(Exception):
            within(ANSWER_S, ask)
        return dict(places)


def describe_stall(stall_s: float, places: dict[int, str | None]) -> str:
    """One line for the user: who is where, those first that the others wait for."""
    at: dict[str | None, list[int]] = {}
    for rank in sorted(places):
        at.setdefault(places[rank] or None, []).append(rank)

    def told(place: str | None) -> str:
        if place is None:
            return "no answer (stopped, cut off, or it has just gone on)"
        part, _, step = place.partition(" ")
        return _WORDS[part].format(step=step)

    order = sorted(at, key=lambda place: (place is not None, place is not None and place.split()[0] not in ALONE))
    parts = [f"rank{'s' * (len(at[place]) > 1)} {', '.join(map(str, at[place]))}: {told(place)}" for place in order]
    return f"no progress for {stall_s:g} s (train.stall_s): {'; '.join(parts)}"
